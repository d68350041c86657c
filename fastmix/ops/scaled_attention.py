"""Scaled attention: public function, schemas, fakes, gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix import _library
from fastmix.ops import _attention as check
from fastmix.ops._attention import RelativeBias, Rotary
from fastmix.ops._check import check_choice
from fastmix.ops._route import autocast, call, differentiate_backward, kernel_answers, needs_gradient, note_kernels
from fastmix.reference import scaled_attention as reference


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    causal_alignment: str = "top_left",
    prefix_len: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_start: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    relative_bias: RelativeBias | None = None,
    rotary: Rotary | None = None,
    query_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention softmax(scale · query·keyᵀ + bias)·value, with structure in place of dense masks.

    Begins as ``F.scaled_dot_product_attention`` does and means the same. A pair of query i and key j is attended where
    everything given allows it; with p_i, the query's place among the keys (causal_alignment), score[i, j] = scale ·
    query_scale[i] · (rotary(query_i) · rotary(key_j)) + attn_mask[i, j] + relative_bias(j − p_i). A row that attends to
    nothing gives 0, and so do its gradients; what nobody attends to may hold NaN. Sums are float32 for bfloat16 and
    float16, and results do not depend on the number of threads.

    Args:
        query: [B, H, T, D], float32, bfloat16, float16 or float64. B and H may be missing or 1 in any of the three.
        key: [B, Hkv, S, D], query's dtype; H is a multiple of Hkv.
        value: [B, Hkv, S, Dv], query's dtype.
        attn_mask: broadcastable to [B, H, T, S]: bool (True = attend), or a float bias in float32 or query's dtype,
            which gets a gradient of its own shape; −inf masks.
        dropout_p: probability of dropping a weight, 0..1.
        is_causal: query i attends to keys j ≤ p_i.
        scale: factor of the products, 1/√D by default.
        enable_gqa: whether Hkv may be a proper divisor of H other than 1.
        causal_alignment: "top_left": p_i = i. "bottom_right": the last query stands at the last key, p_i = i + S − T,
            with each sequence's lengths in place of S and T. Also what window, relative_bias and rotary count from.
        prefix_len: int [B], 0..S: UniLM's mask; all queries attend to the first prefix_len keys, to the rest causally.
        query_lengths: int [B], 0..T: queries from here on are padding and attend to nothing.
        key_lengths: int [B], 0..S: keys from here on are padding.
        key_start: int [B], 0..S: keys before are padding.
        window_size: (left, right): p_i − left ≤ j ≤ p_i + right; −1 is unlimited.
        relative_bias: T5's, by :class:`RelativeBias`.
        rotary: rotary position embedding, by :class:`Rotary`.
        query_scale: [T] or [B, T], times scale, for example log(n)/log(512); any floating-point dtype.
        cu_seqlens_q: int [N + 1], 0 = cu[0] ≤ … ≤ T: packed sequences with B = 1; rows cu[n] ≤ i < cu[n + 1] attend
            within sequence n only. Then prefix_len is [N], places count within the sequence, and query_lengths,
            key_lengths and key_start are refused.
        cu_seqlens_k: the same of the keys; both or neither.
        dropout_seed: int or int64 tensor of one element. Which weights are dropped depends on seed and position alone,
            by Philox4x32-10, on every device; drawn at random by default.
        return_lse: also return the log-sum-exp of the scores, differentiable.

    Returns:
        [B, H, T, Dv], query's dtype; with return_lse also [B, H, T] in float32 (float64 for float64), −inf where
        nothing is attended. Under autocast query, key and value are cast. A plain case that PyTorch's own kernels
        compute faster goes to them.

    Raises:
        TypeError: a tensor has a wrong dtype, or an option a wrong type.
        ValueError: a shape or device does not fit, or an option's value is out of range; the text names it. Values of
            integer tensors are checked on a CPU; on a GPU, where that would wait for the device, they are clamped.

    Vaswani et al., Attention Is All You Need (arXiv:1706.03762); Dong et al., Unified Language Model Pre-training
    (arXiv:1905.03197); Dao, FlashAttention-2 (arXiv:2307.08691).
    """
    dims = max(x.ndim if isinstance(x, Tensor) else 4 for x in (query, key, value))
    query, key, value = check.broadcast_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        check.check_mask(attn_mask, query, key)
    check.check_dropout(dropout_p, dropout_seed, query)
    check_choice("causal_alignment", causal_alignment, ("top_left", "bottom_right"))
    options = {"prefix_len": prefix_len, "query_lengths": query_lengths, "key_lengths": key_lengths}
    options |= {"key_start": key_start, "window_size": window_size, "relative_bias": relative_bias, "rotary": rotary}
    options |= {"query_scale": query_scale, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        check.check_options(query, key, **options)
    query, key, value = autocast(query, key, value)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        attn_mask = attn_mask.float()  # of the dtype that query had before
    plain = not (options or dropout_p or return_lse) and attn_mask is None
    if plain and (causal_alignment == "top_left" or not is_causal) and _sdpa_is_faster(query, key, value):
        gqa = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa)
        return output.reshape(output.shape[4 - dims :])
    if dropout_p == 1:  # nothing is left
        value, dropout_p = value * 0, 0.0
    options |= {"causal_alignment": causal_alignment, "dropout_seed": dropout_seed}
    arguments = reference.op_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, **options)
    trained_table = rotary is not None and needs_gradient(rotary.cos, rotary.sin)
    widest = query if query.shape[3] >= value.shape[3] else value
    if kernel_answers("scaled_attention", widest) and not trained_table:
        output, lse, _ = call(torch.ops.fastmix.scaled_attention.default, *arguments)
    else:
        output, lse = reference.attend(*arguments)
    if dims < 4:
        output, lse = output.reshape(output.shape[4 - dims :]), lse.reshape(lse.shape[4 - dims :])
    return (output, lse) if return_lse else output


