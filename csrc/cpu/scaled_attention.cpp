// The CPU op of scaled attention: checks, allocation, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/allocate.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_forward.h"

namespace fastmix {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

Tensor with_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

Heads heads_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()),
          tensor.scalar_type(),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2)};
}

// [B, H, T, D] whose heads of a token lie side by side.
Tensor empty_heads(const Tensor& like, int64_t b, int64_t h, int64_t t, int64_t d) {
  return empty_strided<4>({b, h, t, d}, {t * h * d, d, h * d, 1}, dtype_of(like));
}

Tensor empty_lse(const Attention& a) {
  return empty_strided<3>({a.b, a.h, a.t}, {a.h * a.t, a.t, 1}, aoti_torch_dtype_float32());
}

Mask mask_of(const Tensor& tensor) {
  const auto stride = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {static_cast<char*>(tensor.data_ptr()),
          tensor.scalar_type() == ScalarType::Bool,
          tensor.scalar_type(),
          stride(0),
          stride(1),
          stride(2),
          stride(3)};
}

// The options' tensors, made contiguous, and kept as long as their data is in use.
struct Arguments {
  Attention a{};
  Tensor query, key, value;
  OptionalTensor kept[10];

  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const OptionalTensor& table,
            const OptionalTensor& query_scale, const OptionalTensor& cos, const OptionalTensor& sin,
            const OptionalTensor& query_positions, const OptionalTensor& key_positions, const OptionalTensor& prefix,
            const OptionalTensor& query_lengths, const OptionalTensor& key_lengths, const OptionalTensor& key_start,
            const OptionalTensor& cu_q, const OptionalTensor& cu_k, const OptionalTensor& seed, double scale,
            double dropout_p, bool causal, bool bottom_right, int64_t window_left, int64_t window_right,
            bool interleaved)
      : query(q), key(k), value(v) {
    for (const Tensor* tensor : {&q, &k, &v}) {
      FASTMIX_CHECK(
          tensor->is_cpu() && tensor->dim() == 4 && tensor->size(3) > 0 && tensor->scalar_type() == q.scalar_type(),
          "query, key and value must be [B, H, length, channels] of one dtype");
    }
    const ScalarType type = q.scalar_type();
    FASTMIX_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "query must be float32, bfloat16 or float16");
    a.b = q.size(0), a.h = q.size(1), a.t = q.size(2), a.hkv = k.size(1), a.s = k.size(2);
    FASTMIX_CHECK(a.hkv >= 1 && a.h % a.hkv == 0, "query must have a multiple of key's ", a.hkv, " heads, got ", a.h);
    FASTMIX_CHECK(has_shape(k, {a.b, a.hkv, a.s, q.size(3)}) && has_shape(v, {a.b, a.hkv, a.s, v.size(3)}),
                  "key and value must be [B, Hkv, S, D] and [B, Hkv, S, Dv] beside query");
    FASTMIX_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be at least 0 and below 1, got ", dropout_p);
    query = with_channels(q), key = with_channels(k), value = with_channels(v);
    a.query = heads_of(query), a.key = heads_of(key), a.value = heads_of(value);
    a.scale = static_cast<float>(scale);
    a.causal = causal, a.bottom_right = bottom_right, a.interleaved = interleaved;
    // Wider than all lengths together is unlimited, and can't overflow.
    a.window_left = window_left < a.t + a.s ? window_left : -1;
    a.window_right = window_right < a.t + a.s ? window_right : -1;
    a.dropout_p = dropout_p;
    set_mask(mask);
    set_vectors(table, query_scale, cos, sin);
    a.query_positions = positions("query_positions", query_positions, a.t);
    a.key_positions = positions("key_positions", key_positions, a.s);
    FASTMIX_CHECK(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q and cu_seqlens_k must be given together");
    a.sequences = cu_q ? cu_q->numel() - 1 : a.b;
    FASTMIX_CHECK(!cu_q || (a.b == 1 && a.sequences >= 1 && !query_lengths && !key_lengths && !key_start),
                  "packed sequences must have B = 1, cu_seqlens of N + 1 >= 2, and no lengths");
    a.prefix = integers("prefix_len", prefix, a.sequences, 0);
    a.query_lengths = integers("query_lengths", query_lengths, a.b, 1);
    a.key_lengths = integers("key_lengths", key_lengths, a.b, 2);
    a.key_start = integers("key_start", key_start, a.b, 3);
    a.cu_q = integers("cu_seqlens_q", cu_q, a.sequences + 1, 4);
    a.cu_k = integers("cu_seqlens_k", cu_k, a.sequences + 1, 5);
    if (dropout_p > 0) {
      FASTMIX_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "dropout_seed must be an int64 tensor of one element");
      a.seed = *static_cast<const uint64_t*>(seed->data_ptr());
    }
    a.max_t = a.t, a.max_s = a.s;
    if (a.cu_q) {
      a.max_t = a.max_s = 0;
      for (int64_t n = 0; n < a.sequences; ++n) {
        const Sequence at = a.sequence(n);
        a.max_t = std::max(a.max_t, at.rows), a.max_s = std::max(a.max_s, at.columns);
      }
    }
  }

 private:
  void set_mask(const OptionalTensor& mask) {
    if (!mask) return;
    const auto fits = [&](int64_t dim, int64_t size) { return mask->size(dim) == 1 || mask->size(dim) == size; };
    FASTMIX_CHECK(mask->is_cpu() && mask->dim() == 4 && fits(0, a.b) && fits(1, a.h) && fits(2, a.t) && fits(3, a.s),
                  "attn_mask must have 4 dimensions, broadcastable to [B, H, T, S]");
    const ScalarType type = mask->scalar_type();
    FASTMIX_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == query.scalar_type(),
                  "attn_mask must be bool, float32 or of query's dtype");
    a.mask = mask_of(*mask);
  }

  void set_vectors(const OptionalTensor& table, const OptionalTensor& query_scale, const OptionalTensor& cos,
                   const OptionalTensor& sin) {
    const auto is_float = [](const OptionalTensor& tensor) {
      return tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float && tensor->dim() == 2;
    };
    if (table) {
      FASTMIX_CHECK(is_float(table) && has_shape(*table, {a.h, a.table_size()}),
                    "bias_table must be float32 [H, T + S - 1]");
      kept[6] = torch::stable::contiguous(*table);
      a.table = static_cast<const float*>(kept[6]->data_ptr());
    }
    if (query_scale) {
      FASTMIX_CHECK(is_float(query_scale) && has_shape(*query_scale, {a.b, a.t}), "query_scale must be float32 [B, T]");
      a.query_scale = static_cast<const float*>(query_scale->data_ptr());
      a.query_scale_batch = query_scale->stride(0), a.query_scale_row = query_scale->stride(1);
    }
    FASTMIX_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
    if (cos) {
      FASTMIX_CHECK(is_float(cos) && is_float(sin) && 2 * cos->size(1) <= query.size(3) &&
                        (cos->size(0) > 0 || a.t + a.s == 0) && has_shape(*sin, {cos->size(0), cos->size(1)}),
                    "cos and sin must be float32 [L, R/2] with L >= 1, R <= D");
      kept[7] = torch::stable::contiguous(*cos), kept[8] = torch::stable::contiguous(*sin);
      a.cos = static_cast<const float*>(kept[7]->data_ptr()), a.sin = static_cast<const float*>(kept[8]->data_ptr());
      a.half = cos->size(1), a.positions = cos->size(0);
    }
  }

  Positions positions(const char* name, const OptionalTensor& tensor, int64_t length) const {
    if (!tensor) return {};
    FASTMIX_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Int && tensor->dim() == 2 &&
                      has_shape(*tensor, {a.b, length}),
                  name, " must be int32 [", a.b, ", ", length, "]");
    return {static_cast<const int32_t*>(tensor->data_ptr()), tensor->stride(0), tensor->stride(1)};
  }

  const int32_t* integers(const char* name, const OptionalTensor& tensor, int64_t count, int slot) {
    if (!tensor) return nullptr;
    FASTMIX_CHECK(
        tensor->is_cpu() && tensor->scalar_type() == ScalarType::Int && tensor->dim() == 1 && tensor->numel() == count,
        name, " must be int32 [", count, "]");
    kept[slot] = torch::stable::contiguous(*tensor);
    return static_cast<const int32_t*>(kept[slot]->data_ptr());
  }
};

