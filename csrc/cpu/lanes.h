// Loads and stores of up to kLanes elements, forwards and mirrored: index −i mod n, as a DFT of real data needs it.
#pragma once

#include <algorithm>

#include "common/simd.h"

namespace fastmix {

inline constexpr int kColumns = 2 * kLanes;  // real columns that one complex transform in the lanes carries

// Elements to transform, some 120 µs of work, for which waking a sleeping thread pays.
inline constexpr int64_t kGrainElements = 131072;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int64_t mirrored(int64_t index, int64_t n) { return index == 0 ? 0 : n - index; }

// How many of `columns` columns lie in the first (part 0) or second (part 1) kLanes of a block.
inline int64_t lanes_of(int64_t columns, int64_t part) {
  return std::min<int64_t>(std::max<int64_t>(columns - part * kLanes, 0), kLanes);
}

// Lanes i ← p[i], i < count ≤ kLanes; the others 0.
template <typename T>
Vec load_lanes(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}

template <typename T>
void store_lanes(T* p, Vec v, int64_t count) {
  count == kLanes ? store(p, v) : store_first(p, v, count);
}

inline float horizontal_sum(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Lanes i ← p[−(start + i) mod n].
template <typename T>
Vec load_mirrored(const T* p, int64_t start, int64_t n, int64_t count) {
  if (start > 0 && count == kLanes) return reverse(load(p + n - start - kLanes + 1));
  T values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[mirrored(start + i, n)];
  return load(values);
}

template <typename T>
void store_mirrored(T* p, Vec v, int64_t start, int64_t n, int64_t count) {
  if (start > 0 && count == kLanes) return store(p + n - start - kLanes + 1, reverse(v));
  T values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) p[mirrored(start + i, n)] = values[i];
}

}  // namespace fastmix
