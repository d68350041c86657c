// In place of csrc/common/cuda_launch.h: runs every block of a launch at once.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastmix {

inline void check_cuda(cudaError_t, const char*) {}

struct SharedLimits {
  int block;
  int multiprocessor;
};

void run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& thread);

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
            std::common_type_t<Parameters>... arguments) {
  run_grid(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fastmix
