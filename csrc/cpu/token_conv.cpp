// The CPU ops of the token convolutions: checks, weights, parallel loops, registration.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>
#include <tuple>

#include "cpu/scratch.h"
#include "cpu/token_conv_dynamic.h"

namespace fastmix {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 64;  // tokens of a unit
constexpr int64_t kParts = 16;  // of the units, each with a sum of its own for the gradient of shared weights

enum class ConvKind { kDepthwise, kLightweight, kDynamic };

ConvKind parse_kind(const std::string& kind) {
  if (kind == "depthwise") return ConvKind::kDepthwise;
  if (kind == "lightweight") return ConvKind::kLightweight;
  FASTMIX_CHECK(kind == "dynamic", "kind must be depthwise, lightweight or dynamic, got ", kind);
  return ConvKind::kDynamic;
}

DynamicShape check_shapes(const Tensor& x, const Tensor& kernel, ConvKind kind, bool causal) {
  const bool dynamic = kind == ConvKind::kDynamic;
  FASTMIX_CHECK(x.dim() == 3, "x must be [B, S, C]");
  FASTMIX_CHECK(kernel.scalar_type() == x.scalar_type() && kernel.dim() == (dynamic ? 4 : 2) && kernel.size(-1) > 0,
                "kernel must be [C, K], [H, K] or [B, S, H, K] with K >= 1, of x's dtype");
  DynamicShape f{};
  f.batch = x.size(0), f.tokens = x.size(1), f.channels = x.size(2);
  f.heads = kernel.size(-2), f.taps = kernel.size(-1);
  f.before = causal ? f.taps - 1 : (f.taps - 1) / 2;
  // Tokens that share the taps around a chunk, whose weights are computed for each chunk anew.
  f.chunk = dynamic ? round_up(std::min(2 * f.taps, f.tokens), kChunk) : kChunk;
  f.chunk = std::max<int64_t>(1, std::min(std::max(f.chunk, kChunk), f.tokens));
  FASTMIX_CHECK(kind == ConvKind::kDepthwise ? f.heads == f.channels : f.heads > 0 && f.channels % f.heads == 0,
                "kernel must be of H heads that divide x's ", f.channels, " channels, got ", f.heads);
  FASTMIX_CHECK(!dynamic || (kernel.size(0) == f.batch && kernel.size(1) == f.tokens),
                "kernel must have x's batch and tokens");
  return f;
}

Tensor with_contiguous_channels(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

template <typename T>
Samples<T> samples(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

// The weights that all tokens share.
struct SharedWeights {
  std::unique_ptr<float[], Free> table;    // [K, weight_stride], 0 in the lanes beyond the last channel
  std::unique_ptr<float[], Free> softmax;  // [H, padded_taps] if lightweight
};

// rows: a head's weights every `row_stride`.
template <typename T>
void fill_table(const ConvShape& f, const T* rows, int64_t row_stride, float* table) {
  const int64_t stride = f.weight_stride(), head_channels = f.channels / f.heads;
  for (int64_t k = 0; k < f.taps; ++k) std::fill(table + k * stride + f.channels, table + (k + 1) * stride, 0.0f);
  for (int64_t c = 0; c < f.channels; ++c) {
    const T* row = rows + c / head_channels * row_stride;
    for (int64_t k = 0; k < f.taps; ++k) table[k * stride + c] = static_cast<float>(row[k]);
  }
}

template <typename T>
SharedWeights shared_weights(const DynamicShape& f, const T* kernel, bool softmax) {
  SharedWeights weights{allocate<float>(f.taps * f.weight_stride()), nullptr};
  if (softmax) weights.softmax = allocate<float>(f.token_weights() + f.columns());
  FASTMIX_CHECK(weights.table && (weights.softmax || !softmax), "token_conv: no memory for weights [", f.taps, ", ",
                f.channels, "]");
  if (softmax) {
    float* rows = weights.softmax.get();
    softmax_rows(kernel, f.heads, f.taps, rows, f.padded_taps(), rows + f.token_weights());
    fill_table(f, rows, f.padded_taps(), weights.table.get());
  } else {
    fill_table(f, kernel, f.taps, weights.table.get());
  }
  return weights;
}

// body(unit, scratch) of the units [0, count) in parallel; false if a thread had no memory for its scratch.
template <typename Body>
bool for_units(const ConvShape& f, int64_t count, int64_t scratch, const Body& body) {
  std::atomic<bool> has_memory{true};
  // Elements times work, in the global filter's measure.
  const int64_t work = f.batch * f.tokens * f.channels / count * (16 + f.taps) / 16;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    float* buffer = thread_scratch<float>(scratch);
    if (!buffer) has_memory = false;
    for (int64_t i = begin; i < end && buffer; ++i) body(i, buffer);
  });
  return has_memory;
}

Tensor token_conv_cpu(const Tensor& x, const Tensor& kernel, const std::string& kind_name, bool causal) {
  const ConvKind kind = parse_kind(kind_name);
  const DynamicShape f = check_shapes(x, kernel, kind, causal);
  const Tensor input = with_contiguous_channels(x), weight = torch::stable::contiguous(kernel);
  Tensor output = torch::stable::new_empty(x, x.sizes());
  if (output.numel() == 0) return output;
  bool has_memory = true;
  for_dtype("x", input, [&](auto zero) {
    using T = decltype(zero);
    const auto in = samples<const T>(input);
    const auto out = samples<T>(output);
    const auto* logits = static_cast<const T*>(weight.data_ptr());
    if (kind == ConvKind::kDynamic) {
      has_memory = for_units(f, f.units(), f.scratch(),
                             [&](int64_t unit, float* scratch) { dynamic_unit(f, in, logits, out, unit, scratch); });
    } else {
      const SharedWeights weights = shared_weights(f, logits, kind == ConvKind::kLightweight);
      has_memory = for_units(f, f.units(), f.window_rows() * kStride, [&](int64_t unit, float* scratch) {
        shared_unit(f, in, weights.table.get(), out, unit, scratch);
      });
    }
  });
  FASTMIX_CHECK(has_memory, "token_conv: no memory for ", f.taps, " taps of ", f.tokens, " tokens");
  return output;
}

// dkernel from the parts' sums [parts, K, weight_stride], in a fixed order; `sums` is overwritten.
template <typename T>
void sum_parts(const DynamicShape& f, float* sums, int64_t parts, const float* softmax, T* dkernel) {
  const int64_t stride = f.weight_stride(), size = f.taps * stride, head_channels = f.channels / f.heads;
  torch::stable::parallel_for(0, f.taps, std::max<int64_t>(1, kGrainElements / (parts * stride)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin * stride; i < end * stride; i += kLanes) {
                                  Vec total = load(sums + i);
                                  for (int64_t p = 1; p < parts; ++p) total += load(sums + p * size + i);
                                  store(sums + i, total);
                                }
                              });
  const auto of_head = [&](int64_t head, int64_t k) {
    const float* channels = sums + k * stride + head * head_channels;
    double total = 0;
    for (int64_t c = 0; c < head_channels; ++c) total += channels[c];
    return static_cast<float>(total);
  };
  for (int64_t head = 0; head < f.heads; ++head) {
    T* out = dkernel + head * f.taps;
    if (!softmax) {
      for (int64_t k = 0; k < f.taps; ++k) out[k] = static_cast<T>(of_head(head, k));
      continue;
    }
    const float* w = softmax + head * f.padded_taps();
    double dot = 0;
    for (int64_t k = 0; k < f.taps; ++k) dot += static_cast<double>(w[k]) * of_head(head, k);
    for (int64_t k = 0; k < f.taps; ++k) out[k] = static_cast<T>(w[k] * static_cast<float>(of_head(head, k) - dot));
  }
}

