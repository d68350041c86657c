// The CPU ops of a linear layer's per-sample gradient norms: checks, how work is shared among threads, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/allocate.h"
#include "cpu/grad_norm_backward.h"
#include "cpu/grad_norm_fused.h"
#include "cpu/grad_norm_pairs.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Features contiguous, as the kernels read them.
Tensor with_features(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Positions<T> positions(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.size(1)};
}

LinearSizes check(const Tensor& input, const Tensor& grad_output) {
  FASTMIX_CHECK(input.dim() == 3 && grad_output.dim() == 3 && input.size(0) == grad_output.size(0) &&
                    input.size(1) == grad_output.size(1),
                "input must be [B, T, I] and grad_output [B, T, O]");
  FASTMIX_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output must have input's dtype");
  return {input.size(0), input.size(1), input.size(2), grad_output.size(2)};
}

// A contiguous copy of an argument [B], or none.
std::optional<Tensor> per_sample(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype,
                                 const LinearSizes& sizes) {
  if (!tensor) return std::nullopt;
  FASTMIX_CHECK(tensor->dim() == 1 && tensor->size(0) == sizes.batch && tensor->scalar_type() == dtype, name,
                " must be [B] = [", sizes.batch, "] and ", dtype == ScalarType::Int ? "int32" : "float32");
  return torch::stable::contiguous(*tensor);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

int64_t length(const int32_t* lengths, int64_t sample, const LinearSizes& sizes) {
  return lengths ? std::clamp<int64_t>(lengths[sample], 0, sizes.positions) : sizes.positions;
}

// norm_sq [B] by the Gram form, a sample on a thread; by the direct form where that cancels.
template <typename T>
void gram_norms(const LinearSizes& sizes, const Positions<const T>& a, const Positions<const T>& g,
                const int32_t* lengths, bool bias, float* norm_sq, std::atomic<bool>& no_memory) {
  const int64_t t = sizes.positions, converted = converted_size<T>(t, sizes.in);
  const double flops = static_cast<double>(t * t * (sizes.in + sizes.out));
  torch::stable::parallel_for(
      0, sizes.batch, static_cast<int64_t>(kGrainFlops / flops) + 1, [&](int64_t begin, int64_t end) {
        const float** const rows = thread_scratch<const float*>(2 * t);
        float* const memory = thread_scratch<float, 1>(converted + converted_size<T>(t, sizes.out));
        float* const scratch = thread_scratch<float>(direct_scratch(t, kDirectColumns));
        if (!rows || !memory || !scratch) {
          no_memory = true;
          return;
        }
        for (int64_t b = begin; b < end; ++b) {
          const int64_t count = length(lengths, b, sizes);
          float_rows(a, b * t, count, sizes.in, memory, rows);
          float_rows(g, b * t, count, sizes.out, memory + converted, rows + t);
          double sum = 0;
          if (!gram_norm_sq({sizes.in, sizes.out, rows, rows + t, bias}, count, sum)) {
            sum = 0;
            for (int64_t i = 0; i < sizes.in; i += kDirectColumns) {
              const int64_t columns = std::min(kDirectColumns, sizes.in - i);
              sum += direct_norm_sq(a, g, b, count, i, columns, sizes.out, bias && i == 0, scratch);
            }
          }
          norm_sq[b] = static_cast<float>(sum);
        }
      });
}

// norm_sq [B] by the direct form, a sample's group of columns on a thread.
template <typename T>
void direct_norms(const LinearSizes& sizes, const Positions<const T>& a, const Positions<const T>& g,
                  const int32_t* lengths, bool bias, float* norm_sq, std::atomic<bool>& no_memory) {
  const int64_t parts = (sizes.in + kDirectColumns - 1) / kDirectColumns, tasks = sizes.batch * parts;
  const auto partial = allocate<double>(tasks);
  if (!partial) {
    no_memory = true;
    return;
  }
  const double flops = sizes.flops() / static_cast<double>(tasks);
  torch::stable::parallel_for(0, tasks, static_cast<int64_t>(kGrainFlops / flops) + 1, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch<float>(direct_scratch(sizes.positions, kDirectColumns));
    if (!scratch) no_memory = true;
    for (int64_t i = begin; i < end && scratch; ++i) {
      const int64_t b = i / parts, column = i % parts * kDirectColumns;
      partial[i] = direct_norm_sq(a, g, b, length(lengths, b, sizes), column,
                                  std::min(kDirectColumns, sizes.in - column), sizes.out, bias && column == 0, scratch);
    }
  });
  for (int64_t b = 0; b < sizes.batch; ++b) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[b * parts + part];
    norm_sq[b] = static_cast<float>(sum);
  }
}

