// What token_mixing_mlp and token_linear share: the end of the forward, and working memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <type_traits>

#include "common/check.h"
#include "cpu/scratch.h"
#include "cpu/token_norm.h"

namespace fastmix {

// What the forward keeps for the backward; float16 could overflow.
template <typename T>
using Saved = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;

// Pieces of work that parallel_for gives a thread at least, some 120 µs of products.
inline int64_t product_grain(double flops) { return std::max<int64_t>(1, static_cast<int64_t>(1.2e7 / (flops + 1))); }

// y = residual + scale ⊙ gate ⊙ (z + bias + added), a row of a tile at a time.
template <typename T>
struct TokenOutput {
  Tokens<T> y;
  Tokens<Saved<T>> saved;  // z + bias + added, or null
  const float* bias;       // per token, or null
  const float* scale;      // per channel, or null
  Tokens<const T> gate, added, residual;

  void write(int64_t sample, int64_t token, int64_t first, int64_t count, const float* z, const float* of_head) const {
    const auto at = [&](const auto& tokens, int64_t i) { return tokens.row(sample, token) + first + i; };
    for_vectors(count, [&](int64_t i, int64_t lanes) {
      Vec value = load(z + i);
      if (of_head) value += of_head[token];
      if (added.p) value += load_lanes(at(added, i), lanes);
      if (saved.p) store_lanes(at(saved, i), value, lanes);
      if (gate.p) value *= load_lanes(at(gate, i), lanes);
      if (scale) value *= load_lanes(scale + first + i, lanes);
      if (residual.p) value += load_lanes(at(residual, i), lanes);
      store_lanes(at(y, i), value, lanes);
    });
  }
};

// Consecutive pieces of one block of floats.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}
  // Null, and nothing taken, if it is not wanted.
  float* take(int64_t count, bool wanted = true) {
    if (!wanted) return nullptr;
    const int64_t at = used_;
    used_ += round_up(count, 16);
    return base_ ? base_ + at : nullptr;
  }
  float* take_like(const torch::stable::Tensor& t) { return take(t.numel(), t.numel() > 0); }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

}  // namespace fastmix
