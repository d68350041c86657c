// log Σ exp of a row in one pass over memory: blocks that stay in the cache, each relative to the largest value so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace fastmix {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^t for t ≤ 0, relative error 2e-7; 0 below 2^-125, and NaN stays.
inline Vec exp2_nonpositive(Vec t) {
  const Vec shift = Vec{} + 12582912.0f;  // 1.5 · 2^23 rounds to an integer
  const Vec rounded = t + shift;
  const Vec r = t - (rounded - shift);
  Vec p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332548e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
  const UVec exponent = (reinterpret_cast<UVec>(rounded) << 23) + (127u << 23);
  return t < -125.0f ? Vec{} : p * reinterpret_cast<Vec>(exponent);
}

inline float horizontal_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = std::max(best, v[i]);
  return best;
}

struct LogSumExp {
  float max = -kInfinity;  // NaN may be missed here, never in the value
  double sum = 0;          // Σ exp(x − max)

  float value() const { return sum == 0 ? -kInfinity : static_cast<float>(max + std::log(sum)); }

  template <typename T>
  void add(const T* row, int64_t count) {
    constexpr int64_t kBlock = 1024;
    for (int64_t begin = 0; begin < count; begin += kBlock) add_block(row + begin, std::min(kBlock, count - begin));
  }

 private:
  template <typename T>
  void add_block(const T* row, int64_t count) {
    const int64_t whole = count / kLanes * kLanes;
    // What a short last vector lacks counts as −inf.
    Vec rest = Vec{} - kInfinity;
    for (int64_t i = whole; i < count; ++i) rest[i - whole] = static_cast<float>(row[i]);
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
    float largest = -kInfinity;
    for (const Vec& lanes : best) largest = std::max(largest, horizontal_max(lanes));
    if (largest > max) {
      sum *= std::exp(static_cast<double>(max) - largest);
      max = largest;
    }
    // Nothing but −inf so far adds 0; a NaN among them must still show.
    const float base = max == -kInfinity ? 0.0f : max;
    constexpr float kLog2e = 1.44269504f;
    const auto term = [base](Vec x) { return exp2_nonpositive((x - base) * kLog2e); };
    Vec sums[4] = {count > whole ? term(rest) : Vec{}, Vec{}, Vec{}, Vec{}};
    for (i = 0; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) sums[j] += term(load(row + i + j * kLanes));
    }
    for (; i < whole; i += kLanes) sums[0] += term(load(row + i));
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  }
};

}  // namespace fastmix
