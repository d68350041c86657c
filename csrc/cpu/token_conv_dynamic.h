// Convolution with weights that each token has of its own (dynamic): a weight is one number for a head's channels,
// which lie in the lanes. The weights of a chunk are softmax(kernel) in float, [tokens, heads, weight stride]; the
// backward computes them again.
#pragma once

#include "cpu/softmax_rows.h"
#include "cpu/token_conv_shared.h"

namespace fastmix {

struct DynamicShape : ConvShape {
  int64_t head_channels() const { return channels / heads; }
  int64_t padded_taps() const { return round_up(taps, kLanes); }
  int64_t token_weights() const { return heads * padded_taps(); }
  // Of the tokens whose windows reach the chunk.
  int64_t weight_rows() const { return chunk + std::min(taps, tokens + chunk); }
  // Whole heads go through together.
  int64_t window_stride() const { return std::max(kPanel, round_up(head_channels(), kLanes)) + kStride - kPanel; }
  // A unit's working memory in floats: windows of x and dy, weights, their columns, the gradient of a row of them.
  int64_t windows() const { return 2 * window_rows() * window_stride(); }
  int64_t columns() const { return padded_taps() * kLanes; }
  int64_t scratch() const { return windows() + columns() + columns() + kLanes + weight_rows() * token_weights(); }
};

// weights ← of the tokens [first, first + rows), 0 outside of the sequence.
template <typename T>
void chunk_weights(const DynamicShape& f, const T* kernel, int64_t first, int64_t rows, float* weights,
                   float* columns) {
  const int64_t begin = std::max<int64_t>(first, 0), end = std::max(begin, std::min(first + rows, f.tokens));
  const int64_t size = f.token_weights();
  std::fill(weights, weights + (begin - first) * size, 0.0f);
  softmax_rows(kernel + begin * f.heads * f.taps, (end - begin) * f.heads, f.taps, weights + (begin - first) * size,
               f.padded_taps(), columns);
  std::fill(weights + (end - first) * size, weights + rows * size, 0.0f);
}

// body(panel, its first head)
template <typename Body>
void for_panels(const DynamicShape& f, const Body& body) {
  const int64_t width = f.head_channels(), heads = std::max<int64_t>(1, kPanel / round_up(width, kLanes));
  for (int64_t head = 0; head < f.heads; head += heads) {
    body(Panel{head * width, std::min(heads, f.heads - head), width}, head);
  }
}

template <typename T>
void dynamic_unit(const DynamicShape& f, const Samples<const T>& x, const T* kernel, const Samples<T>& y, int64_t unit,
                  float* window) {
  const int64_t start = f.start(unit), count = f.length(unit), stride = f.window_stride();
  const TapRange taps(f.taps, f.before, f.tokens, start, count);
  const Sequence<const T> in = x.of(f, unit);
  const Sequence<T> out = y.of(f, unit);
  float* columns = window + f.windows();
  float* weights = columns + f.columns();
  const T* sample_kernel = kernel + unit / f.chunks() * f.tokens * f.heads * f.taps;
  chunk_weights(f, sample_kernel, start, count, weights, columns);
  for_panels(f, [&](Panel panel, int64_t head) {
    pack_window(in, taps.first, count + taps.size() - 1, panel, window, stride);
    for (int64_t s = 0; s < count; ++s) {
      const float* of_token = weights + s * f.token_weights() + head * f.padded_taps() + taps.begin;
      T* target = out.data + (start + s) * out.stride + panel.channel;
      for (int64_t g = 0; g < panel.groups; ++g) {
        weighted_row(of_token + g * f.padded_taps(), 1, window + s * stride + g * panel.padded(), stride, taps.size(),
                     panel.width, target + g * panel.width);
      }
    }
  });
}

// dweights[k] = Σ_c grad[c]·window[k][c] for one token and head; written up to a multiple of kLanes.
inline void tap_gradients(const float* grad, const float* window, int64_t stride, int64_t count, int64_t vectors,
                          float* dweights) {
  for (int64_t k = 0; k < count; k += kLanes, window += kLanes * stride) {
    Vec sums[kLanes] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec g = load(grad + v * kLanes);
      for (int i = 0; i < kLanes; ++i) sums[i] += g * load(window + i * stride + v * kLanes);
    }
    transpose(sums);
    Vec total = sums[0];
    for (int i = 1; i < kLanes; ++i) total += sums[i];
    store(dweights + k, total);
  }
}

// dkernel = w ⊙ (dw − Σ_k w·dw) of one row, padded with 0 like w. `room` elements from there on may be overwritten,
// being written later: whole vectors take a tenth of a short row's time.
template <typename T>
void softmax_row_bwd(const float* weights, const float* dweights, int64_t size, T* dkernel, int64_t room) {
  Vec products = {};
  for (int64_t k = 0; k < size; k += kLanes) products += load(weights + k) * load(dweights + k);
  float dot = 0;
  for (int i = 0; i < kLanes; ++i) dot += products[i];
  for (int64_t k = 0; k < size; k += kLanes) {
    const Vec gradient = load(weights + k) * (load(dweights + k) - dot);
    room - k >= kLanes ? store(dkernel + k, gradient) : store_first(dkernel + k, gradient, size - k);
  }
}

template <typename T>
void dynamic_unit_bwd(const DynamicShape& f, const Samples<const T>& dy, const Samples<const T>& x, const T* kernel,
                      const Samples<T>& dx, T* dkernel, int64_t unit, float* window) {
  const int64_t start = f.start(unit), count = f.length(unit), stride = f.window_stride();
  const TapRange taps(f.taps, f.before, f.tokens, start, count), flipped(f.taps, f.after(), f.tokens, start, count);
  const Sequence<const T> grad = dy.of(f, unit), in = x.of(f, unit);
  const Sequence<T> out = dx.of(f, unit);
  float* grad_window = window + f.window_rows() * stride;
  float* columns = window + f.windows();
  float* dweights = columns + f.columns();
  float* weights = dweights + f.columns() + kLanes;
  const int64_t of_sample = unit / f.chunks() * f.tokens * f.heads * f.taps, own = start - flipped.first;
  chunk_weights(f, kernel + of_sample, flipped.first, count + flipped.size() - 1, weights, columns);
  std::fill(dweights, dweights + f.taps, 0.0f);
  for_panels(f, [&](Panel panel, int64_t first_head) {
    pack_window(grad, flipped.first, count + flipped.size() - 1, panel, grad_window, stride);
    pack_window(in, taps.first, count + round_up(taps.size(), kLanes) - 1, panel, window, stride);
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t g = 0; g < panel.groups; ++g) {
        const int64_t head = first_head + g, column = g * panel.padded();
        const float* of_head = weights + head * f.padded_taps();
        // Token start + s is tap K − 1 − j of the token at row s + j.
        weighted_row(of_head + s * f.token_weights() + f.taps - 1 - flipped.begin, f.token_weights() - 1,
                     grad_window + s * stride + column, stride, flipped.size(), panel.width,
                     out.data + (start + s) * out.stride + panel.channel + g * panel.width);
        tap_gradients(grad_window + (own + s) * stride + column, window + s * stride + column, stride, taps.size(),
                      panel.vectors(), dweights + taps.begin);
        // The last taps' lanes have products with rows beyond the window.
        std::fill(dweights + taps.end, dweights + f.padded_taps(), 0.0f);
        softmax_row_bwd(of_head + (own + s) * f.token_weights(), dweights, f.taps,
                        dkernel + of_sample + ((start + s) * f.heads + head) * f.taps, (panel.groups - g) * f.taps);
      }
    }
  });
}

}  // namespace fastmix
