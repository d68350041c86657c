// A host stand-in for the CUDA built-ins that csrc/cuda's kernel headers use; the tests compile them with g++ against
// it. A block runs as fibers, one a thread, that meet at __syncthreads(); between two barriers they run one after the
// other, in the order that `order` names. A missing barrier then gives a wrong number in at least one order. What lanes
// of a warp exchange, they exchange all together.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::max;
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int atomicMin(int* address, int value) {
  int old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(x * 3.14159265358979323846);
  *cosine = std::cos(x * 3.14159265358979323846);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// The runtime, as far as the launchers call it: device memory is host memory.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum { cudaMemcpyHostToDevice };
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
// Exactly the bytes asked for, so that the address sanitizer sees an access beyond a table.
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
int __syncthreads_or(int value);

namespace fastmix {
// The value of another lane; and the lanes with a true one.
uint64_t exchange(unsigned mask, uint64_t value, int from);
unsigned ballot(unsigned mask, bool value);

template <typename T>
T exchange_as(unsigned mask, T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// What kernels declare as `extern __shared__ float2 shared[]`.
extern float2 shared[];
}  // namespace fastmix

inline unsigned __ballot_sync(unsigned mask, bool value) { return fastmix::ballot(mask, value); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return fastmix::exchange_as(mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return fastmix::exchange_as(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
// The first lanes get their own.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return fastmix::exchange_as(mask, value, lane < distance ? lane : lane - distance);
}