Tensor linear_grad_norm_sq_cpu(const Tensor& input, const Tensor& grad_output, const std::optional<Tensor>& lengths,
                               bool bias, bool gram) {
  const LinearSizes sizes = check(input, grad_output);
  const auto counts = per_sample("lengths", lengths, ScalarType::Int, sizes);
  const Tensor in = with_features(input), grad = with_features(grad_output);
  Tensor norm_sq = empty_strided<1>({sizes.batch}, {1}, aoti_torch_dtype_float32());
  if (sizes.batch == 0) return norm_sq;
  if (sizes.positions == 0 || sizes.out == 0 || (sizes.in == 0 && !bias)) return torch::stable::zero_(norm_sq);
  std::atomic<bool> no_memory{false};
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    const auto norms = gram || sizes.in == 0 ? gram_norms<T> : direct_norms<T>;
    norms(sizes, positions<const T>(in), positions<const T>(grad), data_or_null<int32_t>(counts), bias,
          static_cast<float*>(norm_sq.data_ptr()), no_memory);
  });
  FASTMIX_CHECK(!no_memory, "grad_norm: no memory for ", sizes.positions, " positions");
  return norm_sq;
}

std::tuple<Tensor, Tensor> linear_grad_norm_sq_bwd_cpu(const Tensor& grad_norm_sq, const Tensor& input,
                                                       const Tensor& grad_output, const std::optional<Tensor>& lengths,
                                                       bool bias, bool gram) {
  const LinearSizes sizes = check(input, grad_output);
  const auto counts = per_sample("lengths", lengths, ScalarType::Int, sizes);
  const auto grad_norms = per_sample("grad_norm_sq", grad_norm_sq, ScalarType::Float, sizes);
  const Tensor in = with_features(input), grad = with_features(grad_output);
  Tensor dinput = torch::stable::new_empty(input, input.sizes());
  Tensor dgrad = torch::stable::new_empty(grad_output, grad_output.sizes());
  if (sizes.batch == 0 || sizes.positions == 0) return {dinput, dgrad};
  if (sizes.in == 0 || sizes.out == 0) gram = true;
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    GradNormBackward<T>{sizes,
                        positions<const T>(in),
                        positions<const T>(grad),
                        positions<T>(dinput),
                        positions<T>(dgrad),
                        data_or_null<float>(grad_norms),
                        data_or_null<int32_t>(counts),
                        bias}
        .run(gram);
  });
  return {dinput, dgrad};
}

// Whether the norms are had with dW, sample by sample, which costs as much as some ten more positions in a sample's
// product; where samples are short, the Gram form beside one product over all of them costs less.
bool fuses(const LinearSizes& sizes) {
  const double t = static_cast<double>(sizes.positions), in = static_cast<double>(sizes.in);
  const double out = static_cast<double>(sizes.out);
  return t * t * (in + out + 64) > 20 * in * out;
}

