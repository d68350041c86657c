// log Σ exp in one pass, in float32 relative to the largest value so far.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/beam_search_select.cuh"
#include "cuda/scalar.cuh"

namespace fastmix {

constexpr float kInfinity = __builtin_huge_valf();

// Of x ≤ 0, by the hardware's power of 2; below the smallest normal number it is 0.
__device__ __forceinline__ float exp_fast(float x) {
  x *= 1.44269504f;
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 16 bytes of −inf.
template <typename T>
__device__ __forceinline__ uint4 infinite_vector() {
  const uint32_t word = sizeof(T) == 4 ? 0xFF800000u : std::is_same_v<T, __half> ? 0xFC00FC00u : 0xFF80FF80u;
  return make_uint4(word, word, word, word);
}

// The index-th of `parts` even parts of 0 … whole − 1.
struct Part {
  uint32_t begin, end;
  __device__ Part(uint32_t whole, uint32_t index, uint32_t parts) {
    const uint32_t each = (whole + parts - 1) / parts;
    begin = min(each * index, whole);
    end = min(begin + each, whole);
  }
};

struct LogSum {
  float largest = -kInfinity;  // NaN aside
  float sum = 0.f;             // Σ exp(x − largest)

  // Nothing but −inf so far adds 0; a NaN among them must still show.
  __device__ float base() const { return largest == -kInfinity ? 0.f : largest; }

  __device__ void raise(float to) {
    if (!(to > largest)) return;
    sum *= exp_fast(largest - to);
    largest = to;
  }

  __device__ void add(float x) {
    raise(x);
    sum += exp_fast(x - base());
  }

  __device__ void add(const LogSum& other) {
    raise(other.largest);
    sum += other.sum * exp_fast(other.largest - base());
  }

  // Over each `width` lanes, a power of 2; the result is the first one's. By all lanes of a warp.
  __device__ void reduce_lanes(int width) {
    float most = largest;
    for (int distance = width / 2; distance > 0; distance /= 2) {
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, distance));
    }
    raise(most);
    for (int distance = width / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, distance);
  }

  __device__ float value() const { return largest + logf(sum); }

  // The part of a row that belongs to one of `splits`, by `threads` threads. Whole vectors of 16 bytes are shared out;
  // what is before the first and behind the last is the first split's.
  template <typename T>
  __device__ void add_part(const T* row, uint32_t width, uint32_t split, uint32_t splits, uint32_t thread,
                           uint32_t threads) {
    constexpr uint32_t kWide = 16 / sizeof(T), kLoads = 4;
    const uint32_t misplaced = reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWide;
    const uint32_t head = min(width, (kWide - misplaced) % kWide);
    const uint32_t vectors = (width - head) / kWide, tail = head + vectors * kWide;
    const uint4* data = reinterpret_cast<const uint4*>(row + head);
    const Part part(vectors, split, splits);
    const uint4 nothing = infinite_vector<T>();
    for (uint32_t i = part.begin + thread; i < part.end; i += kLoads * threads) {
      uint4 loaded[kLoads];
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) {
        loaded[j] = i + j * threads < part.end ? __ldg(data + i + j * threads) : nothing;
      }
      float x[kLoads][kWide], most = -kInfinity;
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) {
        Packed<T, kWide> packed;
        memcpy(&packed, &loaded[j], 16);
#pragma unroll
        for (uint32_t e = 0; e < kWide; ++e) {
          x[j][e] = to_float(packed.values[e]);
          most = fmaxf(most, x[j][e]);
        }
      }
      raise(most);
      const float below = base();
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) {
#pragma unroll
        for (uint32_t e = 0; e < kWide; ++e) sum += exp_fast(x[j][e] - below);
      }
    }
    if (split > 0) return;
    for (uint32_t i = thread; i < head + width - tail; i += threads) add(to_float(row[i < head ? i : tail + i - head]));
  }
};

}  // namespace fastmix
