// The activations of a token-mixing MLP and their derivatives, a vector at a time.
#pragma once

#include "cpu/log_sum_exp.h"

namespace fastmix {

enum class Activation : int64_t { kGelu, kGeluTanh, kRelu, kSilu };

struct ValueAndSlope {
  Vec value, slope;
};

inline Vec absolute(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<UVec>(x) & 0x7fffffffu); }

// e^−x for x ≥ 0
inline Vec exp_minus(Vec x) { return exp2_nonpositive(x * -1.442695041f); }

// 1/(1 + e^−x) and its derivative, without the cancellation of σ·(1 − σ).
inline ValueAndSlope sigmoid(Vec x) {
  const Vec e = exp_minus(absolute(x)), inverse = 1.0f / (e + 1.0f), small = e * inverse;
  return {x < 0 ? small : inverse, small * inverse};
}

// Φ(−|x|) = φ(x)·P(1/(1 + p·|x|)), absolute error 8e-8 (Abramowitz and Stegun 26.2.17); the slope Φ + x·φ needs φ too.
inline ValueAndSlope gelu(Vec x) {
  const Vec density = exp_minus(x * x * 0.5f) * 0.3989422804f, t = 1.0f / (absolute(x) * 0.2316419f + 1.0f);
  Vec p = t * 1.330274429f - 1.821255978f;
  p = p * t + 1.781477937f;
  p = p * t - 0.356563782f;
  p = p * t + 0.319381530f;
  const Vec tail = density * t * p, cdf = x < 0 ? tail : 1.0f - tail;
  return {x * cdf, cdf + x * density};
}

// x·σ(2u), u = √(2/π)·(x + 0.044715·x³)
inline ValueAndSlope gelu_tanh(Vec x) {
  const Vec square = x * x;
  const ValueAndSlope s = sigmoid(x * (square * (1.595769122f * 0.044715f) + 1.595769122f));
  const Vec slope = square * (1.595769122f * 3 * 0.044715f) + 1.595769122f;
  return {x * s.value, s.value + x * s.slope * slope};
}

inline ValueAndSlope silu(Vec x) {
  const ValueAndSlope s = sigmoid(x);
  return {x * s.value, s.value + x * s.slope};
}

template <Activation kind>
ValueAndSlope activate(Vec x) {
  if constexpr (kind == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kind == Activation::kGeluTanh) {
    return gelu_tanh(x);
  } else if constexpr (kind == Activation::kSilu) {
    return silu(x);
  } else {
    return {x < 0 ? Vec{} : x, x > 0 ? splat(1) : Vec{}};  // NaN stays in the value
  }
}

// body(std::integral_constant<Activation, kind>{})
template <typename Body>
void for_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace fastmix
