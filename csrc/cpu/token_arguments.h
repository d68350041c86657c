// The arguments of token_mixing_mlp and token_linear as their kernels take them. Python has checked them for users;
// here nothing may lead out of bounds.
#pragma once

#include <optional>

#include "cpu/token_mixing.h"

namespace fastmix {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// t [B, rows, C] beside x, made contiguous unless its channels are.
inline Tensor tokens_beside(const char* name, const Tensor& t, const Tensor& x, int64_t rows) {
  FASTMIX_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu() && t.dim() == 3 && t.size(0) == x.size(0) &&
                    t.size(1) == rows && t.size(2) == x.size(2),
                name, " must be [B, S_out, C] of x's dtype");
  return t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t);
}

inline OptionalTensor tokens_beside(const char* name, const OptionalTensor& t, const Tensor& x, int64_t rows) {
  return t ? OptionalTensor(tokens_beside(name, *t, x, rows)) : std::nullopt;
}

template <typename T>
Tokens<T> tokens_of(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

template <typename T>
Tokens<T> tokens_of(const OptionalTensor& t) {
  return t ? tokens_of<T>(*t) : Tokens<T>{};
}

inline OptionalTensor vector_of(const char* name, const OptionalTensor& t, int64_t size) {
  if (!t) return std::nullopt;
  FASTMIX_CHECK(t->scalar_type() == torch::headeronly::ScalarType::Float && t->is_cpu() && t->numel() == size, name,
                " must be float32 with ", size, " elements");
  return torch::stable::contiguous(*t);
}

inline const float* floats(const OptionalTensor& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

template <typename T>
T* data_of(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

struct NormArguments {
  Norm kind;
  float eps;
  OptionalTensor weight, bias;

  NormArguments(const Tensor& x, int64_t norm, double eps, const OptionalTensor& weight, const OptionalTensor& bias)
      : kind(static_cast<Norm>(norm)), eps(static_cast<float>(eps)) {
    FASTMIX_CHECK(x.is_cpu() && x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, "x must be [B, S, C] with S, C >= 1");
    FASTMIX_CHECK(norm >= 0 && norm <= 3, "norm must be 0, 1, 2 or 3, got ", norm);
    const int64_t size = x.size(kind == Norm::kTokenLayer ? 1 : 2);
    this->weight = vector_of("norm_weight", weight, size);
    this->bias = vector_of("norm_bias", bias, size);
  }

  template <typename T>
  TokenNorm<T> with(const Tensor& x, float* statistics) const {
    return {kind, eps, x.size(1), x.size(2), floats(weight), floats(bias), tokens_of<const T>(x), statistics};
  }
  int64_t statistics_size(const Tensor& x) const { return kind == Norm::kLayer ? 2 * x.size(0) * x.size(1) : 0; }
};

inline Tensor weight_of(const char* name, const Tensor& w, const Tensor& x, int64_t columns) {
  FASTMIX_CHECK(
      w.scalar_type() == x.scalar_type() && w.is_cpu() && w.dim() >= 2 && w.size(-1) == columns && w.size(-2) > 0, name,
      " must be [rows, ", columns, "] of x's dtype");
  return torch::stable::contiguous(w);
}

// The statistics of LayerNorm over the channels, of all tokens.
template <typename T>
void measure(const TokenNorm<T>& norm, int64_t batch) {
  if (norm.kind != Norm::kLayer) return;
  torch::stable::parallel_for(0, batch * norm.s, std::max<int64_t>(1, kGrainElements / norm.c),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) norm.measure_row(i / norm.s, i % norm.s);
                              });
}

// Floats of working memory that `in_float32` needs.
inline int64_t converted_size(const Tensor& w) {
  return w.scalar_type() == torch::headeronly::ScalarType::Float ? 0 : round_up(w.numel(), kLanes);
}

// A contiguous weight's elements, where they are or converted into `memory`.
template <typename T>
const float* in_float32(const Tensor& w, float* memory) {
  const auto* p = static_cast<const T*>(w.data_ptr());
  if constexpr (std::is_same_v<T, float>) {
    return p;
  } else {
    for_vectors(w.numel(), [&](int64_t i, int64_t lanes) { store(memory + i, load_lanes(p + i, lanes)); });
    return memory;
  }
}

inline auto saved_dtype(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

// What the forward kept, [B, rows, C].
inline Tensor saved_of(const Tensor& saved, const Tensor& x, int64_t rows) {
  FASTMIX_CHECK(
      saved.scalar_type() == saved_dtype(x) && saved.is_cpu() && saved.numel() == x.size(0) * rows * x.size(2),
      "saved must be what the forward kept");
  return torch::stable::contiguous(saved);
}

inline Tensor new_saved(const Tensor& x, int64_t rows, bool wanted) {
  return wanted ? torch::stable::new_empty(x, {x.size(0), rows, x.size(2)}, saved_dtype(x))
                : torch::stable::new_empty(x, {0}, saved_dtype(x));
}

// memory [columns, rows] ← the transposed of a contiguous matrix [rows, columns]: read along its columns where it lies,
// a product would miss the cache at every step.
template <typename T>
const float* transposed_in_float32(const T* p, int64_t rows, int64_t columns, float* memory) {
  const int64_t blocks = (columns + kLanes - 1) / kLanes;
  torch::stable::parallel_for(
      0, blocks, std::max<int64_t>(1, kGrainElements / (rows * kLanes)), [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * kLanes; column < std::min(end * kLanes, columns); column += kLanes) {
          const int64_t width = std::min<int64_t>(kLanes, columns - column);
          for (int64_t row = 0; row < rows; row += kLanes) {
            const int64_t height = std::min<int64_t>(kLanes, rows - row);
            Vec block[kLanes] = {};
            for (int64_t i = 0; i < height; ++i) block[i] = load_lanes(p + (row + i) * columns + column, width);
            transpose(block);
            for (int64_t i = 0; i < width; ++i) store_lanes(memory + (column + i) * rows + row, block[i], height);
          }
        }
      });
  return memory;
}

// The gradients of a backward op: a tensor of no elements where there is none.
inline Tensor like_or_none(const OptionalTensor& t, const Tensor& x, bool wanted) {
  return t && wanted ? torch::stable::new_empty(*t, t->sizes(), t->scalar_type()) : torch::stable::new_empty(x, {0});
}

}  // namespace fastmix
