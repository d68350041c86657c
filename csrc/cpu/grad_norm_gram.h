// The Gram form: ‖Σ_t g_t a_tᵀ‖² = Σ_tu (a_t·a_u)(g_t·g_u), and the same of two samples' positions for the inner
// product of their gradients. The tiles of both products are multiplied where they are made; neither is ever whole, and
// of the symmetric ones half is made.
#pragma once

#include <type_traits>

#include "cpu/dot_tile.h"
#include "cpu/linear_grad.h"

namespace fastmix {

// Below this share of Σ_t ‖a_t‖²‖g_t‖² a norm is left of a sum that cancels. The inner products are exact to some 4e-7,
// so above it the norm's relative error is below 1e-5.
inline constexpr double kCancelled = 0.125;

// Rows of a and of g in float32.
struct RowPairs {
  int64_t in, out;
  const float* const* a;
  const float* const* g;
  bool bias;

  // Rows whose a and g stay in the cache together with as many others.
  int64_t block() const {
    constexpr int64_t kFloats = 48 * 1024, kWhole = kDotRows * kDotColumns;
    return std::clamp<int64_t>(kFloats / std::max<int64_t>(1, std::max(in, out)) / kWhole, 1, 8) * kWhole;
  }

  // visit(row, rows, column, columns, products) for the tiles of rows [begin, end) × columns [first, last);
  // products [kDotRows, kDotColumns] ← (a·a + bias)(g·g). Without tiles all above the diagonal, if `lower`.
  template <typename Visit>
  void for_products(int64_t begin, int64_t end, int64_t first, int64_t last, bool lower, const Visit& visit) const {
    const int64_t block = this->block();
    for (int64_t top = begin; top < end; top += block) {
      const int64_t bottom = std::min(top + block, end);
      for (int64_t left = first; left < (lower ? std::min(last, bottom) : last); left += block) {
        const int64_t right = std::min(left + block, last);
        for (int64_t row = top; row < bottom; row += kDotRows) {
          const int64_t rows = std::min(kDotRows, bottom - row);
          for (int64_t column = left; column < (lower ? std::min(right, row + rows) : right); column += kDotColumns) {
            const int64_t columns = std::min(kDotColumns, right - column);
            float products[kDots], of_g[kDots];
            dot_tile(rows, columns, in, a + row, a + column, products);
            dot_tile(rows, columns, out, g + row, g + column, of_g);
            for (int64_t i = 0; i < kDots; i += kLanes) {
              const Vec of_a = load(products + i);
              store(products + i, (bias ? of_a + 1.0f : of_a) * load(of_g + i));
            }
            visit(row, rows, column, columns, products);
          }
        }
      }
    }
  }
};

template <typename T>
void convert_row(const T* from, int64_t features, float* to) {
  for (int64_t j = 0; j < features; j += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, features - j);
    store_lanes(to + j, load_lanes(from + j, lanes), lanes);
  }
}

// Rows [first, first + rows) of [B·T] in float32: where they lie, or converted into `converted`.
template <typename T>
void float_rows(const Positions<const T>& p, int64_t first, int64_t rows, int64_t features, float* converted,
                const float** pointers) {
  p.for_runs(first, rows, [&](int64_t place, const T* from, int64_t run) {
    for (int64_t i = 0; i < run; ++i, from += p.stride) {
      if constexpr (std::is_same_v<T, float>) {
        pointers[place + i] = from;
      } else {
        pointers[place + i] = converted + (place + i) * features;
        convert_row(from, features, converted + (place + i) * features);
      }
    }
  });
}

template <typename T>
constexpr int64_t converted_size(int64_t rows, int64_t features) {
  return std::is_same_v<T, float> ? 0 : rows * features;
}

// The squared norm of the sample whose rows these are, and false if the sum cancelled.
inline bool gram_norm_sq(const RowPairs& pairs, int64_t positions, double& norm_sq) {
  using DoubleVec = double __attribute__((vector_size(kLanes * sizeof(double))));
  double sum = 0, diagonal = 0;
  DoubleVec below{};  // the tiles below the diagonal, which count twice
  pairs.for_products(0, positions, 0, positions, true,
                     [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* products) {
                       if (column + columns <= row) {
                         Vec total{};
                         for (int64_t i = 0; i < kDots; i += kLanes) total += load(products + i);
                         below += __builtin_convertvector(total, DoubleVec);
                         return;
                       }
                       for (int64_t i = 0; i < rows; ++i) {
                         for (int64_t j = 0; j < columns && column + j <= row + i; ++j) {
                           const double product = products[i * kDotColumns + j];
                           if (column + j == row + i) diagonal += product;
                           sum += column + j == row + i ? product : 2 * product;
                         }
                       }
                     });
  for (int i = 0; i < kLanes; ++i) sum += 2 * below[i];
  norm_sq = std::max(sum, 0.0);
  // Also if it is NaN, and always where there is nothing to cancel.
  return positions <= 1 || !(sum < kCancelled * diagonal);
}

}  // namespace fastmix
