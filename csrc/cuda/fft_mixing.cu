// fourier_mixing and global_filter on CUDA: the checks that guard memory, and the registration. The mathematics and
// what a block owns are told in fourier_mixing_kernels.cuh and global_filter_kernels.cuh. Outputs and workspaces come
// from Python. Nothing waits for the device and nothing is allocated, but for the first call with a length on a device,
// which uploads that length's tables and so can't be captured in a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cuda/fourier_mixing_launch.h"
#include "cuda/global_filter_launch.h"
#include "cuda/tensor_checks.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void check_tensor(const Tensor& tensor, const char* name, const Tensor& x) {
  check_on_device(tensor, name, x, "x");
  FASTMIX_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  check_tensor(tensor, name, x);
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  FASTMIX_CHECK(same, name, " must have the shape ", shape_text(x), " and the dtype of x, got ", shape_text(tensor));
}

void check_workspace(const Tensor& workspace, int64_t least, const Tensor& x) {
  check_tensor(workspace, "workspace", x);
  FASTMIX_CHECK(workspace.scalar_type() == ScalarType::Float && workspace.numel() >= least,
                "workspace must hold at least ", least, " float32 values, got ", workspace.numel());
  FASTMIX_CHECK(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0, "workspace must be aligned to 16 bytes");
}

void check_input(const Tensor& x, int64_t dims) {
  FASTMIX_CHECK(x.is_cuda() && x.dim() == dims && x.is_contiguous(), "x must be a contiguous CUDA tensor of ", dims,
                " dimensions, got ", shape_text(x));
}

void check_sides(int64_t first, int64_t second) {
  FASTMIX_CHECK(first >= 1 && second >= 1 && first <= kMaxLength && second <= kMaxLength,
                "the transformed dimensions must be 1 to ", kMaxLength, ", got ", first, " and ", second);
}

// Calls with a null pointer to the element type of x.
template <typename Call>
void with_element(const Tensor& x, const Call& call) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return call(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return call(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half:
      return call(static_cast<__half*>(nullptr));
    default:
      FASTMIX_CHECK(false, "x must be float32, bfloat16 or float16");
  }
}

void fourier_mixing_out_cuda(const Tensor& x, std::optional<Tensor> lengths, double exponent, Tensor workspace,
                             Tensor out) {
  check_input(x, 3);
  const int64_t b = x.size(0), s = x.size(1), h = x.size(2);
  FASTMIX_CHECK(exponent == 0. || exponent == 0.5 || exponent == 1., "exponent must be 0, 0.5 or 1, got ", exponent);
  check_like(out, "out", x);
  if (lengths) {
    check_tensor(*lengths, "lengths", x);
    FASTMIX_CHECK(lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 && lengths->size(0) == b,
                  "lengths must be int64 [", b, "], got ", shape_text(*lengths));
  }
  if (x.numel() == 0) return;
  check_sides(s, h);
  check_workspace(workspace, fourier_sample_floats(s, h, lengths.has_value()), x);

  const DeviceGuard guard(x.get_device_index());
  const FourierLaunch op{b,
                         s,
                         h,
                         lengths ? static_cast<const int64_t*>(lengths->data_ptr()) : nullptr,
                         static_cast<float>(exponent),
                         static_cast<float*>(workspace.data_ptr()),
                         workspace.numel(),
                         shared_limits(),
                         current_stream(x)};
  with_element(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    launch_fourier_mixing<T>(op, static_cast<const T*>(x.data_ptr()), static_cast<T*>(out.data_ptr()));
  });
}

// Checks x and weight, and gives what the launchers need; 32-bit indices count the channels of a row of pixels.
FilterLaunch filter_launch(const Tensor& x, const Tensor& weight, bool conjugate, const Tensor& workspace) {
  const int64_t b = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  check_sides(h, w);
  FASTMIX_CHECK(w * c <= INT32_MAX / 2 && b <= INT32_MAX, "x is too large: ", shape_text(x));
  return FilterLaunch{b,
                      h,
                      w,
                      c,
                      static_cast<const float2*>(weight.data_ptr()),
                      conjugate,
                      static_cast<float*>(workspace.data_ptr()),
                      workspace.numel(),
                      shared_limits(),
                      current_stream(x)};
}

void check_weight(const Tensor& weight, const char* name, const Tensor& x) {
  check_tensor(weight, name, x);
  const bool fits = weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.size(0) == x.size(1) &&
                    weight.size(1) == x.size(2) / 2 + 1 && weight.size(2) == x.size(3) && weight.size(3) == 2;
  FASTMIX_CHECK(fits, name, " must be float32 [", x.size(1), ", ", x.size(2) / 2 + 1, ", ", x.size(3), ", 2], got ",
                shape_text(weight));
  FASTMIX_CHECK(reinterpret_cast<uintptr_t>(weight.data_ptr()) % sizeof(float2) == 0, name,
                " must be aligned to 8 bytes");
}

void global_filter_out_cuda(const Tensor& x, const Tensor& weight, bool conjugate, Tensor workspace, Tensor out) {
  check_input(x, 4);
  check_weight(weight, "weight", x);
  check_like(out, "out", x);
  if (x.numel() == 0) return;
  check_workspace(workspace, filter_workspace(x.size(1), x.size(2), x.size(3), 1), x);

  const DeviceGuard guard(x.get_device_index());
  const FilterLaunch op = filter_launch(x, weight, conjugate, workspace);
  with_element(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    launch_global_filter<T>(op, static_cast<const T*>(x.data_ptr()), static_cast<T*>(out.data_ptr()));
  });
}

void global_filter_bwd_out_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& weight, Tensor workspace,
                                Tensor dx, Tensor dw) {
  check_input(x, 4);
  check_like(grad_output, "grad_output", x);
  check_weight(weight, "weight", x);
  check_like(dx, "dx", x);
  check_weight(dw, "dw", x);
  const DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) {
    check_cuda(cudaMemsetAsync(dw.data_ptr(), 0, dw.numel() * sizeof(float), current_stream(x)), "cudaMemsetAsync");
    return;
  }
  check_workspace(workspace, filter_bwd_workspace(x.size(0), x.size(1), x.size(2), x.size(3), 1), x);

  const FilterLaunch op = filter_launch(x, weight, true, workspace);
  with_element(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    launch_global_filter_bwd<T>(op, static_cast<const T*>(grad_output.data_ptr()), static_cast<const T*>(x.data_ptr()),
                                static_cast<T*>(dx.data_ptr()), static_cast<float2*>(dw.data_ptr()));
  });
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_FRAGMENT(fastmix, m) {
  m.def("fourier_mixing_out(Tensor x, Tensor? lengths, float exponent, Tensor(a!) workspace, Tensor(b!) out) -> ()");
  m.def("global_filter_out(Tensor x, Tensor weight, bool conjugate, Tensor(a!) workspace, Tensor(b!) out) -> ()");
  m.def(
      "global_filter_bwd_out(Tensor grad_output, Tensor x, Tensor weight, Tensor(a!) workspace, Tensor(b!) dx, "
      "Tensor(c!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmix, CUDA, m) {
  m.impl("fourier_mixing_out", TORCH_BOX(&fastmix::fourier_mixing_out_cuda));
  m.impl("global_filter_out", TORCH_BOX(&fastmix::global_filter_out_cuda));
  m.impl("global_filter_bwd_out", TORCH_BOX(&fastmix::global_filter_bwd_out_cuda));
}