// dW, and norm_sq [B] if it is given.
void weight_grad(const Tensor& input, const Tensor& grad_output, const std::optional<Tensor>& sample_weight, Tensor& dw,
                 Tensor* norm_sq) {
  const LinearSizes sizes = check(input, grad_output);
  const auto weights = per_sample("sample_weight", sample_weight, ScalarType::Float, sizes);
  const Tensor in = with_features(input), grad = with_features(grad_output);
  if (sizes.batch == 0 || sizes.positions == 0 || dw.numel() == 0) {
    torch::stable::zero_(dw);
    if (norm_sq) torch::stable::zero_(*norm_sq);
    return;
  }
  std::atomic<bool> no_memory{false};
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    const auto a = positions<const T>(in), g = positions<const T>(grad);
    auto* const norms = norm_sq ? static_cast<float*>(norm_sq->data_ptr()) : nullptr;
    const WeightGrad<T> weight_grad{sizes,    a, g, data_or_null<float>(weights), static_cast<float*>(dw.data_ptr()),
                                    no_memory};
    if (norms && fuses(sizes)) {
      weight_grad.run({sizes, sizes.positions}, norms);
    } else {
      if (norms) gram_norms<T>(sizes, a, g, nullptr, false, norms, no_memory);
      weight_grad.run({sizes, std::min(sizes.batch * sizes.positions, kSegment)}, nullptr);
    }
  });
  FASTMIX_CHECK(!no_memory, "grad_norm: no memory for ", sizes.positions, " positions");
}

Tensor empty_weight_grad(const Tensor& input, const Tensor& grad_output) {
  const LinearSizes sizes = check(input, grad_output);
  return empty_strided<2>({sizes.out, sizes.in}, {sizes.in, 1}, aoti_torch_dtype_float32());
}

Tensor linear_weight_grad_cpu(const Tensor& input, const Tensor& grad_output,
                              const std::optional<Tensor>& sample_weight) {
  Tensor dw = empty_weight_grad(input, grad_output);
  weight_grad(input, grad_output, sample_weight, dw, nullptr);
  return dw;
}

std::tuple<Tensor, Tensor> linear_weight_grad_with_norm_cpu(const Tensor& input, const Tensor& grad_output,
                                                            const std::optional<Tensor>& sample_weight) {
  Tensor dw = empty_weight_grad(input, grad_output);
  Tensor norm_sq = empty_strided<1>({input.size(0)}, {1}, aoti_torch_dtype_float32());
  weight_grad(input, grad_output, sample_weight, dw, &norm_sq);
  return {dw, norm_sq};
}

Tensor linear_grad_gram_cpu(const Tensor& input, const Tensor& grad_output, bool bias) {
  const LinearSizes sizes = check(input, grad_output);
  const Tensor in = with_features(input), grad = with_features(grad_output);
  Tensor gram = empty_strided<2>({sizes.batch, sizes.batch}, {sizes.batch, 1}, aoti_torch_dtype_float32());
  if (gram.numel() == 0 || sizes.positions == 0 || sizes.out == 0) return torch::stable::zero_(gram);
  std::atomic<bool> no_memory{false};
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    SampleGram<T>{
        sizes, positions<const T>(in), positions<const T>(grad), bias, static_cast<float*>(gram.data_ptr()), no_memory}
        .run();
  });
  FASTMIX_CHECK(!no_memory, "grad_norm: no memory for ", sizes.batch, " samples of ", sizes.positions, " positions");
  return gram;
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("linear_grad_norm_sq", TORCH_BOX(&fastmix::linear_grad_norm_sq_cpu));
  m.impl("linear_grad_norm_sq_bwd", TORCH_BOX(&fastmix::linear_grad_norm_sq_bwd_cpu));
  m.impl("linear_weight_grad", TORCH_BOX(&fastmix::linear_weight_grad_cpu));
  m.impl("linear_weight_grad_with_norm", TORCH_BOX(&fastmix::linear_weight_grad_with_norm_cpu));
  m.impl("linear_grad_gram", TORCH_BOX(&fastmix::linear_grad_gram_cpu));
}