std::tuple<Tensor, Tensor, Tensor> scaled_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& bias_table, const OptionalTensor& query_scale, const OptionalTensor& cos,
    const OptionalTensor& sin, const OptionalTensor& query_positions, const OptionalTensor& key_positions,
    const OptionalTensor& prefix_len, const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
    const OptionalTensor& key_start, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, double scale, double dropout_p, bool causal, bool bottom_right,
    int64_t window_left, int64_t window_right, bool interleaved) {
  const Arguments arguments(query, key, value, attn_mask, bias_table, query_scale, cos, sin, query_positions,
                            key_positions, prefix_len, query_lengths, key_lengths, key_start, cu_seqlens_q,
                            cu_seqlens_k, dropout_seed, scale, dropout_p, causal, bottom_right, window_left,
                            window_right, interleaved);
  const Attention& a = arguments.a;
  Tensor output = empty_heads(query, a.b, a.h, a.t, a.value.size);
  Tensor lse = empty_lse(a), lse_rest = empty_lse(a);
  if (output.numel() == 0) return {output, lse, lse_rest};
  if (a.has_other_rows()) {
    torch::stable::zero_(output);
    torch::stable::fill_(lse, -kInfinity);
    torch::stable::zero_(lse_rest);
  }
  auto *const to_lse = static_cast<float*>(lse.data_ptr()), *const to_rest = static_cast<float*>(lse_rest.data_ptr());
  const Heads to = heads_of(output);
  if (AttentionDecode::serves(a)) {
    AttentionDecode(a, to, to_lse, to_rest).run();
  } else {
    AttentionForward(a, to, to_lse, to_rest).run();
  }
  return {output, lse, lse_rest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scaled_attention_bwd_cpu(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& bias_table,
    const OptionalTensor& query_scale, const Tensor& output, const Tensor& lse, const Tensor& lse_rest,
    const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& query_positions,
    const OptionalTensor& key_positions, const OptionalTensor& prefix_len, const OptionalTensor& query_lengths,
    const OptionalTensor& key_lengths, const OptionalTensor& key_start, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& dropout_seed, double scale, double dropout_p, bool causal,
    bool bottom_right, int64_t window_left, int64_t window_right, bool interleaved, bool mask_grad, bool bias_grad,
    bool query_scale_grad) {
  const Arguments arguments(query, key, value, attn_mask, bias_table, query_scale, cos, sin, query_positions,
                            key_positions, prefix_len, query_lengths, key_lengths, key_start, cu_seqlens_q,
                            cu_seqlens_k, dropout_seed, scale, dropout_p, causal, bottom_right, window_left,
                            window_right, interleaved);
  const Attention& a = arguments.a;
  for (const Tensor* tensor : {&grad_output, &output}) {
    FASTMIX_CHECK(tensor->is_cpu() && tensor->scalar_type() == query.scalar_type() &&
                      has_shape(*tensor, {a.b, a.h, a.t, a.value.size}),
                  "grad_output and output must be [B, H, T, Dv] of query's dtype");
  }
  for (const Tensor* tensor : {&lse, &lse_rest, grad_lse ? &*grad_lse : &lse}) {
    FASTMIX_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float && has_shape(*tensor, {a.b, a.h, a.t}),
                  "lse, lse_rest and grad_lse must be float32 [B, H, T]");
  }
  FASTMIX_CHECK(!mask_grad || (attn_mask && !a.mask.boolean), "a gradient of attn_mask needs a float attn_mask");
  FASTMIX_CHECK(!bias_grad || bias_table, "a gradient of bias_table needs a bias_table");
  FASTMIX_CHECK(!query_scale_grad || query_scale, "a gradient of query_scale needs a query_scale");

  const auto empty_like = [](const Tensor& x) { return empty_heads(x, x.size(0), x.size(1), x.size(2), x.size(3)); };
  Tensor dq = empty_like(query), dk = empty_like(key), dv = empty_like(value);
  if (a.has_other_rows()) torch::stable::zero_(dq);
  if (a.cu_k) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  const auto zeros = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(query, sizes, ScalarType::Float);
  };
  const Tensor grad = with_channels(grad_output), kept_output = with_channels(output);
  const Tensor kept_lse = torch::stable::contiguous(lse), kept_rest = torch::stable::contiguous(lse_rest);
  const OptionalTensor kept_grad_lse = grad_lse ? OptionalTensor(torch::stable::contiguous(*grad_lse)) : std::nullopt;
  const Tensor scales = zeros({query_scale_grad ? a.b : 0, a.h, a.t});
  const auto mask_sizes =
      mask_grad ? std::vector<int64_t>(attn_mask->sizes().begin(), attn_mask->sizes().end()) : std::vector<int64_t>{0};
  const Tensor dmask = zeros(mask_sizes);
  AttentionGradients gradients{heads_of(kept_output),
                               heads_of(grad),
                               heads_of(dq),
                               heads_of(dk),
                               heads_of(dv),
                               static_cast<const float*>(kept_lse.data_ptr()),
                               static_cast<const float*>(kept_rest.data_ptr()),
                               kept_grad_lse ? static_cast<const float*>(kept_grad_lse->data_ptr()) : nullptr,
                               mask_grad ? mask_of(dmask) : Mask{},
                               nullptr,
                               query_scale_grad ? static_cast<float*>(scales.data_ptr()) : nullptr};
  const AttentionBackward backward(a, gradients);
  std::vector<double> diagonals(bias_grad ? backward.table_size() : 0);
  if (bias_grad) gradients.table = diagonals.data();
  if (dq.numel() + dk.numel() > 0) backward.run();

  Tensor dtable = zeros(bias_grad ? std::vector<int64_t>{a.h, a.table_size()} : std::vector<int64_t>{0});
  if (dtable.numel() > 0) backward.sum_table(static_cast<float*>(dtable.data_ptr()));
  Tensor dscale = query_scale_grad ? torch::stable::sum(scales, std::vector<int64_t>{1}) : zeros({0});
  return {dq, dk, dv, mask_grad ? torch::stable::to(dmask, attn_mask->scalar_type()) : dmask, dtable, dscale};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("scaled_attention", TORCH_BOX(&fastmix::scaled_attention_cpu));
  m.impl("scaled_attention_bwd", TORCH_BOX(&fastmix::scaled_attention_bwd_cpu));
}
