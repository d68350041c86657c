// Launches and limits of the current CUDA device; a failed CUDA call becomes a std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastmix {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct SharedLimits {
  int block;           // bytes that one block may ask for
  int multiprocessor;  // bytes there are for its blocks together, 1 KB of them for each block's own use
};

inline SharedLimits shared_limits() {
  int device = 0;
  SharedLimits limits{};
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&limits.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  check_cuda(cudaDeviceGetAttribute(&limits.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
             "shared memory");
  return limits;
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            std::common_type_t<Parameters>... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  // More than 48 KB must be asked for; asking again costs less than remembering it by kernel and device.
  if (shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "shared memory of a kernel");
  }
  void* pointers[] = {&arguments...};
  check_cuda(cudaLaunchKernel(function, grid, dim3(threads), pointers, shared_bytes, stream), "kernel launch");
}

}  // namespace fastmix
