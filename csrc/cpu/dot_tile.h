// Inner products of rows that lie anywhere in memory, a few rows by a few rows at a time in registers; nothing is
// packed. Each lane of a vector adds up a chain of its own.
#pragma once

#include "cpu/gemm.h"

namespace fastmix {

inline constexpr int64_t kDotRows = kTileRows, kDotColumns = kTileVectors;
inline constexpr int64_t kDots = 16;  // floats of a tile [kDotRows, kDotColumns] of sums, rounded up

namespace detail {

template <int d, int... i>
[[gnu::always_inline]] inline TileVec add_halves(TileVec a, TileVec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, ((i & d) ? kTileLanes + i - d : i)...) +
         __builtin_shufflevector(a, b, ((i & d) ? kTileLanes + i : i + d)...);
}

// The lane sums of kTileLanes vectors: pairwise, d lanes of each at a time.
template <int d = kTileLanes / 2>
[[gnu::always_inline]] inline TileVec lane_sums(TileVec* vectors) {
  for (int i = 0; i < d; ++i) {
    vectors[i] = add_halves<d>(vectors[i], vectors[i + d], std::make_integer_sequence<int, kTileLanes>{});
  }
  if constexpr (d > 1) return lane_sums<d / 2>(vectors);
  return vectors[0];
}

// sums[row·kDotColumns + column] (+)= Σ_k a[row][k]·b[column][k], k from `first` to `end`
template <int rows, int columns>
void dot_chain(int64_t first, int64_t end, const float* const* a, const float* const* b, float* sums, bool add) {
  TileVec dots[rows][columns] = {};
  const float *left[rows], *right[columns];
  for (int i = 0; i < rows; ++i) left[i] = a[i];
  for (int j = 0; j < columns; ++j) right[j] = b[j];
  const auto step = [&](const auto& read) __attribute__((always_inline)) {
    TileVec values[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) values[j] = read(right[j]);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const TileVec value = read(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) dots[i][j] += value * values[j];
    }
  };
  for (; first + kTileLanes <= end; first += kTileLanes) {
    step([first](const float* row) {
      TileVec value;
      std::memcpy(&value, row + first, sizeof(value));
      return value;
    });
  }
  if (first < end) {
    step([first, end](const float* row) {
      TileVec value{};
      std::memcpy(&value, row + first, (end - first) * sizeof(float));
      return value;
    });
  }
  static_assert(kDotRows * kDotColumns <= kDots && kDots % kTileLanes == 0);
  TileVec vectors[kDots] = {};
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) vectors[i * kDotColumns + j] = dots[i][j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kDots; i += kTileLanes) {
    TileVec value = lane_sums(vectors + i), before{};
    if (add) std::memcpy(&before, sums + i, sizeof(before));
    value += before;
    std::memcpy(sums + i, &value, sizeof(value));
  }
}

template <int rows, int columns>
void dot_tile(int64_t k, const float* const* a, const float* const* b, float* sums) {
  constexpr int64_t kLaneChain = kChain * kTileLanes;
  int64_t first = 0;
  do {
    const int64_t end = std::min(first + kLaneChain, k);
    dot_chain<rows, columns>(first, end, a, b, sums, first > 0);
    first = end;
  } while (first < k);
}

template <int rows>
void dot_tile(int64_t columns, int64_t k, const float* const* a, const float* const* b, float* sums) {
  switch (columns) {
    case 1:
      return dot_tile<rows, 1>(k, a, b, sums);
    case 2:
      return dot_tile<rows, 2>(k, a, b, sums);
    case 3:
      return dot_tile<rows, 3>(k, a, b, sums);
    default:
      return dot_tile<rows, kDotColumns>(k, a, b, sums);
  }
}

}  // namespace detail

// sums [kDotRows, kDotColumns] ← the inner products of the first `rows` rows of a and `columns` rows of b, of k floats
// each; 0 in other places.
inline void dot_tile(int64_t rows, int64_t columns, int64_t k, const float* const* a, const float* const* b,
                     float* sums) {
  switch (rows) {
    case 1:
      return detail::dot_tile<1>(columns, k, a, b, sums);
    case 2:
      return detail::dot_tile<2>(columns, k, a, b, sums);
    case 3:
      return detail::dot_tile<3>(columns, k, a, b, sums);
    default:
      return detail::dot_tile<4>(columns, k, a, b, sums);
  }
}

}  // namespace fastmix
