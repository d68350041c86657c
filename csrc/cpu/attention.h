// Scaled attention's sizes and options as the CPU kernels see them. Whatever structure says who attends to whom
// (causal, prefix, window, padding), the keys of a query are one interval, and its ends rise with the query.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/gemm.h"

namespace fastmix {

using torch::headeronly::ScalarType;

// A tile of scores: kRowBlock queries by kKeyBlock keys. Its rows lie a cache line further apart, because a stride of
// 512 bytes would put a column into 8 of the cache's 64 sets.
inline constexpr int64_t kRowBlock = 32;
inline constexpr int64_t kKeyBlock = kTileLanes == 16 ? 128 : 96;
inline constexpr int64_t kScoreStride = kKeyBlock + 16;
static_assert(kKeyBlock % kTileColumns == 0 && kKeyBlock % (4 * kLanes) == 0 && kKeyBlock <= kChain);

// body(pointer to the C++ type of the elements) for float32, bfloat16 and float16.
template <typename Body>
void with_elements(char* data, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(reinterpret_cast<float*>(data));
    case ScalarType::BFloat16:
      return body(reinterpret_cast<BFloat16*>(data));
    default:
      return body(reinterpret_cast<Half*>(data));
  }
}

// A [B, H, T, D] tensor with its channels side by side; strides in elements.
struct Heads {
  char* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t size = 0, batch = 0, head = 0, row = 0;

  char* at(int64_t b, int64_t h, int64_t t) const {
    return data + (b * batch + h * head + t * row) * (type == ScalarType::Float ? 4 : 2);
  }
  int64_t width() const { return round_up(size, kTileLanes); }

  // width() floats, those beyond size 0
  void read(int64_t b, int64_t h, int64_t t, float* to) const {
    if (type == ScalarType::Float && size == width()) {
      std::memcpy(to, at(b, h, t), size * sizeof(float));
      return;
    }
    with_elements(at(b, h, t), type, [&](auto* from) {
      for (int64_t j = 0; j < width(); j += kLanes) {
        store(to + j, j < size ? load_lanes(from + j, std::min<int64_t>(kLanes, size - j)) : Vec{});
      }
    });
  }
  void write(int64_t b, int64_t h, int64_t t, const float* from) const {
    with_elements(at(b, h, t), type, [&](auto* to) {
      for (int64_t j = 0; j < size; j += kLanes) {
        store_lanes(to + j, load(from + j), std::min<int64_t>(kLanes, size - j));
      }
    });
  }
};

// attn_mask, its dimensions of size 1 with stride 0.
struct Mask {
  char* data = nullptr;
  bool boolean = false;
  ScalarType type = ScalarType::Float;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  explicit operator bool() const { return data != nullptr; }
  int64_t offset(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * batch + h * head + i * row + j * column;
  }
};

struct Positions {
  const int32_t* data = nullptr;
  int64_t batch = 0, row = 0;

  explicit operator bool() const { return data != nullptr; }
  int64_t at(int64_t b, int64_t i) const { return data[b * batch + i * row]; }
};

// A sample of the batch, or a packed sequence.
struct Sequence {
  int64_t number, b;         // the number counts packed sequences; b is the index of the tensors
  int64_t row0, rows;        // its queries
  int64_t column0, columns;  // its keys, without the padding behind them
  int64_t start, offset;     // padding before the keys; the first query's place among the keys
  int64_t prefix;            // keys that all queries see
};

struct Attention {
  Heads query, key, value;
  int64_t b, h, hkv, t, s;
  int64_t sequences, max_t, max_s;
  float scale;
  bool causal, bottom_right, interleaved;
  int64_t window_left, window_right;
  const int32_t *prefix, *query_lengths, *key_lengths, *key_start, *cu_q, *cu_k;
  Mask mask;
  const float* table;  // [H, T + S - 1] bias of each distance
  const float* query_scale;
  int64_t query_scale_batch, query_scale_row;
  const float *cos, *sin;
  int64_t half, positions;  // rotated pairs of channels, rows of cos
  Positions query_positions, key_positions;
  double dropout_p;
  uint64_t seed;

  int64_t group() const { return h / hkv; }
  // A job is a sequence's key head. Neighbours differ in the sequence, so that long and short ones mix among threads.
  int64_t jobs() const { return sequences * hkv; }
  Sequence sequence_of(int64_t job) const { return sequence(job % sequences); }
  int64_t key_head(int64_t job) const { return job / sequences; }
  int64_t table_size() const { return std::max<int64_t>(t + s - 1, 0); }
  int64_t table_zero() const { return std::max<int64_t>((bottom_right ? s : t) - 1, 0); }
  // Whether some rows of the output belong to no sequence.
  bool has_other_rows() const { return cu_q || query_lengths; }

