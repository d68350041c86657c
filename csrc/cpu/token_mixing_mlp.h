// y = residual + scale ⊙ (w2·act(w1·U + b1) + b2), U = norm(x), one panel of channels of one sample at a time: U and
// the hidden [D, kPanelColumns] stay in the cache. Sums in float32.
//
// Backward, with pre = w1·U + b1 kept by the forward (float32) or made again (halves; keeping it rounded would cost
// accuracy, and in float32 memory): G = w2ᵀ·dy, dpre = scale ⊙ G ⊙ act′, dU = w1ᵀ·dpre, dw1 = Σ dpre·Uᵀ,
// dw2ᵀ = Σ (scale ⊙ h)·dyᵀ, dscale = Σ_d h ⊙ G + Σ_s b2·dy.
#pragma once

#include <array>

#include "cpu/activation.h"
#include "cpu/token_backward.h"

namespace fastmix {

template <typename T>
struct TokenMlp {
  TokenNorm<T> norm;
  int64_t d, s_out;
  const float *w1, *w2;  // [D, S], [S_out, D]
  const float* b1;       // or null
  TokenOutput<T> output;
  Tokens<float> pre;  // [B, D, C], or null

  int64_t scratch_size() const { return kPanelColumns * (norm.s + d + kTileRows + 1); }

  template <Activation kind>
  void panel(int64_t sample, int64_t first, float* scratch) const {
    const int64_t s = norm.s, count = std::min(kPanelColumns, norm.c - first);
    float *u = scratch, *hidden = u + s * kPanelColumns, *tile = hidden + d * kPanelColumns;
    norm.load_panel(sample, first, count, u, tile + kTileRows * kPanelColumns);
    for_tiles(d, count, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
      float* h = hidden + row * kPanelColumns + column;
      multiply_tile(rows, columns, s, Left{w1, s, 1}.from(row), Right{u, kPanelColumns}.from(column), h, kPanelColumns);
      for (int64_t i = row; i < row + rows; ++i, h += kPanelColumns) {
        const float bias = b1 ? b1[i] : 0;
        for_vectors(columns, [&](int64_t j, int64_t lanes) {
          const Vec value = load(h + j) + bias;
          if (pre.p) store_lanes(pre.row(sample, i) + first + column + j, value, lanes);
          store(h + j, activate<kind>(value).value);
        });
      }
    });
    for_tiles(s_out, count, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
      const Right right{hidden, kPanelColumns};
      multiply_tile(rows, columns, d, Left{w2, d, 1}.from(row), right.from(column), tile, kPanelColumns);
      for (int64_t i = 0; i < rows; ++i) {
        output.write(sample, row + i, first + column, columns, tile + i * kPanelColumns, output.bias);
      }
    });
  }
};

// An item's sums of parameter gradients; null where there is no such parameter.
struct TokenMlpSums {
  int64_t s_stride, s_out_stride;
  float *dw1, *dw2t, *db1, *db2, *dscale, *dnorm_weight, *dnorm_bias;
};

template <typename T>
struct TokenMlpBackward {
  TokenNormBackward<T> norm;
  int64_t d, s_out;
  const float *w1t, *w2t;        // [S, D], [D, S_out]
  const float* w1;               // [D, S], where pre is made again
  const float *b1, *b2, *scale;  // or null
  const T* dy;                   // [B, S_out, C]
  const float* pre;              // [B, D, C], or null
  bool input_grad, parameter_grads;

  // In floats; pieces: where they begin, dy, dpre, dU, x, the hidden, three rows, and the right operands Uᵀ and dyᵀ.
  int64_t carve(float* scratch, std::array<float*, 8>& pieces) const {
    const int64_t s = norm.norm.s;
    Carver carver(scratch);
    int i = 0;
    for (const int64_t rows : {s_out, d, s, s, d, int64_t{3}}) pieces[i++] = carver.take(rows * kPanelColumns);
    pieces[i++] = carver.take(groups_size(s, kPanelColumns), parameter_grads);
    pieces[i++] = carver.take(groups_size(s_out, kPanelColumns), parameter_grads);
    return carver.used();
  }

