"""External attention: public function, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_float, check_same_device, dtype_name, shape_text
from fastmix.ops._route import autocast, call, differentiate_backward, kernel_answers, needs_gradient, note_kernels
from fastmix.reference import external_attention as reference


def external_attention(x: Tensor, mk: Tensor, mv: Tensor, *, num_heads: int = 1) -> Tensor:
    """Attention of the tokens to a learned memory, which all samples and heads share.

    For a head's channels x_h [S, C/heads]: P = softmax(x_h·mkᵀ) over the *tokens*, A = P / (1e-9 + Σ P over the slots),
    y_h = A·mv. One head equals ``p = (x @ mk.T).softmax(-2); y = p / (1e-9 + p.sum(-1, keepdim=True)) @ mv``. Sums
    are float32 for bfloat16 and float16.

    Args:
        x: [B, S, C] tokens by channels, float32, bfloat16, float16 or float64.
        mk: [M, C/heads] the memory's keys, x's dtype; M ≥ 1.
        mv: [M, C/heads] the memory's values, x's dtype.
        num_heads: number of heads, a divisor of C.

    Returns:
        [B, S, C], x's dtype. Under autocast x, mk and mv are cast.

    Raises:
        TypeError: a tensor is no floating-point tensor, mk or mv has another dtype than x, or num_heads is no int.
        ValueError: x is not 3-dimensional or has no channel, num_heads is no divisor of C, or mk or mv has another
            shape or device.

    Guo et al., Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks (arXiv:2105.02358).
    """
    check_float("x", x)
    check_float("mk", mk)
    check_float("mv", mv)
    x, mk, mv = autocast(x, mk, mv)
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, S, C] with C ≥ 1, got {shape_text(x)}")
    c = x.shape[2]
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or c % num_heads != 0:
        raise ValueError(f"num_heads must be a divisor of C = {c}, got {num_heads}")
    size = c // num_heads
    _check_memory("mk", mk, x, size)
    _check_memory("mv", mv, x, size)
    if mv.shape != mk.shape:
        raise ValueError(f"mv must have as many rows as mk, {mk.shape[0]}, got {shape_text(mv)}")
    if kernel_answers("external_attention", mk):
        save = needs_gradient(x, mk, mv)
        return call(torch.ops.fastmix.external_attention.default, x, mk, mv, num_heads, save)[0]
    return reference.external_attention(x, mk, mv, num_heads=num_heads)


def _check_memory(name: str, memory: Tensor, x: Tensor, size: int) -> None:
    if memory.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(memory.dtype)}")
    check_same_device(name, memory, "x", x)
    if memory.ndim != 2 or memory.shape[0] == 0 or memory.shape[1] != size:
        raise ValueError(f"{name} must be [M, C/num_heads] = [M, {size}] with M ≥ 1, got {shape_text(memory)}")


# `saved` is what the forward keeps for the backward, of no elements where it keeps nothing: on a CPU the softmax over
# the tokens [B, heads, S, M rounded up to 16], on a GPU the largest logits and sums of exponentials [B, heads, 2, M].
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "fastmix::external_attention",
    "(Tensor x, Tensor mk, Tensor mv, int num_heads, bool save) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::external_attention_bwd",
    "(Tensor grad_output, Tensor x, Tensor mk, Tensor mv, Tensor saved, int num_heads) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("fastmix::external_attention")
def _(x, mk, mv, num_heads, save):
    (b, s, _), m = x.shape, mk.shape[0]
    kept = [2, m] if x.is_cuda else [s, _round_up(m, 16)]
    return x.new_empty(x.shape), x.new_empty([b, num_heads, *kept] if save else [0], dtype=torch.float32)


@torch.library.register_fake("fastmix::external_attention_bwd")
def _(grad_output, x, mk, mv, saved, num_heads):
    return x.new_empty(x.shape), mk.new_empty(mk.shape), mv.new_empty(mv.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.num_heads, _ = inputs
    saved = output[1]
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return None, None, None, None, None
    grads = call(torch.ops.fastmix.external_attention_bwd.default, grad_output, *ctx.saved_tensors, ctx.num_heads)
    return *grads, None, None


torch.library.register_autograd("fastmix::external_attention", _backward, setup_context=_save)
differentiate_backward(
    "external_attention_bwd",
    lambda x, mk, mv, num_heads: reference.external_attention(x, mk, mv, num_heads=num_heads),
    num_inputs=3,
    num_saved=1,
)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _external_attention_cuda(x, mk, mv, num_heads, save):
    from tritonkernels import external_attention as triton_kernels

    y, statistics = triton_kernels.external_attention(x, mk, mv, num_heads)
    return y, statistics if save else statistics.new_empty(0)


def _external_attention_bwd_cuda(grad_output, x, mk, mv, saved, num_heads):
    from tritonkernels import external_attention as triton_kernels

    return triton_kernels.external_attention_bwd(grad_output, x, mk, mv, saved, num_heads)


if _library.triton_serves:
    torch.library.impl("fastmix::external_attention", "CUDA", _external_attention_cuda)
    torch.library.impl("fastmix::external_attention_bwd", "CUDA", _external_attention_bwd_cuda)
_GPU_MAX_MEMORY = 256  # slots, which a program holds together
note_kernels("external_attention", lambda mk: mk.is_cpu or mk.shape[0] <= _GPU_MAX_MEMORY)
note_kernels("external_attention_bwd")
