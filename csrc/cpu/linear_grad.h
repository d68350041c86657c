// The gradient of a linear layer's weight, dW [O, I] = Σ_t g_t a_tᵀ, in tiles of registers: what the per-sample norms,
// Gram matrices and their gradients are made of. a [B, T, I] is the layer's input, g [B, T, O] the gradient of its
// output; both are packed once, which converts bfloat16 and float16. Sums are float32 chains, as in gemm.h.
#pragma once

#include "cpu/gemm.h"

namespace fastmix {

inline constexpr int64_t kBlockOut = 64;  // rows of dW for which g is packed at a time
// Rows of what is multiplied, then squared: several tiles of registers, still in the L1 cache; part of a group of g.
inline constexpr int64_t kStripRows = kTileColumns % 16 == 0 ? 16 : 12;
inline constexpr int64_t kStripSize = kStripRows * kTileColumns;
inline constexpr int64_t kDirectColumns = 4 * kTileColumns;  // columns of dW squared at a time, without its total

struct LinearSizes {
  int64_t batch, positions, in, out;
  double flops() const { return 2.0 * batch * positions * in * out; }
};

// a or g: [B, T, features] with contiguous features, any strides of samples and positions.
template <typename T>
struct Positions {
  T* data;
  int64_t sample_stride, stride, count;

  T* at(int64_t sample, int64_t position = 0) const { return data + sample * sample_stride + position * stride; }

  // body(first row's place in the range, pointer, rows) for the runs of rows [first, first + rows) of [B·T].
  template <typename Body>
  void for_runs(int64_t first, int64_t rows, const Body& body) const {
    for (int64_t row = first; row < first + rows;) {
      const int64_t position = row % count, run = std::min(count - position, first + rows - row);
      body(row - first, at(row / count, position), run);
      row += run;
    }
  }
};

// groups ← columns [first_column, first_column + columns) of rows [first, first + rows) of [B·T].
template <typename T>
void pack_positions(const Positions<T>& p, int64_t first, int64_t rows, int64_t first_column, int64_t columns,
                    float* groups) {
  for (int64_t column = 0; column < columns; column += kTileColumns, groups += rows * kTileColumns) {
    const int64_t width = std::min<int64_t>(kTileColumns, columns - column);
    p.for_runs(first, rows, [&](int64_t row, const T* from, int64_t run) {
      pack_group(from + first_column + column, p.stride, run, width, groups + row * kTileColumns);
    });
  }
}

// visit(row, rows, column, columns, left, right) for each strip of g·aᵀ, which is the product of left and right; g and
// a are packed, over `positions`.
template <typename Visit>
void for_strips(int64_t positions, int64_t out, int64_t in, const float* g, const float* a, const Visit& visit) {
  static_assert(kTileColumns % kStripRows == 0 && kStripRows % kTileRows == 0);
  for (int64_t column = 0; column < in; column += kTileColumns) {
    const int64_t columns = std::min<int64_t>(kTileColumns, in - column);
    for (int64_t row = 0; row < out; row += kStripRows) {
      const float* const group = g + row / kTileColumns * positions * kTileColumns;
      visit(row, std::min(kStripRows, out - row), column, columns, Left{group + row % kTileColumns, 1, kTileColumns},
            Right{a + column * positions});
    }
  }
}

// The sum of squares of a row, whose lanes beyond `columns` are 0.
inline Vec squares(const float* row, int64_t columns) {
  Vec sum{};
  for (int64_t i = 0; i < columns; i += kLanes) sum += load(row + i) * load(row + i);
  return sum;
}

// sums [columns rounded up to kLanes] ← Σ over the rows of a group [rows, kTileColumns].
inline void column_sums(const float* group, int64_t rows, int64_t columns, float* sums) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    Vec total{};
    for (int64_t first = 0; first < rows; first += kChain) {
      Vec sum{};
      for (int64_t row = first; row < std::min(first + kChain, rows); ++row)
        sum += load(group + row * kTileColumns + i);
      total += sum;
    }
    store(sums + i, total);
  }
}

// Floats of scratch that the squares of a part of dW take.
inline int64_t direct_scratch(int64_t positions, int64_t in) {
  return groups_size(in, positions) + groups_size(kBlockOut, positions) + kStripSize;
}

// ‖dW[:, first_in : first_in + in]‖² of one sample, and the bias's ‖Σ_t g_t‖² if asked for.
template <typename T>
double direct_norm_sq(const Positions<const T>& a, const Positions<const T>& g, int64_t sample, int64_t positions,
                      int64_t first_in, int64_t in, int64_t out, bool bias, float* scratch) {
  float* const a_groups = scratch;
  float* const g_groups = a_groups + groups_size(in, positions);
  float* const tile = g_groups + groups_size(kBlockOut, positions);
  pack_positions(a, sample * a.count, positions, first_in, in, a_groups);
  double sum = 0;
  for (int64_t row = 0; row < out; row += kBlockOut) {
    const int64_t rows = std::min(kBlockOut, out - row);
    pack_positions(g, sample * g.count, positions, row, rows, g_groups);
    for_strips(positions, rows, in, g_groups, a_groups,
               [&](int64_t, int64_t count, int64_t, int64_t columns, const Left& left, const Right& right) {
                 multiply_tile(count, columns, positions, left, right, tile, kTileColumns);
                 Vec of_strip{};
                 for (int64_t i = 0; i < count; ++i) of_strip += squares(tile + i * kTileColumns, columns);
                 sum += horizontal_sum(of_strip);
               });
    for (int64_t i = 0; i < rows && bias; i += kTileColumns) {
      const int64_t columns = std::min<int64_t>(kTileColumns, rows - i);
      column_sums(g_groups + i * positions, positions, columns, tile);
      sum += horizontal_sum(squares(tile, columns));
    }
  }
  return sum;
}

}  // namespace fastmix
