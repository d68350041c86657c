// log Σ exp of a row in one pass over memory: blocks that stay in the cache, each relative to the largest value so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace fastmix {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// As many 32-bit integers as a vector of so many bytes has; unsigned, whose overflow is defined.
template <size_t bytes>
struct Bits {
  typedef uint32_t type __attribute__((vector_size(bytes)));
};

// 2^t for t ≤ 0 in any vector of floats, relative error 8e-8; 0 below 2^-125, and NaN stays.
template <typename V>
inline V exp2_nonpositive(V t) {
  using U = typename Bits<sizeof(V)>::type;
  const V shift = V{} + 12582912.0f;  // 1.5 · 2^23 rounds to an integer
  const V rounded = t + shift;
  const V r = t - (rounded - shift);
  V p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332548e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
  const U exponent = (reinterpret_cast<U>(rounded) << 23) + (127u << 23);
  return t < -125.0f ? V{} : p * reinterpret_cast<V>(exponent);
}

inline float horizontal_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = std::max(best, v[i]);
  return best;
}

struct LogSumExp {
  static constexpr int64_t kPart = 256;

  float max = -kInfinity;  // NaN may be missed here, never in the value
  double sum = 0;          // Σ exp(x − max)

  float value() const { return sum == 0 ? -kInfinity : static_cast<float>(max + std::log(sum)); }

  // Also leaves the largest value of every kPart ones in `maxima`, unless null.
  template <typename T>
  void add(const T* row, int64_t count, float* maxima) {
    constexpr int64_t kBlock = 4 * kPart;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, count);
      float largest = -kInfinity;
      for (int64_t part = begin; part < end; part += kPart) {
        const float of_part = part_max(row + part, std::min(kPart, end - part));
        largest = std::max(largest, of_part);
        if (maxima) *maxima++ = of_part;
      }
      add_block(row + begin, end - begin, largest);
    }
  }

 private:
  // The values behind the last whole vector; what it lacks counts as −inf.
  template <typename T>
  static Vec last_vector(const T* row, int64_t count) {
    const int64_t whole = count / kLanes * kLanes;
    Vec rest = Vec{} - kInfinity;
    for (int64_t i = whole; i < count; ++i) rest[i - whole] = static_cast<float>(row[i]);
    return rest;
  }

  template <typename T>
  static float part_max(const T* row, int64_t count) {
    const int64_t whole = count / kLanes * kLanes;
    const Vec rest = last_vector(row, count);
    Vec best[4] = {rest, rest, rest, rest};
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        const Vec x = load(row + i + j * kLanes);
        best[j] = x > best[j] ? x : best[j];
      }
    }
    for (; i < whole; i += kLanes) {
      const Vec x = load(row + i);
      best[0] = x > best[0] ? x : best[0];
    }
    for (int j = 1; j < 4; ++j) best[0] = best[j] > best[0] ? best[j] : best[0];
    return horizontal_max(best[0]);
  }

  template <typename T>
  void add_block(const T* row, int64_t count, float largest) {
    if (largest > max) {
      sum *= std::exp(static_cast<double>(max) - largest);
      max = largest;
    }
    // Nothing but −inf so far adds 0; a NaN among them must still show.
    const float base = max == -kInfinity ? 0.0f : max;
    constexpr float kLog2e = 1.44269504f;
    const auto term = [base](Vec x) { return exp2_nonpositive((x - base) * kLog2e); };
    const int64_t whole = count / kLanes * kLanes;
    Vec sums[4] = {count > whole ? term(last_vector(row, count)) : Vec{}, Vec{}, Vec{}, Vec{}};
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) sums[j] += term(load(row + i + j * kLanes));
    }
    for (; i < whole; i += kLanes) sums[0] += term(load(row + i));
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  }
};

}  // namespace fastmix