  template <Activation kind>
  void panel(int64_t sample, int64_t slot, int64_t first, const TokenMlpSums& sums, float* scratch) const {
    const int64_t s = norm.norm.s, count = std::min(kPanelColumns, norm.norm.c - first);
    std::array<float*, 8> pieces;
    carve(scratch, pieces);
    auto [grad, dpre, du, x, hidden, rows, x_groups, grad_groups] = pieces;
    float* column_scale = rows + 2 * kPanelColumns;
    load_gradient(sample, first, count, grad, sums, rows);
    if (!pre) {
      norm.norm.load_panel(sample, first, count, x, column_scale);
      multiply(d, count, s, {w1, s, 1}, {x, kPanelColumns}, hidden, kPanelColumns);
    }
    multiply(d, count, s_out, {w2t, s_out, 1}, {grad, kPanelColumns}, dpre, kPanelColumns);
    activate_rows<kind>(sample, first, count, dpre, hidden, sums, rows);
    const bool du_wanted = input_grad || sums.dnorm_weight || sums.dnorm_bias;
    if (du_wanted) multiply(s, count, d, {w1t, d, 1}, {dpre, kPanelColumns}, du, kPanelColumns);
    norm.norm.standardise(sample, first, count, x, column_scale);
    if (du_wanted) {
      norm.finish_panel(sample, slot, first, count, du, x, column_scale, sums.dnorm_weight, sums.dnorm_bias);
    }
    if (!parameter_grads) return;
    norm.norm.scale_and_shift(first, count, x);
    pack_columns(x, kPanelColumns, count, s, x_groups);
    pack_columns(grad, kPanelColumns, count, s_out, grad_groups);
    multiply_groups(d, s, count, {dpre, kPanelColumns, 1}, x_groups, sums.dw1, sums.s_stride);
    multiply_groups(d, s_out, count, {hidden, kPanelColumns, 1}, grad_groups, sums.dw2t, sums.s_out_stride);
  }

 private:
  // grad ← dy; adds up db2 and b2's part of dscale. part: a row.
  void load_gradient(int64_t sample, int64_t first, int64_t count, float* grad, const TokenMlpSums& sums,
                     float* part) const {
    ChannelSums dscale(sums.dscale && b2 ? sums.dscale + first : nullptr, part, count);
    for (int64_t token = 0; token < s_out; ++token) {
      const T* row = dy + (sample * s_out + token) * norm.norm.c + first;
      Vec sum{};
      for_vectors(count, [&](int64_t i, int64_t lanes) {
        const Vec value = load_lanes(row + i, lanes);
        store(grad + token * kPanelColumns + i, value);
        sum += scale ? value * load_lanes(scale + first + i, lanes) : value;
        if (dscale) dscale.add(i, value * b2[token]);
      });
      dscale.end_row();
      if (sums.db2) sums.db2[token] += horizontal_sum(sum);
    }
  }

  // dpre ← scale ⊙ dpre ⊙ act′, hidden ← scale ⊙ act; adds up db1 and the hidden's part of dscale. part: a row.
  template <Activation kind>
  void activate_rows(int64_t sample, int64_t first, int64_t count, float* dpre, float* hidden, const TokenMlpSums& sums,
                     float* part) const {
    ChannelSums dscale(sums.dscale ? sums.dscale + first : nullptr, part, count);
    for (int64_t row = 0; row < d; ++row) {
      float *g = dpre + row * kPanelColumns, *h = hidden + row * kPanelColumns;
      const float* from = pre ? pre + (sample * d + row) * norm.norm.c + first : h;
      const float bias = pre || !b1 ? 0 : b1[row];
      Vec sum{};
      for_vectors(count, [&](int64_t i, int64_t lanes) {
        const ValueAndSlope activated = activate<kind>(load_lanes(from + i, lanes) + bias);
        const Vec factor = scale ? load_lanes(scale + first + i, lanes) : splat(1), gradient = load(g + i);
        if (dscale) dscale.add(i, gradient * activated.value);
        const Vec value = factor * gradient * activated.slope;
        sum += value;
        store(g + i, value);
        store(h + i, factor * activated.value);
      });
      dscale.end_row();
      if (sums.db1) sums.db1[row] += horizontal_sum(sum);
    }
  }
};

}  // namespace fastmix
