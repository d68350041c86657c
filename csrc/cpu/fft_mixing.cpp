// The CPU ops of Fourier mixing and the global filter: checks, allocation, parallel loops, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/fourier_mixing.h"
#include "cpu/global_filter.h"

namespace fastmix {
namespace {

using torch::stable::Tensor;

constexpr int64_t kFilterItems = 16;  // pieces of work in the backward of the global filter, at least

Tensor fourier_mixing_cpu(const Tensor& x, const std::optional<Tensor>& lengths, double exponent) {
  FASTMIX_CHECK(x.dim() >= 2 && x.size(-1) > 0 && x.size(-2) > 0, "x must be [..., S, H] with S, H >= 1");
  const Tensor input = torch::stable::contiguous(x);
  Tensor output = torch::stable::empty_like(input);
  const int64_t s = x.size(-2), h = x.size(-1), batch = x.numel() / (s * h);
  std::optional<Tensor> lengths64;
  if (lengths) {
    FASTMIX_CHECK(lengths->numel() == batch, "lengths must have ", batch, " elements, got ", lengths->numel());
    lengths64 = torch::stable::contiguous(torch::stable::to(*lengths, torch::headeronly::ScalarType::Long));
    const auto* values = static_cast<const int64_t*>(lengths64->data_ptr());
    for (int64_t i = 0; i < batch; ++i) {
      FASTMIX_CHECK(values[i] >= 0 && values[i] <= s, "lengths must be in 0..S = 0..", s, ", got ", values[i]);
    }
  }
  if (batch == 0) return output;
  const auto* values = lengths64 ? static_cast<const int64_t*>(lengths64->data_ptr()) : nullptr;
  for_dtype("x", input, [&](auto zero) {
    using T = decltype(zero);
    fourier_mixing(static_cast<const T*>(input.data_ptr()), static_cast<T*>(output.data_ptr()), values, batch, s, h,
                   exponent);
  });
  return output;
}

void check_filter(const Tensor& x, const Tensor& weight) {
  FASTMIX_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0, "x must be [B, h, w, C] with h, w >= 1");
  FASTMIX_CHECK(weight.scalar_type() == torch::headeronly::ScalarType::Float && weight.dim() == 4 &&
                    weight.size(0) == x.size(1) && weight.size(1) == x.size(2) / 2 + 1 && weight.size(2) == x.size(3) &&
                    weight.size(3) == 2,
                "weight must be float32 [h, w // 2 + 1, C, 2]");
}

Tensor global_filter_cpu(const Tensor& x, const Tensor& weight) {
  check_filter(x, weight);
  const Tensor input = torch::stable::contiguous(x), filter = torch::stable::contiguous(weight);
  Tensor output = torch::stable::empty_like(input);
  if (input.numel() == 0) return output;
  const GlobalFilter f{x.size(1), x.size(2), x.size(3)};
  const int64_t batch = x.size(0), image = f.h * f.w * f.c, blocks = (f.c + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (f.h * f.w * kColumns));
  const auto* w = static_cast<const float*>(filter.data_ptr());
  std::atomic<bool> no_memory{false};
  for_dtype("x", input, [&](auto zero) {
    using T = decltype(zero);
    const auto* in = static_cast<const T*>(input.data_ptr());
    auto* out = static_cast<T*>(output.data_ptr());
    // Images run fastest: the weights of a block of channels stay in the cache.
    torch::stable::parallel_for(0, blocks * batch, grain, [&](int64_t begin, int64_t end) {
      Complex* buffer = thread_scratch<Complex>(2 * f.size());
      if (!buffer) no_memory = true;
      for (int64_t i = begin; i < end && buffer; ++i) {
        const int64_t first = i / batch * kColumns, offset = i % batch * image;
        filter_block(f, in + offset, w, out + offset, first, std::min<int64_t>(kColumns, f.c - first), buffer);
      }
    });
  });
  FASTMIX_CHECK(!no_memory, "global_filter: no memory for images of ", f.h, " x ", f.w);
  return output;
}

std::tuple<Tensor, Tensor> global_filter_bwd_cpu(const Tensor& grad_output, const Tensor& x, const Tensor& weight) {
  check_filter(x, weight);
  FASTMIX_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.dim() == 4 &&
                    std::equal(x.sizes().begin(), x.sizes().end(), grad_output.sizes().begin()),
                "grad_output must have x's shape and dtype");
  const Tensor dy = torch::stable::contiguous(grad_output), input = torch::stable::contiguous(x);
  const Tensor filter = torch::stable::contiguous(weight);
  Tensor dx = torch::stable::empty_like(input), dweight = torch::stable::empty_like(filter);
  if (input.numel() == 0) return {dx, torch::stable::zero_(dweight)};
  const GlobalFilter f{x.size(1), x.size(2), x.size(3)};
  const int64_t batch = x.size(0), image = f.h * f.w * f.c, blocks = (f.c + kColumns - 1) / kColumns;
  // Few channels: the batch is split too, into parts that depend on the shape alone, so that sums are reproducible.
  const int64_t parts = std::min(batch, (kFilterItems + blocks - 1) / blocks);
  const int64_t weights = dweight.numel(), images = (batch + parts - 1) / parts;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (2 * images * f.h * f.w * kColumns));
  const auto partial = allocate<float>(parts > 1 ? parts * weights : 0);
  FASTMIX_CHECK(partial, "global_filter: no memory for ", parts, " x ", weights, " float32");
  auto* dw = static_cast<float*>(dweight.data_ptr());
  float* target = parts > 1 ? partial.get() : dw;
  const auto* w = static_cast<const float*>(filter.data_ptr());
  std::atomic<bool> no_memory{false};
  for_dtype("x", input, [&](auto zero) {
    using T = decltype(zero);
    const auto* grad = static_cast<const T*>(dy.data_ptr());
    const auto* in = static_cast<const T*>(input.data_ptr());
    auto* out = static_cast<T*>(dx.data_ptr());
    torch::stable::parallel_for(0, blocks * parts, grain, [&](int64_t begin, int64_t end) {
      Complex* buffer = thread_scratch<Complex>(4 * f.size() + 2 * f.h * f.half());
      if (!buffer) no_memory = true;
      for (int64_t i = begin; i < end && buffer; ++i) {
        const int64_t first = i / parts * kColumns, part = i % parts, start = std::min(part * images, batch);
        filter_block_bwd(f, grad + start * image, in + start * image, w, out + start * image, target + part * weights,
                         std::min(images, batch - start), first, std::min<int64_t>(kColumns, f.c - first), buffer);
      }
    });
  });
  FASTMIX_CHECK(!no_memory, "global_filter: no memory for images of ", f.h, " x ", f.w);
  if (parts > 1) {
    torch::stable::parallel_for(0, weights, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += target[part * weights + i];
        dw[i] = sum;
      }
    });
  }
  return {dx, dweight};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("fourier_mixing", TORCH_BOX(&fastmix::fourier_mixing_cpu));
  m.impl("global_filter", TORCH_BOX(&fastmix::global_filter_cpu));
  m.impl("global_filter_bwd", TORCH_BOX(&fastmix::global_filter_bwd_cpu));
}
