// Register-blocked float32 products c[m, n] (+)= Σ_k a[m, k]·b[k, n] for up to kTileColumns columns: a tile of
// kTileRows rows stays in registers over a chain of k. The left operand is read where it lies, row-major or transposed;
// the right one has its columns in the vector lanes. Packing converts bfloat16 and float16, so every product runs at
// the rate of float32.
#pragma once

#include "cpu/lanes.h"

namespace fastmix {

// Wide vectors pay here, unlike elsewhere: a product is bound by instructions, not by memory (docs/decisions.md).
#if defined(__AVX512F__)
inline constexpr int kTileLanes = 16, kTileVectors = 4;
#elif defined(__AVX__)
inline constexpr int kTileLanes = 8, kTileVectors = 3;
#else
inline constexpr int kTileLanes = 4, kTileVectors = 3;
#endif
inline constexpr int kTileRows = 4;
inline constexpr int kTileColumns = kTileLanes * kTileVectors;

// Longer sums are sums of chains: the rounding errors of one chain of float32 additions grow with its length.
inline constexpr int64_t kChain = 128;

// Element (m, k) at data[m·row_step + k·k_step].
struct Left {
  const float* data;
  int64_t row_step, k_step;
  Left from(int64_t row) const { return {data + row * row_step, row_step, k_step}; }
};

// Element (k, n) at data[k·step + n].
struct Right {
  const float* data;
  int64_t step = kTileColumns;
  Right from(int64_t column) const { return {data + column, step}; }
};

namespace detail {

using TileVec = float __attribute__((vector_size(kTileLanes * sizeof(float))));

template <int rows, int vectors>
[[gnu::always_inline]] inline void multiply_tile(int64_t k, Left a, Right b, float* c, int64_t stride, bool add) {
  TileVec sums[rows][vectors] = {};
  for (int64_t i = 0; i < k; ++i, a.data += a.k_step, b.data += b.step) {
    TileVec right[vectors];
    for (int j = 0; j < vectors; ++j) std::memcpy(&right[j], b.data + j * kTileLanes, sizeof(TileVec));
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      const float left = a.data[row * a.row_step];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[row][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c + row * stride + j * kTileLanes;
      TileVec value = sums[row][j];
      if (add) {
        TileVec before;
        std::memcpy(&before, to, sizeof(before));
        value += before;
      }
      std::memcpy(to, &value, sizeof(value));
    }
  }
}

template <int rows, int vectors>
void multiply_chains(int64_t k, const Left& a, const Right& b, float* c, int64_t stride, bool add) {
  if (k <= kChain) return multiply_tile<rows, vectors>(k, a, b, c, stride, add);
  const int64_t chains = (k + kChain - 1) / kChain, chain = (k + chains - 1) / chains;
  for (int64_t done = 0; done < k; done += chain) {
    const Left left{a.data + done * a.k_step, a.row_step, a.k_step};
    const Right right{b.data + done * b.step, b.step};
    multiply_tile<rows, vectors>(std::min(chain, k - done), left, right, c, stride, add || done > 0);
  }
}

template <int vectors>
void multiply_rows(int64_t rows, int64_t k, Left a, const Right& b, float* c, int64_t stride, bool add) {
  for (; rows > kTileRows; rows -= kTileRows, a.data += kTileRows * a.row_step, c += kTileRows * stride) {
    multiply_chains<kTileRows, vectors>(k, a, b, c, stride, add);
  }
  switch (rows) {
    case 1:
      return multiply_chains<1, vectors>(k, a, b, c, stride, add);
    case 2:
      return multiply_chains<2, vectors>(k, a, b, c, stride, add);
    case 3:
      return multiply_chains<3, vectors>(k, a, b, c, stride, add);
    default:
      return multiply_chains<4, vectors>(k, a, b, c, stride, add);
  }
}

}  // namespace detail

// Any number of rows, columns ≤ kTileColumns; b and c, its rows `stride` apart, reach to columns rounded up to
// kTileLanes.
inline void multiply_tile(int64_t rows, int64_t columns, int64_t k, Left a, Right b, float* c, int64_t stride,
                          bool add = false) {
  static_assert(kTileVectors <= 4 && kTileRows == 4);
  switch ((columns + kTileLanes - 1) / kTileLanes) {
    case 1:
      return detail::multiply_rows<1>(rows, k, a, b, c, stride, add);
    case 2:
      return detail::multiply_rows<2>(rows, k, a, b, c, stride, add);
    case 3:
      return detail::multiply_rows<3>(rows, k, a, b, c, stride, add);
    default:
      return detail::multiply_rows<kTileVectors>(rows, k, a, b, c, stride, add);
  }
}

// visit(row, rows, column, columns) for each tile of a product; the columns' group of b stays in the cache.
template <typename Visit>
void for_tiles(int64_t rows, int64_t columns, const Visit& visit) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      visit(row, std::min<int64_t>(kTileRows, rows - row), column, std::min<int64_t>(kTileColumns, columns - column));
    }
  }
}

