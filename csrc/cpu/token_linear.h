// y = residual + scale ⊙ gate ⊙ z, z = W·U + bias + added, U = norm(x), one panel of channels of one head of one sample
// at a time. Sums in float32.
//
// Backward, with z kept by the forward where gate or scale need it: g = scale ⊙ gate ⊙ dy is dadded, dU = Wᵀ·g,
// dW = Σ g·Uᵀ, dgate = scale ⊙ dy ⊙ z, dscale = Σ_s dy ⊙ gate ⊙ z.
#pragma once

#include <array>

#include "cpu/token_backward.h"

namespace fastmix {

// Panels of channels that lie within one head.
struct Heads {
  int64_t count, channels;  // channels of one head
  int64_t panels_each() const { return (channels + kPanelColumns - 1) / kPanelColumns; }
  int64_t panels() const { return count * panels_each(); }
  int64_t head(int64_t panel) const { return panel / panels_each(); }
  int64_t first(int64_t panel) const { return head(panel) * channels + panel % panels_each() * kPanelColumns; }
  int64_t size(int64_t panel) const {
    return std::min(kPanelColumns, channels - panel % panels_each() * kPanelColumns);
  }
};

template <typename T>
struct TokenLinear {
  TokenNorm<T> norm;
  Heads heads;
  int64_t s_out;
  const float* w;  // [heads, S_out, S]
  TokenOutput<T> output;

  int64_t scratch_size() const { return kPanelColumns * (norm.s + kTileRows + 1); }

  void panel(int64_t sample, int64_t number, float* scratch) const {
    const int64_t s = norm.s, first = heads.first(number), count = heads.size(number), head = heads.head(number);
    float *u = scratch, *tile = u + s * kPanelColumns;
    norm.load_panel(sample, first, count, u, tile + kTileRows * kPanelColumns);
    const Left left{w + head * s_out * s, s, 1};
    const float* bias = output.bias ? output.bias + head * s_out : nullptr;
    for_tiles(s_out, count, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
      const Right right{u, kPanelColumns};
      multiply_tile(rows, columns, s, left.from(row), right.from(column), tile, kPanelColumns);
      for (int64_t i = 0; i < rows; ++i) {
        output.write(sample, row + i, first + column, columns, tile + i * kPanelColumns, bias);
      }
    });
  }
};

// An item's sums of parameter gradients; null where there is no such parameter.
struct TokenLinearSums {
  int64_t s_stride;
  float *dw, *dbias, *dscale, *dnorm_weight, *dnorm_bias;
};

template <typename T>
struct TokenLinearBackward {
  TokenNormBackward<T> norm;
  Heads heads;
  int64_t s_out;
  const float* wt;     // [heads, S, S_out]
  const float* scale;  // or null
  const T* dy;         // [B, S_out, C]
  Tokens<const T> gate;
  const Saved<T>* z;  // [B, S_out, C], where gate or scale are given
  T *dgate, *dadded;  // [B, S_out, C], or null
  bool input_grad, parameter_grads;

  // In floats; pieces: where they begin, g, dU, x, two rows, and the right operand Uᵀ.
  int64_t carve(float* scratch, std::array<float*, 5>& pieces) const {
    const int64_t s = norm.norm.s;
    Carver carver(scratch);
    int i = 0;
    for (const int64_t rows : {s_out, s, s, int64_t{2}}) pieces[i++] = carver.take(rows * kPanelColumns);
    pieces[i++] = carver.take(groups_size(s, kPanelColumns), parameter_grads);
    return carver.used();
  }

  void panel(int64_t sample, int64_t slot, int64_t number, const TokenLinearSums& sums, float* scratch) const {
    const int64_t s = norm.norm.s, first = heads.first(number), count = heads.size(number), head = heads.head(number);
    std::array<float*, 5> pieces;
    carve(scratch, pieces);
    auto [grad, du, x, rows, x_groups] = pieces;
    float* column_scale = rows + kPanelColumns;
    load_gradient(sample, first, count, grad, sums.dbias ? sums.dbias + head * s_out : nullptr, sums.dscale, rows);
    const bool du_wanted = input_grad || sums.dnorm_weight || sums.dnorm_bias;
    if (du_wanted) {
      multiply(s, count, s_out, {wt + head * s_out * s, s_out, 1}, {grad, kPanelColumns}, du, kPanelColumns);
    }
    norm.norm.standardise(sample, first, count, x, column_scale);
    if (du_wanted) {
      norm.finish_panel(sample, slot, first, count, du, x, column_scale, sums.dnorm_weight, sums.dnorm_bias);
    }
    if (!parameter_grads) return;
    norm.norm.scale_and_shift(first, count, x);
    pack_columns(x, kPanelColumns, count, s, x_groups);
    float* dw = sums.dw + head * s_out * sums.s_stride;
    multiply_groups(s_out, s, count, {grad, kPanelColumns, 1}, x_groups, dw, sums.s_stride);
  }

 private:
  // grad ← scale ⊙ gate ⊙ dy; writes dgate and dadded, adds up dbias and dscale. part: a row.
  void load_gradient(int64_t sample, int64_t first, int64_t count, float* grad, float* dbias, float* of_scale,
                     float* part) const {
    ChannelSums dscale(of_scale ? of_scale + first : nullptr, part, count);
    for (int64_t token = 0; token < s_out; ++token) {
      const int64_t at = (sample * s_out + token) * norm.norm.c + first;
      Vec sum{};
      for_vectors(count, [&](int64_t i, int64_t lanes) {
        const Vec factor = scale ? load_lanes(scale + first + i, lanes) : splat(1);
        Vec value = load_lanes(dy + at + i, lanes);
        if (dgate) store_lanes(dgate + at + i, value * factor * load_lanes(z + at + i, lanes), lanes);
        if (gate.p) value *= load_lanes(gate.row(sample, token) + first + i, lanes);
        if (dscale) dscale.add(i, value * load_lanes(z + at + i, lanes));
        if (scale) value *= factor;
        if (dadded) store_lanes(dadded + at + i, value, lanes);
        store(grad + token * kPanelColumns + i, value);
        sum += value;
      });
      dscale.end_row();
      if (dbias) dbias[token] += horizontal_sum(sum);
    }
  }
};

}  // namespace fastmix
