// External attention of one head of one sample, x [S, d], in chunks of rows that stay in the cache; mk, mv [M, d].
//   forward:  P = softmax over the tokens of x·mkᵀ, r = 1e-9 + Σ_m P, A = P / r, y = A·mv
//   backward: dA = dy·mvᵀ, dmv = Aᵀ·dy, dP = (dA − Σ_m dA·A) / r, dL = P·(dP − Σ_s dP·P), dx = dL·mk, dmk = dLᵀ·x
// What runs along the tokens is first gathered by chunk, then put together in their order. All in float32; rows along
// the memory are padded with zeros to `width`.
#pragma once

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/log_sum_exp.h"

namespace fastmix {

struct ExternalAttention {
  static constexpr int64_t kWidth = 16;  // of the padding: fixed, as the padded softmax is kept for the backward
  static constexpr int64_t kChunkRows = 128, kDepth = 256;

  int64_t batch, heads, s, d, m;

  int64_t pairs() const { return batch * heads; }
  int64_t width() const { return round_up(m, kWidth); }
  int64_t size() const { return round_up(d, kTileLanes); }  // of a padded row of mk or mv
  int64_t chunks() const { return std::max<int64_t>(1, (s + kChunkRows / 2) / kChunkRows); }
  int64_t chunk_rows() const { return round_up((s + chunks() - 1) / chunks(), kTileRows); }
  int64_t first_row(int64_t chunk) const { return std::min(chunk * chunk_rows(), s); }
  int64_t rows(int64_t chunk) const { return first_row(chunk + 1) - first_row(chunk); }
  // Working memory of a thread: converted rows, a chunk of A, 1 / r, and a group of columns.
  int64_t scratch_size() const { return chunk_rows() * (kDepth + width() + 1 + kTileColumns); }
};

// A head's rows in a tensor [B, S, C] with contiguous channels.
template <typename T>
struct Head {
  T* data;
  int64_t stride;
  T* row(int64_t i) const { return data + i * stride; }
};

// One thread at work on one head.
template <typename T>
struct HeadWorker {
  const ExternalAttention& shape;
  float* scratch;

  const int64_t width = shape.width();
  float* const converted = scratch;                                        // [rows, kDepth]
  float* const attention = converted + shape.chunk_rows() * shape.kDepth;  // [rows, width]
  float* const inverse = attention + shape.chunk_rows() * width;           // [rows]
  float* const strip = inverse + shape.chunk_rows();                       // [rows, kTileColumns]

  // Forward

  // exponentials [rows, width] ← exp(x·mkᵀ − maxima) of the chunk's rows; their column sums.
  void exponentials(const Head<const T>& x, int64_t chunk, const float* keys, float* exponentials, float* maxima,
                    float* sums) const {
    const int64_t rows = shape.rows(chunk);
    by_memory(x.row(shape.first_row(chunk)), x.stride, rows, keys, exponentials);
    constexpr float kLog2e = 1.44269504f;
    for (int64_t column = 0; column < width; column += kLanes) {
      float* const top = exponentials + column;
      Vec largest = Vec{} - kInfinity;  // may miss a NaN, which then shows in the exponentials
      for (int64_t i = 0; i < rows; ++i) {
        const Vec value = load(top + i * width);
        largest = value > largest ? value : largest;
      }
      const Vec base = largest == -kInfinity ? Vec{} : largest;
      Vec sum{};
      for (int64_t i = 0; i < rows; ++i) {
        const Vec value = exp2_nonpositive((load(top + i * width) - base) * kLog2e);
        store(top + i * width, value);
        sum += value;
      }
      store(maxima + column, largest);
      store(sums + column, sum);
    }
    clear_padding(exponentials, rows);
  }

  // maxima of the chunks ← what makes each chunk's exponentials the softmax.
  void factors(float* maxima, const float* sums) const {
    constexpr float kLog2e = 1.44269504f;
    const int64_t chunks = shape.chunks();
    for (int64_t column = 0; column < width; column += kLanes) {
      Vec largest = load(maxima + column);
      for (int64_t c = 1; c < chunks; ++c) {
        const Vec of_chunk = load(maxima + c * width + column);
        largest = of_chunk > largest ? of_chunk : largest;
      }
      Vec total{};
      for (int64_t c = 0; c < chunks; ++c) {
        float* const at = maxima + c * width + column;
        const Vec factor = exp2_nonpositive((load(at) - largest) * kLog2e);
        total += load(sums + c * width + column) * factor;
        store(at, factor);
      }
      for (int64_t c = 0; c < chunks; ++c) {
        float* const at = maxima + c * width + column;
        store(at, load(at) / total);
      }
    }
    clear_padding(maxima, chunks);
  }

