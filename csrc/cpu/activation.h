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

// (1 + erf(x/√2))/2, absolute error 1e-7: z·P(z²)/Q(z²) for |z| = |x|/√2 < 4, and erf is ±1 beyond.
inline Vec normal_cdf(Vec x) {
  const Vec z = x * 0.7071067812f, t = z * z;
  Vec p = t * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * t - 2.10102402082508e-06f;
  p = p * t - 5.69250639462346e-05f;
  p = p * t - 7.34990630326855e-04f;
  p = p * t - 2.95459980854025e-03f;
  p = p * t - 1.60960333262415e-02f;
  Vec q = t * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * t - 1.68282697438203e-03f;
  q = q * t - 7.37332916720468e-03f;
  q = q * t - 1.42647390514189e-02f;
  const Vec erf = z * p / q;
  const Vec limit = z < 0 ? splat(-1) : splat(1);
  return (absolute(z) >= 4.0f ? limit : erf) * 0.5f + 0.5f;
}

// 1/(1 + e^−x) and its derivative, without the cancellation of σ·(1 − σ).
inline ValueAndSlope sigmoid(Vec x) {
  const Vec e = exp_minus(absolute(x)), inverse = 1.0f / (e + 1.0f), small = e * inverse;
  return {x < 0 ? small : inverse, small * inverse};
}

inline ValueAndSlope gelu(Vec x) {
  const Vec cdf = normal_cdf(x), density = exp_minus(x * x * 0.5f) * 0.3989422804f;
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
