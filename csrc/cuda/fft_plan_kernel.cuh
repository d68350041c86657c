// The plan of common/fft_plan.h made on the device, for lengths that only the device knows: one block a sample.
// Tables and Bluestein's spectrum are computed in float64 and kept in float32, as on the host.
// A sample's plan lies in the workspace: FftView (64 bytes), scratch, twiddles, spectrum, chirp; see PlanSlot.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "cuda/fft_block.cuh"

namespace fastmix {

// Sizes in floats for lengths up to s. `bound` is a power of two ≥ 2s, so no length ≤ s needs a longer transform.
struct PlanSlot {
  int s, bound;
  __host__ __device__ explicit PlanSlot(int s) : s(s), bound(2) {
    while (bound < 2 * s) bound *= 2;
  }
  __host__ __device__ int64_t scratch() const { return 16; }
  __host__ __device__ int64_t twiddles() const { return scratch() + 8 * int64_t{bound}; }
  __host__ __device__ int64_t spectrum() const { return twiddles() + 2 * int64_t{bound}; }
  __host__ __device__ int64_t chirp() const { return spectrum() + 2 * int64_t{bound}; }
  __host__ __device__ int64_t floats() const { return (chirp() + 2 * int64_t{s} + 3) / 4 * 4; }
};

// The greatest radix of common/fft_plan.h's order that divides n, or 0.
__device__ inline int next_radix(int n) {
  constexpr int kRadices[] = {16, 8, 4, 2, 3, 5, 7, 11, 13};
  for (const int radix : kRadices) {
    if (n % radix == 0) return radix;
  }
  return 0;
}

__device__ inline bool is_smooth(int n) {
  while (n > 1) {
    const int radix = next_radix(n);
    if (radix == 0) return false;
    n /= radix;
  }
  return true;
}

// exp(−2πi·k/n), 0 ≤ k < n.
__device__ inline double2 exact_root(int64_t k, int64_t n) {
  double2 root;
  sincospi(-2. * static_cast<double>(k) / static_cast<double>(n), &root.y, &root.x);
  return root;
}

__device__ inline float2 rounded(double2 a, double factor) {
  return make_float2(static_cast<float>(a.x * factor), static_cast<float>(a.y * factor));
}

// spectrum = DFT_m of the conjugate chirp, wrapped around, over m. `roots` holds 16 values in shared memory.
__device__ inline void bluestein_spectrum(int n, int m, double2* from, double2* to, double2* roots, float2* spectrum) {
  for (int64_t j = threadIdx.x; j < m; j += blockDim.x) {
    const int64_t i = j < n ? j : m - j;
    double2 value = make_double2(0., 0.);
    if (i < n) {
      value = exact_root(i * i % (2 * n), 2 * n);
      value.y = -value.y;
    }
    from[j] = value;
  }
  for (int length = m, stride = 1; length > 1;) {
    const int radix = next_radix(length), rest = length / radix;
    if (static_cast<int>(threadIdx.x) < radix) roots[threadIdx.x] = exact_root(threadIdx.x, radix);
    __syncthreads();
    for (int index = threadIdx.x; index < m; index += blockDim.x) {
      const int q = index % stride, k = index / stride % radix, p = index / stride / radix;
      double2 sum = make_double2(0., 0.);
      for (int j = 0; j < radix; ++j) {
        const double2 value = from[q + stride * (p + rest * j)], root = roots[j * k % radix];
        sum.x += value.x * root.x - value.y * root.y;
        sum.y += value.x * root.y + value.y * root.x;
      }
      const double2 twiddle = exact_root(int64_t{p} * k % length, length);
      to[index] = make_double2(sum.x * twiddle.x - sum.y * twiddle.y, sum.x * twiddle.y + sum.y * twiddle.x);
    }
    __syncthreads();
    double2* other = from;
    from = to;
    to = other;
    length = rest;
    stride *= radix;
  }
  for (int index = threadIdx.x; index < m; index += blockDim.x) spectrum[index] = rounded(from[index], 1. / m);
}

constexpr int kPlanSharedBytes = 16 * sizeof(double2) + sizeof(int);

__global__ void __launch_bounds__(512)
    plan_lengths_kernel(const int64_t* __restrict__ lengths, int s, float* __restrict__ slots, int64_t slot_stride) {
  extern __shared__ float2 shared[];
  double2* roots = reinterpret_cast<double2*>(shared);
  int* smallest = reinterpret_cast<int*>(roots + 16);
  const PlanSlot layout(s);
  float* slot = slots + blockIdx.x * slot_stride;
  CUDA_KERNEL_ASSERT(lengths[blockIdx.x] >= 0 && lengths[blockIdx.x] <= s);
  const int n = static_cast<int>(lengths[blockIdx.x]);
  int m = n;
  if (!is_smooth(n)) {
    if (threadIdx.x == 0) *smallest = layout.bound;
    __syncthreads();
    for (int start = 2 * n - 1; start < layout.bound; start += blockDim.x) {
      const int candidate = start + threadIdx.x;
      if (candidate < layout.bound && is_smooth(candidate)) atomicMin(smallest, candidate);
      __syncthreads();
      if (*smallest < start + static_cast<int>(blockDim.x)) break;
    }
    m = *smallest;
  }

  float2* twiddles = reinterpret_cast<float2*>(slot + layout.twiddles());
  float2* chirp = reinterpret_cast<float2*>(slot + layout.chirp());
  float2* spectrum = reinterpret_cast<float2*>(slot + layout.spectrum());
  FftView view{n, m, 0, twiddles, m > n ? chirp : nullptr, m > n ? spectrum : nullptr};
  for (int length = m, shift = 0; length > 1; shift += 4) {
    const int radix = next_radix(length), rest = length / radix;
    view.radices |= static_cast<uint64_t>(radix - 1) << shift;
    for (int index = threadIdx.x; index < rest * (radix - 1); index += blockDim.x) {
      const int64_t p = index / (radix - 1), k = index % (radix - 1) + 1;
      twiddles[index] = rounded(exact_root(p * k, length), 1.);
    }
    twiddles += rest * (radix - 1);
    length = rest;
  }
  if (threadIdx.x == 0) *reinterpret_cast<FftView*>(slot) = view;
  if (m == n) return;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) chirp[j] = rounded(exact_root(j * j % (2 * n), 2 * n), 1.);
  double2* scratch = reinterpret_cast<double2*>(slot + layout.scratch());
  bluestein_spectrum(n, m, scratch, scratch + layout.bound, roots, spectrum);
}

}  // namespace fastmix
