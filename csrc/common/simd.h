// Vectors of float in GCC/Clang vector extensions: as wide as the instruction level this file is compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace fastmix {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Not 16 under AVX-512: that doubles the working set of a kernel, and was measured slower (docs/decisions.md).
#if defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using UVec = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using HVec = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX2__)  // GCC converts in two halves
  const auto bits = reinterpret_cast<UVec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  HVec half;
  std::memcpy(&half, p, sizeof(half));
  const UVec bits = __builtin_convertvector(half, UVec);
#endif
  return reinterpret_cast<Vec>(bits << 16);
}

inline Vec load(const Half* p) {
#if defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(BFloat16* p, Vec v) {
  // Round to nearest, ties to even; a NaN keeps a set bit in its upper half.
  const UVec bits = reinterpret_cast<UVec>(v);
  const UVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const auto is_nan = v != v;
  const UVec result = is_nan ? (bits | 0x400000) : rounded;
  const HVec half = __builtin_convertvector(result >> 16, HVec);
  std::memcpy(p, &half, sizeof(half));
}

inline void store(Half* p, Vec v) {
#if defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// The first `count` < kLanes elements; the other lanes are 0, and memory beyond is not touched.
template <typename T>
inline Vec load_first(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store_first(T* p, Vec v, int64_t count) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

namespace detail {

template <int... i>
inline Vec reverse(Vec v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (kLanes - 1 - i)...);
}

// Exchanges the off-diagonal d×d blocks of rows a, b (rows i and i + d of a 2d×2d block transpose).
template <int d, int... i>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, i...>) {
  const Vec low = __builtin_shufflevector(a, b, ((i & d) ? kLanes + i - d : i)...);
  const Vec high = __builtin_shufflevector(a, b, ((i & d) ? kLanes + i : i + d)...);
  a = low;
  b = high;
}

template <int... i>
inline void unzip(Vec low, Vec high, Vec& even, Vec& odd, std::integer_sequence<int, i...>) {
  even = __builtin_shufflevector(low, high, (2 * i)...);
  odd = __builtin_shufflevector(low, high, (2 * i + 1)...);
}

template <int... i>
inline void zip(Vec even, Vec odd, Vec& low, Vec& high, std::integer_sequence<int, i...>) {
  low = __builtin_shufflevector(even, odd, (i % 2 * kLanes + i / 2)...);
  high = __builtin_shufflevector(even, odd, (i % 2 * kLanes + (i + kLanes) / 2)...);
}

}  // namespace detail

using LaneSequence = std::make_integer_sequence<int, kLanes>;

inline Vec reverse(Vec v) { return detail::reverse(v, LaneSequence{}); }

// low, high ← even[0], odd[0], even[1], odd[1], …
inline void zip(Vec even, Vec odd, Vec& low, Vec& high) { detail::zip(even, odd, low, high, LaneSequence{}); }

// a, b ← the even and the odd elements of p[0 : 2·kLanes], and back.
inline void load_pairs(const float* p, Vec& a, Vec& b) {
  detail::unzip(load(p), load(p + kLanes), a, b, LaneSequence{});
}
inline void store_pairs(float* p, Vec a, Vec b) {
  Vec low, high;
  zip(a, b, low, high);
  store(p, low);
  store(p + kLanes, high);
}

// Bit i is set where the comparison holds in lane i.
template <typename Mask>
uint32_t lanes_where(Mask mask) {
#if defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
}

// rows[i][j] ↔ rows[j][i]
inline void transpose(Vec (&rows)[kLanes]) {
  const auto stage = [&rows](auto distance) {
    constexpr int d = decltype(distance)::value;
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & d)) detail::exchange<d>(rows[i], rows[i + d], LaneSequence{});
    }
  };
  if constexpr (kLanes == 8) stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 1>{});
}

}  // namespace fastmix
