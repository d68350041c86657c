// What the token convolutions are made of: windows of a sequence packed as float, and sums of products in registers.
#pragma once

#include <algorithm>

#include "cpu/lanes.h"

namespace fastmix {

inline constexpr int64_t kPanel = 512;           // channels that go through together
inline constexpr int64_t kStride = kPanel + 16;  // floats of a window's row, so that rows share no set of the cache
inline constexpr int kSums = 8;                  // sums of a register tile
inline constexpr int kFactors = 4;               // factors that stay in registers

// One sample's tokens in memory.
template <typename T>
struct Sequence {
  T* data;
  int64_t stride, count;
};

// Neighbouring channels in groups of `width`; in a window each group starts with a whole vector.
struct Panel {
  int64_t channel, groups, width;
  int64_t vectors() const { return (width + kLanes - 1) / kLanes; }
  int64_t padded() const { return vectors() * kLanes; }
};

// The taps of [0, taps) that reach the sequence from one of the tokens [start, start + count), where tap k of token s
// is at s + k − before; `first` is the token that the first of them reaches from `start`.
struct TapRange {
  int64_t begin, end, first;
  TapRange(int64_t taps, int64_t before, int64_t tokens, int64_t start, int64_t count)
      : begin(std::max<int64_t>(0, before - (start + count - 1))),
        end(std::min(taps, tokens + before - start)),
        first(start + begin - before) {}
  int64_t size() const { return end - begin; }
};

// window[i] ← token first + i of the panel, 0 outside of the sequence and in the lanes beyond a group.
template <typename T>
void pack_window(const Sequence<const T>& x, int64_t first, int64_t rows, Panel panel, float* window, int64_t stride) {
  const int64_t whole = panel.width / kLanes, rest = panel.width % kLanes;
  for (int64_t i = 0; i < rows; ++i, window += stride) {
    const int64_t token = first + i;
    if (token < 0 || token >= x.count) {
      std::fill(window, window + panel.groups * panel.padded(), 0.0f);
      continue;
    }
    const T* from = x.data + token * x.stride + panel.channel;
    float* to = window;
    for (int64_t group = 0; group < panel.groups; ++group, from += panel.width, to += panel.padded()) {
      for (int64_t v = 0; v < whole; ++v) store(to + v * kLanes, load(from + v * kLanes));
      if (rest > 0) store(to + whole * kLanes, load_first(from + whole * kLanes, rest));
    }
  }
}

// sums[i] += Σ_{j < count} factors[j]·rows[i + j] of one vector's channels, count ≤ kFactors.
template <int count>
inline void add_products(Vec (&sums)[kSums], const float* factors, int64_t stride, const float* rows,
                         int64_t row_stride) {
  Vec factor[count];
  for (int j = 0; j < count; ++j) factor[j] = load(factors + j * stride);
#pragma GCC unroll 16
  for (int i = 0; i < kSums + count - 1; ++i) {
    const Vec value = load(rows + i * row_stride);
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) {
      if (i - j >= 0 && i - j < kSums) sums[i - j] += factor[j] * value;
    }
  }
}

// The same for any count. Factors past the last are not multiplied by 0: a row there may be infinite.
inline void correlate(Vec (&sums)[kSums], const float* factors, int64_t stride, const float* rows, int64_t row_stride,
                      int64_t count) {
  for (; count >= kFactors; count -= kFactors) {
    add_products<kFactors>(sums, factors, stride, rows, row_stride);
    factors += kFactors * stride;
    rows += kFactors * row_stride;
  }
  if (count == 3) add_products<3>(sums, factors, stride, rows, row_stride);
  if (count == 2) add_products<2>(sums, factors, stride, rows, row_stride);
  if (count == 1) add_products<1>(sums, factors, stride, rows, row_stride);
}

// body(i, sums[i]) for i < count, in the common case without a loop: sums stay in registers.
template <typename Body>
inline void for_sums(const Vec (&sums)[kSums], int64_t count, const Body& body) {
  if (count == kSums) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) body(i, sums[i]);
    return;
  }
  float copy[kSums * kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) store(copy + i * kLanes, sums[i]);
  for (int64_t i = 0; i < count; ++i) body(i, load(copy + i * kLanes));
}

// out = Σ_{k < count} weights[k]·window[k] for `vectors` vectors, the last of `last` lanes; both strided.
template <int vectors, typename T>
inline void weighted_sum(const float* weights, int64_t weight_stride, const float* window, int64_t stride,
                         int64_t count, int64_t last, T* out) {
  Vec sums[vectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    const Vec weight = weights[k * weight_stride] - Vec{};
    for (int v = 0; v < vectors; ++v) sums[v] += weight * load(window + k * stride + v * kLanes);
  }
  for (int v = 0; v < vectors - 1; ++v) store(out + v * kLanes, sums[v]);
  store_lanes(out + (vectors - 1) * kLanes, sums[vectors - 1], last);
}

// The same for `width` channels: as many vectors at once as hide the latency of a sum.
template <typename T>
void weighted_row(const float* weights, int64_t weight_stride, const float* window, int64_t stride, int64_t count,
                  int64_t width, T* out) {
  int64_t c = 0;
  const auto step = [&](auto vectors) {
    constexpr int n = decltype(vectors)::value;
    weighted_sum<n>(weights, weight_stride, window + c, stride, count, lanes_of(width - c, n - 1), out + c);
    c += n * kLanes;
  };
  while (width - c > 7 * kLanes) step(std::integral_constant<int, 8>{});
  while (width - c > 3 * kLanes) step(std::integral_constant<int, 4>{});
  while (width - c > 0) step(std::integral_constant<int, 1>{});
}

}  // namespace fastmix