template <typename T>
bool shared_bwd(const DynamicShape& f, const Samples<const T>& dy, const Samples<const T>& x, const T* kernel,
                bool softmax, const Samples<T>& dx, T* dkernel) {
  const SharedWeights weights = shared_weights(f, kernel, softmax);
  // By the shape alone, so that sums are reproducible, and not larger than x.
  const int64_t parts = std::min({f.units(), kParts, std::max<int64_t>(1, f.batch * f.tokens / f.taps)});
  const int64_t size = f.taps * f.weight_stride();
  const auto sums = allocate<float>(parts * size);
  FASTMIX_CHECK(sums, "token_conv: no memory for ", parts, " x ", size, " float32");
  const bool has_memory = for_units(f, parts, 2 * f.window_rows() * kStride, [&](int64_t part, float* scratch) {
    float* target = sums.get() + part * size;
    std::fill(target, target + size, 0.0f);
    for (int64_t unit = f.units() * part / parts; unit < f.units() * (part + 1) / parts; ++unit) {
      shared_unit_bwd(f, dy, x, weights.table.get(), dx, target, unit, scratch);
    }
  });
  if (has_memory) sum_parts(f, sums.get(), parts, weights.softmax.get(), dkernel);
  return has_memory;
}

std::tuple<Tensor, Tensor> token_conv_bwd_cpu(const Tensor& grad_output, const Tensor& x, const Tensor& kernel,
                                              const std::string& kind_name, bool causal) {
  const ConvKind kind = parse_kind(kind_name);
  const DynamicShape f = check_shapes(x, kernel, kind, causal);
  FASTMIX_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.dim() == 3 &&
                    std::equal(x.sizes().begin(), x.sizes().end(), grad_output.sizes().begin()),
                "grad_output must have x's shape and dtype");
  const Tensor grad = with_contiguous_channels(grad_output), input = with_contiguous_channels(x);
  const Tensor weight = torch::stable::contiguous(kernel);
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dkernel = torch::stable::new_empty(kernel, kernel.sizes());
  if (x.numel() == 0) return {dx, torch::stable::zero_(dkernel)};
  bool has_memory = true;
  for_dtype("x", input, [&](auto zero) {
    using T = decltype(zero);
    const auto dy = samples<const T>(grad), in = samples<const T>(input);
    const auto out = samples<T>(dx);
    const auto* logits = static_cast<const T*>(weight.data_ptr());
    auto* dlogits = static_cast<T*>(dkernel.data_ptr());
    if (kind == ConvKind::kDynamic) {
      has_memory = for_units(f, f.units(), f.scratch(), [&](int64_t unit, float* scratch) {
        dynamic_unit_bwd(f, dy, in, logits, out, dlogits, unit, scratch);
      });
    } else {
      has_memory = shared_bwd(f, dy, in, logits, kind == ConvKind::kLightweight, out, dlogits);
    }
  });
  FASTMIX_CHECK(has_memory, "token_conv: no memory for ", f.taps, " taps of ", f.tokens, " tokens");
  return {dx, dkernel};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("token_conv", TORCH_BOX(&fastmix::token_conv_cpu));
  m.impl("token_conv_bwd", TORCH_BOX(&fastmix::token_conv_bwd_cpu));
}