  Sequence sequence(int64_t n) const {
    Sequence at{n, cu_q ? 0 : n, 0, t, 0, s, 0, 0, 0};
    if (cu_q) {
      at.row0 = std::clamp<int64_t>(cu_q[n], 0, t);
      at.rows = std::clamp<int64_t>(cu_q[n + 1], at.row0, t) - at.row0;
      at.column0 = std::clamp<int64_t>(cu_k[n], 0, s);
      at.columns = std::clamp<int64_t>(cu_k[n + 1], at.column0, s) - at.column0;
    }
    if (query_lengths) at.rows = std::clamp<int64_t>(query_lengths[n], 0, t);
    if (key_lengths) at.columns = std::clamp<int64_t>(key_lengths[n], 0, s);
    if (key_start) at.start = std::clamp<int64_t>(key_start[n], 0, at.columns);
    if (prefix) at.prefix = prefix[n];
    if (bottom_right) at.offset = at.columns - at.rows;
    return at;
  }

  // The keys [first, end) of query i.
  int64_t first(const Sequence& at, int64_t i) const {
    const int64_t first = window_left < 0 ? at.start : std::max(at.start, i + at.offset - window_left);
    return std::min(first, at.columns);
  }
  int64_t end(const Sequence& at, int64_t i) const {
    int64_t end = at.columns;
    if (causal) end = std::min(end, std::max(i + at.offset + 1, at.prefix));
    if (window_right >= 0) end = std::min(end, i + at.offset + window_right + 1);
    return std::max<int64_t>(end, 0);
  }

  float scale_of(const Sequence& at, int64_t i) const {
    if (!query_scale) return scale;
    return scale * query_scale[at.b * query_scale_batch + (at.row0 + i) * query_scale_row];
  }

  // Rotary embedding of one row of floats, by `sign` = -1 its inverse.
  void rotate(float* row, int64_t position, float sign) const {
    position = std::clamp<int64_t>(position, 0, positions - 1);
    const float *c = cos + position * half, *s = sin + position * half;
    const int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
      const float x = row[i * step], y = row[i * step + other];
      row[i * step] = x * c[i] - sign * y * s[i];
      row[i * step + other] = sign * x * s[i] + y * c[i];
    }
  }
  void rotate_query(const Sequence& at, int64_t i, float* row, float sign = 1) const {
    if (!half) return;
    const int64_t position =
        query_positions ? query_positions.at(at.b, at.row0 + i) : i + std::max<int64_t>(at.offset, 0);
    rotate(row, position, sign);
  }
  void rotate_key(const Sequence& at, int64_t j, float* row, float sign = 1) const {
    if (!half) return;
    const int64_t position =
        key_positions ? key_positions.at(at.b, at.column0 + j) : j + std::max<int64_t>(-at.offset, 0);
    rotate(row, position, sign);
  }

  // Row i of head h as a factor of scores: rotated, times scale.
  void read_query(const Sequence& at, int64_t h, int64_t i, float* to) const {
    query.read(at.b, h, at.row0 + i, to);
    rotate_query(at, i, to);
    const Vec factor = splat(scale_of(at, i));
    for (int64_t j = 0; j < query.width(); j += kLanes) store(to + j, load(to + j) * factor);
  }

  // Rows [c0, c0 + kKeyBlock) of key head h; keys are rotated, padding is 0.
  void read_keys(const Sequence& at, int64_t h, int64_t c0, float* to) const {
    read_block(at, key, h, c0, to);
    for (int64_t j = std::max(c0, at.start); j < std::min(c0 + kKeyBlock, at.columns); ++j) {
      rotate_key(at, j, to + (j - c0) * key.width());
    }
  }
  void read_values(const Sequence& at, int64_t h, int64_t c0, float* to) const { read_block(at, value, h, c0, to); }

 private:
  static void read_block(const Sequence& at, const Heads& heads, int64_t h, int64_t c0, float* to) {
    for (int64_t j = c0; j < c0 + kKeyBlock; ++j, to += heads.width()) {
      if (j < at.start || j >= at.columns) {
        std::fill_n(to, heads.width(), 0.0f);
      } else {
        heads.read(at.b, h, at.column0 + j, to);
      }
    }
  }
};

// Whether all of `count` floats, a multiple of kLanes, are finite.
inline bool all_finite(const float* data, int64_t count) {
  Vec differences{};
  for (int64_t j = 0; j < count; j += kLanes) differences += load(data + j) - load(data + j);
  return horizontal_sum(differences) == 0;
}

// The blocks of keys that the rows [r0, r1) see any of: [first, last).
struct Blocks {
  int64_t first, last;
};
inline Blocks blocks_of(const Attention& a, const Sequence& at, int64_t r0, int64_t r1) {
  if (r0 >= r1) return {0, 0};
  const int64_t first = a.first(at, r0) / kKeyBlock, end = a.end(at, r1 - 1);
  return {first, std::max(first, (end + kKeyBlock - 1) / kKeyBlock)};
}

// c (+)= a·b for `columns` columns of a row-major b, leaving out zeros of a: 0 · NaN must not reach a row that attends
// to no NaN.
inline void multiply_skipping_zeros(int64_t rows, int64_t columns, int64_t k, Left a, Right b, float* c,
                                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const float left = a.data[i * a.row_step + j * a.k_step];
      if (left == 0) continue;
      for (int64_t n = 0; n < columns; n += kLanes) {
        store(c + i * stride + n, load(c + i * stride + n) + left * load(b.data + j * b.step + n));
      }
    }
  }
}

}  // namespace fastmix