// All of c, if b's columns lie beside each other.
inline void multiply(int64_t rows, int64_t columns, int64_t k, Left a, Right b, float* c, int64_t stride,
                     bool add = false) {
  for (int64_t column = 0; column < columns && rows > 0; column += kTileColumns) {
    multiply_tile(rows, std::min<int64_t>(kTileColumns, columns - column), k, a, b.from(column), c + column, stride,
                  add);
  }
}

// Packing of a right operand into groups of kTileColumns columns, each [k, kTileColumns]

inline int64_t groups_size(int64_t columns, int64_t k) { return round_up(columns, kTileColumns) * k; }

// One group of b [k, columns], rows `stride` apart, columns ≤ kTileColumns; those that a tile reads beyond become 0.
template <typename T>
void pack_group(const T* b, int64_t stride, int64_t k, int64_t columns, float* group) {
  const int64_t width = round_up(columns, kTileLanes);
  for (int64_t i = 0; i < k; ++i, b += stride, group += kTileColumns) {
    for (int64_t j = 0; j < width; j += kLanes) {
      store(group + j, j < columns ? load_lanes(b + j, std::min<int64_t>(columns - j, kLanes)) : Vec{});
    }
  }
}

// All groups of b [k, columns].
template <typename T>
void pack_groups(const T* b, int64_t stride, int64_t k, int64_t columns, float* groups) {
  for (int64_t first = 0; first < columns; first += kTileColumns) {
    pack_group(b + first, stride, k, std::min<int64_t>(kTileColumns, columns - first), groups + first * k);
  }
}

// All groups of the transposed of b [columns, k].
template <typename T>
void pack_columns(const T* b, int64_t stride, int64_t k, int64_t columns, float* groups) {
  for (int64_t first = 0; first < columns; first += kTileColumns, groups += k * kTileColumns) {
    const int64_t width = std::min(round_up(columns - first, kTileLanes), int64_t{kTileColumns});
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t i = 0; i < k; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, k - i);
        Vec block[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t column = first + j + lane;
          block[lane] = column < columns ? load_lanes(b + column * stride + i, count) : Vec{};
        }
        transpose(block);
        for (int64_t lane = 0; lane < count; ++lane) store(groups + (i + lane) * kTileColumns + j, block[lane]);
      }
    }
  }
}

// c += a·b for b in groups; c's rows have room for columns rounded up to kTileColumns.
inline void multiply_groups(int64_t rows, int64_t columns, int64_t k, Left a, const float* groups, float* c,
                            int64_t stride) {
  for (int64_t first = 0; first < columns; first += kTileColumns) {
    multiply(rows, std::min<int64_t>(kTileColumns, columns - first), k, a, {groups + first * k}, c + first, stride,
             true);
  }
}

}  // namespace fastmix
