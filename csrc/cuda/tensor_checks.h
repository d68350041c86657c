// What the ops in csrc/cuda ask about tensors before they hand pointers to a kernel.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/check.h"

namespace fastmix {

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void check_on_device(const torch::stable::Tensor& tensor, const char* name, const torch::stable::Tensor& other,
                            const char* other_name) {
  FASTMIX_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
                " must be on the device of ", other_name);
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastmix
