// The CPU ops of the token-mixing MLP and the token linear: checks, allocation, parallel loops, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/token_linear.h"
#include "cpu/token_mixing_mlp.h"

namespace fastmix {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> token_mixing_mlp_cpu(const Tensor& x, const Tensor& w1, const Tensor& w2,
                                                const OptionalTensor& b1, const OptionalTensor& b2,
                                                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                                const OptionalTensor& scale, const OptionalTensor& residual,
                                                int64_t norm, double eps, int64_t activation, bool add_x, bool save) {
  const NormArguments norms(x, norm, eps, norm_weight, norm_bias);
  const int64_t batch = x.size(0), s = x.size(1), c = x.size(2);
  const Tensor first_weight = weight_of("w1", w1, x, s);
  const int64_t d = w1.size(-2);
  const Tensor second_weight = weight_of("w2", w2, x, d);
  const int64_t s_out = w2.size(-2);
  FASTMIX_CHECK(w1.dim() == 2 && w2.dim() == 2, "w1 and w2 must be matrices");
  FASTMIX_CHECK(activation >= 0 && activation <= 3, "activation must be 0, 1, 2 or 3, got ", activation);
  const Tensor input = tokens_beside("x", x, x, s);
  const OptionalTensor added = tokens_beside("residual", add_x ? OptionalTensor(input) : residual, x, s_out);
  const OptionalTensor bias1 = vector_of("b1", b1, d), bias2 = vector_of("b2", b2, s_out);
  const OptionalTensor factors = vector_of("scale", scale, c);
  const bool keeps = save && x.scalar_type() == torch::headeronly::ScalarType::Float;
  Tensor y = torch::stable::new_empty(x, {batch, s_out, c}), saved = new_saved(x, d, keeps);
  if (batch == 0) return {y, saved};
  const Workspace workspace(norms.statistics_size(x) + converted_size(w1) + converted_size(w2));
  FASTMIX_CHECK(workspace.data(), "token_mixing_mlp: no memory for the weights");
  std::atomic<bool> no_memory{false};
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    TokenMlp<T> mlp{norms.with<T>(input, workspace.data()), d, s_out};
    float* memory = workspace.data() + norms.statistics_size(x);
    mlp.w1 = in_float32<T>(first_weight, memory);
    mlp.w2 = in_float32<T>(second_weight, memory + converted_size(w1));
    mlp.b1 = floats(bias1);
    mlp.output = {tokens_of<T>(y), {}, floats(bias2), floats(factors), {}, {}, tokens_of<const T>(added)};
    if (keeps) mlp.pre = tokens_of<float>(saved);
    measure(mlp.norm, batch);
    const int64_t panels = (c + kPanelColumns - 1) / kPanelColumns;
    const int64_t grain = product_grain(2.0 * (s + s_out) * d * std::min(c, kPanelColumns));
    for_activation(static_cast<Activation>(activation), [&](auto kind) {
      torch::stable::parallel_for(0, batch * panels, grain, [&](int64_t begin, int64_t end) {
        float* scratch = thread_scratch<float>(mlp.scratch_size());
        if (!scratch) no_memory = true;
        for (int64_t i = begin; i < end && scratch; ++i) {
          mlp.template panel<decltype(kind)::value>(i / panels, i % panels * kPanelColumns, scratch);
        }
      });
    });
  });
  FASTMIX_CHECK(!no_memory, "token_mixing_mlp: no memory for ", s + d, " x ", kPanelColumns, " float32");
  return {y, saved};
}

Gradients token_mixing_mlp_bwd_cpu(const Tensor& grad_output, const Tensor& x, const Tensor& w1, const Tensor& w2,
                                   const OptionalTensor& b1, const OptionalTensor& b2,
                                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                   const OptionalTensor& scale, const Tensor& saved, int64_t norm, double eps,
                                   int64_t activation, bool add_x, bool input_grad, bool parameter_grads) {
  const NormArguments norms(x, norm, eps, norm_weight, norm_bias);
  const int64_t batch = x.size(0), s = x.size(1), c = x.size(2);
  const Tensor first_weight = weight_of("w1", w1, x, s);
  const int64_t d = w1.size(-2);
  const Tensor second_weight = weight_of("w2", w2, x, d);
  const int64_t s_out = w2.size(-2);
  FASTMIX_CHECK(w1.dim() == 2 && w2.dim() == 2, "w1 and w2 must be matrices");
  FASTMIX_CHECK(activation >= 0 && activation <= 3, "activation must be 0, 1, 2 or 3, got ", activation);
  FASTMIX_CHECK(!add_x || s == s_out, "x is no residual of ", s_out, " tokens");
  const Tensor input = tokens_beside("x", x, x, s);
  const Tensor dy = torch::stable::contiguous(tokens_beside("grad_output", grad_output, x, s_out));
  const bool keeps = x.scalar_type() == torch::headeronly::ScalarType::Float;
  const OptionalTensor pre = keeps ? OptionalTensor(saved_of(saved, x, d)) : std::nullopt;
  const OptionalTensor bias1 = vector_of("b1", b1, d), bias2 = vector_of("b2", b2, s_out);
  const OptionalTensor factors = vector_of("scale", scale, c);
  const bool all = parameter_grads;
  const Gradients gradients{like_or_none(x, x, input_grad),  like_or_none(w1, x, all),
                            like_or_none(w2, x, all),        like_or_none(b1, x, all),
                            like_or_none(b2, x, all),        like_or_none(norm_weight, x, all),
                            like_or_none(norm_bias, x, all), like_or_none(scale, x, all)};
  const auto& [dx, dw1, dw2, db1, db2, dnorm_weight, dnorm_bias, dscale] = gradients;
  const bool du_wanted = input_grad || (all && (norm_weight || norm_bias));

  const int64_t s_stride = round_up(s, kTileColumns), s_out_stride = round_up(s_out, kTileColumns);
  const auto sums_in = [&](Carver& carver) {
    TokenMlpSums sums{s_stride, s_out_stride};
    sums.dw1 = carver.take(d * s_stride, all), sums.dw2t = carver.take(d * s_out_stride, all);
    sums.db1 = carver.take_like(db1), sums.db2 = carver.take_like(db2), sums.dscale = carver.take_like(dscale);
    sums.dnorm_weight = carver.take_like(dnorm_weight), sums.dnorm_bias = carver.take_like(dnorm_bias);
    return sums;
  };
  Carver counting(nullptr);
  sums_in(counting);
  const int64_t sums_size = counting.used();
  const int64_t panels = (c + kPanelColumns - 1) / kPanelColumns;
  const Waves waves = make_waves(batch, panels, x.numel() * x.element_size(), sums_size);
  const int64_t w1_size = round_up(w1.numel(), kLanes), w2_size = round_up(w2.numel(), kLanes);
  const Workspace workspace(w1_size + w2_size + norms.statistics_size(x) + converted_size(w1));
  const bool keeps_du = du_wanted && norms.kind == Norm::kLayer &&
                        !(input_grad && x.scalar_type() == torch::headeronly::ScalarType::Float);
  const auto partial = allocate<float>(waves.items() * sums_size);
  const auto du = allocate<float>(keeps_du ? waves.samples * s * c : 0);
  FASTMIX_CHECK(workspace.data() && partial && du, "token_mixing_mlp: no memory for the gradients");
  std::atomic<bool> no_memory{false};
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    float *w1t = workspace.data(), *w2t = w1t + w1_size, *statistics = w2t + w2_size;
    TokenMlpBackward<T> mlp{{norms.with<T>(input, statistics)}, d, s_out};
    mlp.w1t = transposed_in_float32(static_cast<const T*>(first_weight.data_ptr()), d, s, w1t);
    mlp.w2t = transposed_in_float32(static_cast<const T*>(second_weight.data_ptr()), s_out, d, w2t);
    if (!keeps) mlp.w1 = in_float32<T>(first_weight, statistics + norms.statistics_size(x));
    mlp.b1 = floats(bias1), mlp.b2 = floats(bias2), mlp.scale = floats(factors);
    mlp.dy = data_of<const T>(dy), mlp.pre = floats(pre);
    mlp.input_grad = input_grad, mlp.parameter_grads = all;
    mlp.norm.dx = data_of<T>(dx), mlp.norm.dy = add_x ? mlp.dy : nullptr;
    mlp.norm.du = keeps_du ? du.get() : du_wanted ? reinterpret_cast<float*>(mlp.norm.dx) : nullptr;
    measure(mlp.norm.norm, batch);
    std::array<float*, 8> pieces;
    const int64_t scratch_size = mlp.carve(nullptr, pieces);
    for_activation(static_cast<Activation>(activation), [&](auto kind) {
      const auto panels_of = [&](int64_t item, int64_t sample, int64_t slot, const TokenMlpSums& sums, float* scratch) {
        for (int64_t panel = waves.begin(item); panel < waves.end(item); ++panel) {
          mlp.template panel<decltype(kind)::value>(sample, slot, panel * kPanelColumns, sums, scratch);
        }
      };
      run_waves(waves, batch, 4.0 * (s + s_out) * d * c, mlp.norm, keeps_du, partial.get(), sums_size, scratch_size,
                no_memory, sums_in, panels_of);
    });
    if (!all || no_memory) return;
    Carver carver(partial.get());
    const TokenMlpSums first = sums_in(carver);
    sum_items(first.dw1, waves.items(), sums_size, d, s, s_stride, static_cast<T*>(dw1.data_ptr()), s, 1);
    sum_items(first.dw2t, waves.items(), sums_size, d, s_out, s_out_stride, static_cast<T*>(dw2.data_ptr()), 1, d);
    sum_vector(first.db1, waves.items(), sums_size, db1);
    sum_vector(first.db2, waves.items(), sums_size, db2);
    sum_vector(first.dnorm_weight, waves.items(), sums_size, dnorm_weight);
    sum_vector(first.dnorm_bias, waves.items(), sums_size, dnorm_bias);
    sum_vector(first.dscale, waves.items(), sums_size, dscale);
  });
  FASTMIX_CHECK(!no_memory, "token_mixing_mlp: no memory for a panel of the backward");
  return gradients;
}

// [heads, S_out, S], or without heads.
Heads heads_of(const Tensor& weight, const Tensor& x) {
  FASTMIX_CHECK(weight.dim() == 2 || weight.dim() == 3, "weight must be [S_out, S] or [heads, S_out, S]");
  const int64_t heads = weight.dim() == 3 ? weight.size(0) : 1;
  FASTMIX_CHECK(heads > 0 && x.size(2) % heads == 0, "C must be a multiple of the heads of weight");
  return {heads, x.size(2) / heads};
}

std::tuple<Tensor, Tensor> token_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                            const OptionalTensor& gate, const OptionalTensor& added,
                                            const OptionalTensor& scale, const OptionalTensor& residual, int64_t norm,
                                            double eps, bool add_x, bool save) {
  const NormArguments norms(x, norm, eps, norm_weight, norm_bias);
  const int64_t batch = x.size(0), s = x.size(1), c = x.size(2);
  const Tensor weights = weight_of("weight", weight, x, s);
  const int64_t s_out = weight.size(-2);
  const Heads heads = heads_of(weight, x);
  const Tensor input = tokens_beside("x", x, x, s);
  const OptionalTensor skipped = tokens_beside("residual", add_x ? OptionalTensor(input) : residual, x, s_out);
  const OptionalTensor gates = tokens_beside("gate", gate, x, s_out), terms = tokens_beside("added", added, x, s_out);
  const OptionalTensor biases = vector_of("bias", bias, heads.count * s_out), factors = vector_of("scale", scale, c);
  const bool keeps = save && (gate || scale);
  Tensor y = torch::stable::new_empty(x, {batch, s_out, c}), saved = new_saved(x, s_out, keeps);
  if (batch == 0) return {y, saved};
  const Workspace workspace(norms.statistics_size(x) + converted_size(weight));
  FASTMIX_CHECK(workspace.data(), "token_linear: no memory for the weight");
  std::atomic<bool> no_memory{false};
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    TokenLinear<T> linear{norms.with<T>(input, workspace.data()), heads, s_out};
    linear.w = in_float32<T>(weights, workspace.data() + norms.statistics_size(x));
    linear.output = {tokens_of<T>(y),
                     {},
                     floats(biases),
                     floats(factors),
                     tokens_of<const T>(gates),
                     tokens_of<const T>(terms),
                     tokens_of<const T>(skipped)};
    if (keeps) linear.output.saved = tokens_of<Saved<T>>(saved);
    measure(linear.norm, batch);
    const int64_t panels = heads.panels();
    const int64_t grain = product_grain(2.0 * s * s_out * std::min(heads.channels, kPanelColumns));
    torch::stable::parallel_for(0, batch * panels, grain, [&](int64_t begin, int64_t end) {
      float* scratch = thread_scratch<float>(linear.scratch_size());
      if (!scratch) no_memory = true;
      for (int64_t i = begin; i < end && scratch; ++i) linear.panel(i / panels, i % panels, scratch);
    });
  });
  FASTMIX_CHECK(!no_memory, "token_linear: no memory for ", s, " x ", kPanelColumns, " float32");
  return {y, saved};
}

