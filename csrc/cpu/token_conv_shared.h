// Convolution with weights that all tokens share (depthwise, lightweight): channels in the lanes, weights [K, C] float.
// A unit of work is a chunk of one sample's tokens; the backward sums the gradient of the weights over consecutive
// units in float32, in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/token_conv_tiles.h"

namespace fastmix {

struct ConvShape {
  int64_t batch, tokens, channels, heads, taps, before;  // `before`: taps before the token itself
  int64_t chunk;                                         // tokens of a unit
  int64_t after() const { return taps - 1 - before; }
  int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
  int64_t units() const { return batch * chunks(); }
  int64_t start(int64_t unit) const { return unit % chunks() * chunk; }
  int64_t length(int64_t unit) const { return std::min(chunk, tokens - start(unit)); }
  int64_t weight_stride() const { return round_up(channels, kLanes); }
  // Of the taps that can reach the sequence, and the rows that register tiles read past a window's end.
  int64_t window_rows() const { return chunk + std::min(taps, tokens + chunk) + 2 * kSums; }
};

// A tensor [batch, tokens, channels] with contiguous channels.
template <typename T>
struct Samples {
  T* data;
  int64_t batch_stride, token_stride;
  Sequence<T> of(const ConvShape& f, int64_t unit) const {
    return {data + unit / f.chunks() * batch_stride, token_stride, f.tokens};
  }
};

// Asks for a vector's channels of the rows that follow: reading and writing wait for memory longer than products take.
template <typename T>
inline void prefetch_rows(const Sequence<T>& x, int64_t first, int64_t channel, bool write) {
  constexpr int64_t kLine = 64;
  if (channel * static_cast<int64_t>(sizeof(T)) % kLine != 0) return;
  for (int64_t i = 0; i < kSums; ++i) {
    const T* row = x.data + std::clamp<int64_t>(first + i, 0, x.count - 1) * x.stride + channel;
    write ? __builtin_prefetch(row, 1) : __builtin_prefetch(row, 0);
  }
}

// y[s] = Σ_j factors[j]·x[s + j − before] of a chunk's tokens and a panel's channels.
template <typename T>
struct Convolution {
  Sequence<const T> x;
  Sequence<T> y;
  TapRange taps;
  const float* factors;
  int64_t factor_stride, start, count;
  Panel panel;

  // keep: the whole window is packed, for others to use. Else float rows inside of the sequence are read where they
  // are.
  void run(float* window, bool keep) const {
    int64_t packed = 0;
    for (int64_t s = 0; s < count; s += kSums) {
      const int64_t needed = s + kSums + taps.size() - 1;
      if constexpr (std::is_same_v<T, float>) {
        const bool inside = taps.first + s >= 0 && taps.first + needed <= x.count && panel.width % kLanes == 0;
        if (inside && !keep) {
          tile(s, x.data + (taps.first + s) * x.stride + panel.channel, x.stride);
          continue;
        }
      }
      // Not the whole window at once, so that the next rows come while these are multiplied.
      if (!keep) packed = std::max(packed, s);
      pack_window(x, taps.first + packed, needed - packed, panel, window + packed * kStride, kStride);
      packed = needed;
      tile(s, window + s * kStride, kStride);
    }
  }

 private:
  // The tokens from start + s on; rows: what the first of them reaches first, and so on.
  void tile(int64_t s, const float* rows, int64_t row_stride) const {
    const int64_t size = std::min<int64_t>(kSums, count - s), next = taps.first + s + kSums + taps.size() - 1;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      Vec sums[kSums] = {};
      const int64_t channel = panel.channel + v * kLanes, lanes = lanes_of(panel.width, v);
      prefetch_rows(x, next, channel, false);
      prefetch_rows(y, start + s + kSums, channel, true);
      correlate(sums, factors + v * kLanes, factor_stride, rows + v * kLanes, row_stride, taps.size());
      T* out = y.data + (start + s) * y.stride + channel;
      for_sums(sums, size, [&](int64_t i, Vec sum) { store_lanes(out + i * y.stride, sum, lanes); });
    }
  }
};

template <typename T>
void shared_unit(const ConvShape& f, const Samples<const T>& x, const float* weights, const Samples<T>& y, int64_t unit,
                 float* window) {
  const int64_t start = f.start(unit), count = f.length(unit), stride = f.weight_stride();
  const TapRange taps(f.taps, f.before, f.tokens, start, count);
  for (int64_t channel = 0; channel < f.channels; channel += kPanel) {
    const Panel panel{channel, 1, std::min(kPanel, f.channels - channel)};
    const float* factors = weights + taps.begin * stride + channel;
    Convolution<T>{x.of(f, unit), y.of(f, unit), taps, factors, stride, start, count, panel}.run(window, false);
  }
}

// dx of a unit, and its share of dweights [K, weight_stride], added. window: room for two.
template <typename T>
void shared_unit_bwd(const ConvShape& f, const Samples<const T>& dy, const Samples<const T>& x, const float* weights,
                     const Samples<T>& dx, float* dweights, int64_t unit, float* window) {
  const int64_t start = f.start(unit), count = f.length(unit), stride = f.weight_stride();
  const TapRange taps(f.taps, f.before, f.tokens, start, count);
  const TapRange flipped(f.taps, f.after(), f.tokens, start, count);  // dx: the same with the taps the other way round
  float* grad_window = window + f.window_rows() * kStride;
  for (int64_t channel = 0; channel < f.channels; channel += kPanel) {
    const Panel panel{channel, 1, std::min(kPanel, f.channels - channel)};
    const float* factors = weights + (f.taps - 1 - flipped.begin) * stride + channel;
    Convolution<T>{dy.of(f, unit), dx.of(f, unit), flipped, factors, -stride, start, count, panel}.run(grad_window,
                                                                                                       true);
    pack_window(x.of(f, unit), taps.first, count + round_up(taps.size(), kSums) - 1, panel, window, kStride);
    const float* rows = grad_window + (start - flipped.first) * kStride;
    for (int64_t k = 0; k < taps.size(); k += kSums) {
      for (int64_t v = 0; v < panel.vectors(); ++v) {
        Vec sums[kSums] = {};
        correlate(sums, rows + v * kLanes, kStride, window + k * kStride + v * kLanes, kStride, count);
        float* target = dweights + (taps.begin + k) * stride + channel + v * kLanes;
        for_sums(sums, std::min<int64_t>(kSums, taps.size() - k),
                 [&](int64_t i, Vec sum) { store(target + i * stride, load(target + i * stride) + sum); });
      }
    }
  }
}

}  // namespace fastmix
