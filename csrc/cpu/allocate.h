// New tensors without the dispatcher, which looks its ops up by name: a few of them would cost more than a small op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "common/check.h"

namespace fastmix {

// dtype as aoti_torch_dtype_… and aoti_torch_get_dtype give it.
template <size_t dims>
torch::stable::Tensor empty_strided(const std::array<int64_t, dims>& sizes, const std::array<int64_t, dims>& strides,
                                    int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline int32_t dtype_of(const torch::stable::Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

}  // namespace fastmix
