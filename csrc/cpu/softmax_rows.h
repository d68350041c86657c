// Softmax of many short rows: kLanes rows side by side in the lanes.
#pragma once

#include <algorithm>

#include "cpu/lanes.h"
#include "cpu/log_sum_exp.h"

namespace fastmix {

// out[r] ← softmax(logits[r]) of `rows` rows of `size` values, `stride` floats apart, 0 beyond `size`; stride is a
// multiple of kLanes. columns: room for stride·kLanes floats.
template <typename T>
void softmax_rows(const T* logits, int64_t rows, int64_t size, float* out, int64_t stride, float* columns) {
  constexpr float kLog2e = 1.44269504f;
  const int64_t total = rows * size;
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, rows - first);
    Vec block[kLanes] = {};
    Vec largest = Vec{} - kInfinity;
    for (int64_t k = 0; k < size; k += kLanes) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * size + k;  // what follows the row is not used
        block[i] = load_lanes(logits + at, std::min<int64_t>(kLanes, total - at));
      }
      transpose(block);
      for (int64_t j = 0; j < std::min<int64_t>(kLanes, size - k); ++j) {
        largest = block[j] > largest ? block[j] : largest;
        store(columns + (k + j) * kLanes, block[j]);
      }
    }
    Vec sum = {};
    for (int64_t k = 0; k < size; ++k) {
      const Vec power = exp2_nonpositive((load(columns + k * kLanes) - largest) * kLog2e);
      sum += power;
      store(columns + k * kLanes, power);
    }
    for (int64_t k = 0; k < stride; k += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) block[j] = k + j < size ? load(columns + (k + j) * kLanes) / sum : Vec{};
      transpose(block);
      for (int64_t i = 0; i < count; ++i) store(out + (first + i) * stride + k, block[i]);
    }
  }
}

}  // namespace fastmix
