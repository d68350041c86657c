// float32 values of the stored types, and pairs of them in one access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastmix {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A tensor whose type is known at run time only: where a switch an element costs nothing and code would be tripled.
enum class Element { kFloat, kBFloat16, kHalf };

inline Element element_of(const float*) { return Element::kFloat; }
inline Element element_of(const __nv_bfloat16*) { return Element::kBFloat16; }
inline Element element_of(const __half*) { return Element::kHalf; }

__device__ inline float load_element(const void* data, Element type, int64_t index) {
  if (type == Element::kFloat) return static_cast<const float*>(data)[index];
  if (type == Element::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return to_float(static_cast<const __half*>(data)[index]);
}

__device__ inline void store_element(void* data, Element type, int64_t index, float value) {
  if (type == Element::kFloat) {
    static_cast<float*>(data)[index] = value;
  } else if (type == Element::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(data)[index] = from_float<__half>(value);
  }
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Packed {
  T values[kCount];
};

}  // namespace fastmix