Gradients token_linear_bwd_cpu(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const OptionalTensor& gate, const OptionalTensor& added,
                               const OptionalTensor& scale, const Tensor& saved, int64_t norm, double eps, bool add_x,
                               bool input_grad, bool parameter_grads) {
  const NormArguments norms(x, norm, eps, norm_weight, norm_bias);
  const int64_t batch = x.size(0), s = x.size(1), c = x.size(2);
  const Tensor weights = weight_of("weight", weight, x, s);
  const int64_t s_out = weight.size(-2);
  const Heads heads = heads_of(weight, x);
  FASTMIX_CHECK(!add_x || s == s_out, "x is no residual of ", s_out, " tokens");
  const Tensor input = tokens_beside("x", x, x, s);
  const Tensor dy = torch::stable::contiguous(tokens_beside("grad_output", grad_output, x, s_out));
  const OptionalTensor gates = tokens_beside("gate", gate, x, s_out), terms = tokens_beside("added", added, x, s_out);
  const OptionalTensor biases = vector_of("bias", bias, heads.count * s_out), factors = vector_of("scale", scale, c);
  const bool all = parameter_grads;
  const OptionalTensor z = gate || scale ? OptionalTensor(saved_of(saved, x, s_out)) : std::nullopt;
  const Gradients gradients{like_or_none(x, x, input_grad),  like_or_none(weight, x, all),
                            like_or_none(bias, x, all),      like_or_none(norm_weight, x, all),
                            like_or_none(norm_bias, x, all), like_or_none(gate, x, true),
                            like_or_none(added, x, true),    like_or_none(scale, x, all)};
  const auto& [dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate, dadded, dscale] = gradients;
  const bool du_wanted = input_grad || (all && (norm_weight || norm_bias));
  const int64_t s_stride = round_up(s, kTileColumns);
  const auto sums_in = [&](Carver& carver) {
    TokenLinearSums sums{s_stride, carver.take(heads.count * s_out * s_stride, all)};
    sums.dbias = carver.take_like(dbias), sums.dscale = carver.take_like(dscale);
    sums.dnorm_weight = carver.take_like(dnorm_weight), sums.dnorm_bias = carver.take_like(dnorm_bias);
    return sums;
  };
  Carver counting(nullptr);
  sums_in(counting);
  const int64_t sums_size = counting.used();
  const Waves waves = make_waves(batch, heads.panels(), x.numel() * x.element_size(), sums_size);
  const int64_t weight_size = round_up(weight.numel(), kLanes);
  const Workspace workspace(weight_size + norms.statistics_size(x));
  const bool keeps_du = du_wanted && norms.kind == Norm::kLayer &&
                        !(input_grad && x.scalar_type() == torch::headeronly::ScalarType::Float);
  const auto partial = allocate<float>(waves.items() * sums_size);
  const auto du = allocate<float>(keeps_du ? waves.samples * s * c : 0);
  FASTMIX_CHECK(workspace.data() && partial && du, "token_linear: no memory for the gradients");
  std::atomic<bool> no_memory{false};
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    TokenLinearBackward<T> linear{{norms.with<T>(input, workspace.data() + weight_size)}, heads, s_out};
    const auto* w = static_cast<const T*>(weights.data_ptr());
    for (int64_t head = 0; head < heads.count; ++head) {
      transposed_in_float32(w + head * s_out * s, s_out, s, workspace.data() + head * s_out * s);
    }
    linear.wt = workspace.data();
    linear.scale = floats(factors), linear.dy = data_of<const T>(dy);
    linear.gate = tokens_of<const T>(gates), linear.z = z ? data_of<const Saved<T>>(*z) : nullptr;
    linear.dgate = data_of<T>(dgate), linear.dadded = data_of<T>(dadded);
    linear.input_grad = input_grad, linear.parameter_grads = all;
    linear.norm.dx = data_of<T>(dx), linear.norm.dy = add_x ? linear.dy : nullptr;
    linear.norm.du = keeps_du ? du.get() : du_wanted ? reinterpret_cast<float*>(linear.norm.dx) : nullptr;
    measure(linear.norm.norm, batch);
    std::array<float*, 5> pieces;
    const int64_t scratch_size = linear.carve(nullptr, pieces);
    const auto panels_of = [&](int64_t item, int64_t sample, int64_t slot, const TokenLinearSums& sums,
                               float* scratch) {
      for (int64_t panel = waves.begin(item); panel < waves.end(item); ++panel) {
        linear.panel(sample, slot, panel, sums, scratch);
      }
    };
    run_waves(waves, batch, 4.0 * s * s_out * c, linear.norm, keeps_du, partial.get(), sums_size, scratch_size,
              no_memory, sums_in, panels_of);
    if (!all || no_memory) return;
    Carver carver(partial.get());
    const TokenLinearSums first = sums_in(carver);
    sum_items(first.dw, waves.items(), sums_size, heads.count * s_out, s, s_stride, static_cast<T*>(dweight.data_ptr()),
              s, 1);
    sum_vector(first.dbias, waves.items(), sums_size, dbias);
    sum_vector(first.dnorm_weight, waves.items(), sums_size, dnorm_weight);
    sum_vector(first.dnorm_bias, waves.items(), sums_size, dnorm_bias);
    sum_vector(first.dscale, waves.items(), sums_size, dscale);
  });
  FASTMIX_CHECK(!no_memory, "token_linear: no memory for a panel of the backward");
  return gradients;
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("token_mixing_mlp", TORCH_BOX(&fastmix::token_mixing_mlp_cpu));
  m.impl("token_mixing_mlp_bwd", TORCH_BOX(&fastmix::token_mixing_mlp_bwd_cpu));
  m.impl("token_linear", TORCH_BOX(&fastmix::token_linear_cpu));
  m.impl("token_linear_bwd", TORCH_BOX(&fastmix::token_linear_bwd_cpu));
}