def _sdpa_is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """On a GPU cuDNN's and FlashAttention's kernels serve plain attention until ours is measured to be faster."""
    return query.is_cuda and query.numel() > 0 and key.numel() > 0 and query.shape[3] == value.shape[3]


# Schemas, fakes, gradients. lse_rest is what float32 rounds off lse, or of no elements. The backward returns gradients
# of query, key, value, attn_mask, bias_table and query_scale, the last three of no elements unless asked for.

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias_table, Tensor? query_scale"
_NUM_TENSORS = 6
_OPTIONS = (
    "Tensor? cos, Tensor? sin, Tensor? query_positions, Tensor? key_positions, Tensor? prefix_len, "
    "Tensor? query_lengths, Tensor? key_lengths, Tensor? key_start, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? dropout_seed, float scale, float dropout_p, bool causal, bool bottom_right, int window_left, "
    "int window_right, bool interleaved"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("fastmix::scaled_attention", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
torch.library.define(
    "fastmix::scaled_attention_bwd",
    f"(Tensor grad_output, Tensor? grad_lse, {_TENSORS}, Tensor output, Tensor lse, Tensor lse_rest, {_OPTIONS}, "
    f"bool mask_grad, bool bias_grad, bool query_scale_grad) -> ({', '.join(['Tensor'] * _NUM_TENSORS)})",
    tags=_TAGS,
)


def _empty_heads(like: Tensor, b: int, h: int, t: int, d: int) -> Tensor:
    """[B, H, T, D] whose heads of a token lie side by side, as the projection that follows reads them."""
    return like.new_empty(b, t, h, d).transpose(1, 2)


@torch.library.register_fake("fastmix::scaled_attention")
def _(query, key, value, *options):
    b, h, t, _ = query.shape
    lse = query.new_empty(b, h, t, dtype=torch.float32)
    without_rest = query.is_cuda and query.dtype != torch.float32
    return _empty_heads(query, b, h, t, value.shape[3]), lse, lse.new_empty(0 if without_rest else lse.shape)


@torch.library.register_fake("fastmix::scaled_attention_bwd")
def _(grad_output, grad_lse, query, key, value, attn_mask, bias_table, query_scale, *others):
    asked = zip((attn_mask, bias_table, query_scale), others[-3:], strict=True)
    return (
        *(_empty_heads(x, *x.shape) for x in (query, key, value)),
        *(x.new_empty(x.shape) if needed else query.new_empty(0, dtype=torch.float32) for x, needed in asked),
    )


def _save(ctx, inputs, output):
    options = inputs[_NUM_TENSORS:]
    ctx.options = [None if isinstance(option, Tensor) else option for option in options]
    tensors = [option if isinstance(option, Tensor) else None for option in options]
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output, *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse, _):
    needs = ctx.needs_input_grad
    if grad_output is None and grad_lse is None:
        return (None,) * len(needs)
    saved = ctx.saved_tensors
    inputs, others = saved[: _NUM_TENSORS + 3], saved[_NUM_TENSORS + 3 :]
    options = [value if tensor is None else tensor for tensor, value in zip(others, ctx.options, strict=True)]
    if grad_output is None:
        grad_output = torch.zeros_like(inputs[_NUM_TENSORS])
    op_bwd = torch.ops.fastmix.scaled_attention_bwd.default
    grads = call(op_bwd, grad_output, grad_lse, *inputs, *options, *needs[3:_NUM_TENSORS])
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return *grads, *(None,) * (len(needs) - _NUM_TENSORS)


torch.library.register_autograd("fastmix::scaled_attention", _backward, setup_context=_save)
differentiate_backward(
    "scaled_attention_bwd",
    lambda *arguments: reference.attend(*arguments[:-3]),
    num_inputs=_NUM_TENSORS,
    num_saved=3,
    num_outputs=2,
)


def _scaled_attention_cuda(*arguments):
    from tritonkernels import scaled_attention as triton_kernels

    return triton_kernels.scaled_attention(*arguments)


def _scaled_attention_bwd_cuda(*arguments):
    from tritonkernels import scaled_attention as triton_kernels

    return triton_kernels.scaled_attention_bwd(*arguments)


_GPU_MAX_HEAD_SIZE = 256
if _library.triton_serves:
    torch.library.impl("fastmix::scaled_attention", "CUDA", _scaled_attention_cuda)
    torch.library.impl("fastmix::scaled_attention_bwd", "CUDA", _scaled_attention_bwd_cuda)
note_kernels("scaled_attention", lambda widest: widest.is_cpu or widest.shape[3] <= _GPU_MAX_HEAD_SIZE)
note_kernels("scaled_attention_bwd")
