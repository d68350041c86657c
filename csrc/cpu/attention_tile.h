// What happens to a tile of scores between the products: bias, mask, softmax, dropout.
#pragma once

#include "cpu/attention.h"
#include "cpu/log_sum_exp.h"
#include "cpu/philox.h"

namespace fastmix {

inline constexpr float kLog2e = 1.44269504f;

// Queries [r0, r0 + rows) of head h by keys [c0, c0 + columns) of a sequence. Rows of scores lie kScoreStride apart,
// with room for columns rounded up to kTileLanes.
struct Tile {
  const Attention& a;
  const Sequence& at;
  int64_t h, r0, rows, c0, columns;

  int64_t width() const { return round_up(columns, kTileLanes); }

  // Biases added; what is not attended to, and what lies beyond the columns, becomes -inf.
  void finish_scores(float* scores) const {
    const int64_t last = r0 + rows - 1;
    const bool full = a.first(at, last) <= c0 && a.end(at, r0) >= c0 + width();
    if (full && !a.table && !a.mask) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = r0 + row;
      float* const to = scores + row * kScoreStride;
      const int64_t begin = std::clamp<int64_t>(a.first(at, i) - c0, 0, columns);
      const int64_t end = std::clamp<int64_t>(a.end(at, i) - c0, begin, columns);
      if (a.table) {
        const float* from = a.table + h * a.table_size() + a.table_zero() + c0 - i - at.offset;
        for (int64_t j = begin; j < end; ++j) to[j] += from[j];
      }
      if (a.mask) add_mask(to, i, begin, end);
      std::fill(to, to + begin, -kInfinity);
      std::fill(to + end, to + width(), -kInfinity);
    }
  }

  // factors[0 : kKeyBlock] ← 1/(1 − p) where dropout keeps the weight of query r0 + row, else 0.
  void dropout(int64_t row, float* factors) const {
    const auto threshold = static_cast<uint32_t>(a.dropout_p * 4294967296.0);
    const Vec factor = splat(static_cast<float>(1 / (1 - a.dropout_p)));
    UVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int64_t j = 0; j < kKeyBlock; j += 4 * kLanes) {
      const PhiloxWords words = philox(static_cast<uint32_t>((c0 + j) / 4) + lane, static_cast<uint32_t>(r0 + row),
                                       static_cast<uint32_t>(h), static_cast<uint32_t>(at.number), a.seed);
      Vec kept[4];
      for (int word = 0; word < 4; ++word) kept[word] = words.word[word] >= threshold ? factor : Vec{};
      Vec even[2], odd[2], inside[4];  // words 0 and 2, 1 and 3, all four of a counter side by side
      zip(kept[0], kept[2], even[0], even[1]);
      zip(kept[1], kept[3], odd[0], odd[1]);
      zip(even[0], odd[0], inside[0], inside[1]);
      zip(even[1], odd[1], inside[2], inside[3]);
      for (int i = 0; i < 4; ++i) store(factors + j + i * kLanes, inside[i]);
    }
  }

 private:
  void add_mask(float* to, int64_t i, int64_t begin, int64_t end) const {
    const Mask& mask = a.mask;
    const int64_t base = mask.offset(at.b, h, at.row0 + i, at.column0 + c0);
    if (mask.boolean) {
      const auto* allowed = reinterpret_cast<const uint8_t*>(mask.data) + base;
      for (int64_t j = begin; j < end; ++j) to[j] = allowed[j * mask.column] ? to[j] : -kInfinity;
    } else {
      with_elements(mask.data, mask.type, [&](const auto* bias) {
        bias += base;
        for (int64_t j = begin; j < end; ++j) {
          const float value = static_cast<float>(bias[j * mask.column]);
          to[j] = value == -kInfinity ? -kInfinity : to[j] + value;
        }
      });
    }
  }
};

using detail::TileVec;

inline TileVec load_tile(const float* p) {
  TileVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_tile(float* p, TileVec v) { std::memcpy(p, &v, sizeof(v)); }

// The halves of a vector folded onto each other until one value is left.
template <typename Fold, int... i>
float fold(TileVec v, const Fold& combine, std::integer_sequence<int, i...>) {
  for (int distance = kTileLanes / 2; distance > 0; distance /= 2) {
    v = combine(v, __builtin_shuffle(v, decltype(v < v){(i ^ distance)...}));
  }
  return v[0];
}

// The running softmax of the queries of a tile.
struct RunningSoftmax {
  float max[kRowBlock], sum[kRowBlock], rescale[kRowBlock];

  RunningSoftmax() {
    std::fill_n(max, kRowBlock, -kInfinity);
    std::fill_n(sum, kRowBlock, 0.0f);
  }

  double lse(int64_t i) const { return sum[i] == 0 ? -kInfinity : max[i] + std::log(static_cast<double>(sum[i])); }

  // Scores ← exp(score − max); what row i summed before has to be multiplied by rescale[i].
  void add(const Tile& tile, float* scores) {
    constexpr auto lanes = std::make_integer_sequence<int, kTileLanes>{};
    const int64_t width = tile.width();
    for (int64_t i = 0; i < tile.rows; ++i) {
      const float* row = scores + i * kScoreStride;
      TileVec largest = load_tile(row);
      for (int64_t j = kTileLanes; j < width; j += kTileLanes) {
        const TileVec x = load_tile(row + j);
        largest = x > largest ? x : largest;
      }
      const float of_row = fold(largest, [](TileVec a, TileVec b) { return a > b ? a : b; }, lanes);
      const float before = max[i];
      // Not where it is NaN: the sum will show that.
      if (of_row > before) max[i] = of_row;
      rescale[i] = before == max[i] ? 1.0f : std::exp(before - max[i]);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* const row = scores + i * kScoreStride;
      // Nothing but −inf so far adds 0; a NaN among them must still show.
      const TileVec base = TileVec{} + (max[i] == -kInfinity ? 0.0f : max[i]);
      TileVec total{};
      for (int64_t j = 0; j < width; j += kTileLanes) {
        // The difference first: it is exact for the scores that count.
        const TileVec power = exp2_nonpositive((load_tile(row + j) - base) * kLog2e);
        total += power;
        store_tile(row + j, power);
      }
      sum[i] = sum[i] * rescale[i] + fold(total, [](TileVec a, TileVec b) { return a + b; }, lanes);
    }
  }
};

}  // namespace fastmix