  // softmax, which held the exponentials, and y.
  void output(const Head<T>& y, int64_t chunk, const float* values, const float* factors, float* softmax) const {
    const int64_t rows = shape.rows(chunk);
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = softmax + i * width;
      for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(row + j) * load(factors + j));
    }
    normalise(softmax, rows);
    by_channels({attention, width, 1}, rows, values, y.row(shape.first_row(chunk)), y.stride);
  }

  // Backward

  // dp [rows, width] ← dP, dots [width] ← Σ over the rows of dP·P, dmv (+)= Aᵀ·dy
  void gradient_of_softmax(const Head<const T>& dy, int64_t chunk, const float* values, const float* softmax, float* dp,
                           float* dots, float* dmv, bool add) const {
    const int64_t rows = shape.rows(chunk);
    const T* const first = dy.row(shape.first_row(chunk));
    normalise(softmax, rows);
    by_memory(first, dy.stride, rows, values, dp);
    clear_padding(dp, rows);
    std::fill(dots, dots + width, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = dp + i * width;
      Vec sum{};
      for (int64_t j = 0; j < width; j += kLanes) sum += load(row + j) * load(attention + i * width + j);
      const float dot = horizontal_sum(sum);
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vec value = (load(row + j) - dot) * inverse[i];
        store(row + j, value);
        store(dots + j, load(dots + j) + value * load(softmax + i * width + j));
      }
    }
    add_outer({attention, 1, width}, rows, first, dy.stride, dmv, add);
  }

  // dx, dmk (+)= dLᵀ·x; dp becomes dL.
  void gradient_of_tokens(const Head<const T>& x, const Head<T>& dx, int64_t chunk, const float* keys,
                          const float* softmax, const float* dots, float* dp, float* dmk, bool add) const {
    const int64_t rows = shape.rows(chunk), first = shape.first_row(chunk);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += kLanes) {
        float* const at = dp + i * width + j;
        store(at, load(softmax + i * width + j) * (load(at) - load(dots + j)));
      }
    }
    by_channels({dp, width, 1}, rows, keys, dx.row(first), dx.stride);
    add_outer({dp, 1, width}, rows, x.row(first), x.stride, dmk, add);
  }

 private:
  void clear_padding(float* values, int64_t rows) const {
    for (int64_t i = 0; i < rows && shape.m < width; ++i) {
      std::fill(values + i * width + shape.m, values + (i + 1) * width, 0.0f);
    }
  }

  // attention ← softmax / r, inverse ← 1 / r
  void normalise(const float* softmax, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float* const row = softmax + i * width;
      Vec sum{};
      for (int64_t j = 0; j < width; j += kLanes) sum += load(row + j);
      const float total = 1e-9f + horizontal_sum(sum);
      inverse[i] = 1 / total;
      for (int64_t j = 0; j < width; j += kLanes) {
        // A correction, as by a division: a token that only one slot attends to has A = 1, and no gradient.
        const Vec value = load(row + j), quotient = value * inverse[i];
        store(attention + i * width + j, quotient + (value - quotient * total) * inverse[i]);
      }
    }
  }

  // out [rows, width] ← tokens·groups
  void by_memory(const T* tokens, int64_t stride, int64_t rows, const float* groups, float* out) const {
    for (int64_t first = 0; first < shape.d; first += shape.kDepth) {
      const int64_t depth = std::min(shape.kDepth, shape.d - first);
      const Left left = in_float32(tokens + first, stride, rows, depth);
      for (int64_t column = 0; column < shape.m; column += kTileColumns) {
        const Right right{groups + column * shape.d + first * kTileColumns};
        multiply(rows, std::min<int64_t>(kTileColumns, shape.m - column), depth, left, right, out + column, width,
                 first > 0);
      }
    }
  }

  Left in_float32(const T* tokens, int64_t stride, int64_t rows, int64_t depth) const {
    if constexpr (std::is_same_v<T, float>) {
      return {tokens, stride, 1};
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < depth; j += kLanes) {
          const Vec value = load_lanes(tokens + i * stride + j, std::min<int64_t>(kLanes, depth - j));
          store(converted + i * shape.kDepth + j, value);
        }
      }
      return {converted, shape.kDepth, 1};
    }
  }

  // out [rows, d] ← weights [rows, M]·groups
  void by_channels(const Left& weights, int64_t rows, const float* groups, T* out, int64_t stride) const {
    for (int64_t column = 0; column < shape.d; column += kTileColumns) {
      const int64_t count = std::min<int64_t>(kTileColumns, shape.d - column);
      const Right right{groups + column * shape.m};
      if constexpr (std::is_same_v<T, float>) {
        if (count % kTileLanes == 0) {
          multiply(rows, count, shape.m, weights, right, out + column, stride);
          continue;
        }
      }
      multiply(rows, count, shape.m, weights, right, strip, kTileColumns);
      for (int64_t i = 0; i < rows; ++i) {
        T* const to = out + i * stride + column;
        for (int64_t j = 0; j < count; j += kLanes) {
          store_lanes(to + j, load(strip + i * kTileColumns + j), std::min<int64_t>(kLanes, count - j));
        }
      }
    }
  }

  // sums [M, size] (+)= weights [M, rows]·tokens
  void add_outer(const Left& weights, int64_t rows, const T* tokens, int64_t stride, float* sums, bool add) const {
    for (int64_t column = 0; column < shape.d; column += kTileColumns) {
      const int64_t count = std::min<int64_t>(kTileColumns, shape.d - column);
      const Right right = columns_in_float32(tokens + column, stride, rows, count);
      multiply(shape.m, count, rows, weights, right, sums + column, shape.size(), add);
    }
  }

  Right columns_in_float32(const T* tokens, int64_t stride, int64_t rows, int64_t count) const {
    if constexpr (std::is_same_v<T, float>) {
      if (count % kTileLanes == 0) return {tokens, stride};
    }
    pack_group(tokens, stride, rows, count, strip);
    return {strip};
  }
};

}  // namespace fastmix
