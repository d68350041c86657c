"""Convolution along the tokens (depthwise, lightweight, dynamic): public function, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_choice, check_float, check_same_device, dtype_name, shape_text
from fastmix.ops._route import autocast, call, differentiate_backward, kernel_answers, note_kernels
from fastmix.reference import token_conv as reference

# Kind → the form of its kernel.
_KINDS = {"depthwise": "[C, K]", "lightweight": "[H, K]", "dynamic": "[B, S, H, K]"}


def token_conv(x: Tensor, kernel: Tensor, *, kind: str = "depthwise", causal: bool = False) -> Tensor:
    """Convolution along the tokens, each channel on its own: the mixers of Pre-trained Convolutions.

    y[b, s, c] = Σ_k w[k]·x[b, s + k − offset, c], where x is 0 outside of the sequence; offset is K − 1 if causal, else
    (K − 1) // 2, so that an even K sees one token more after s than before it. The weights w are the channel's kernel
    ("depthwise"), or softmax(kernel) over K, shared by the C/H neighbouring channels of a head and by all tokens
    ("lightweight") or predicted for each token ("dynamic"). A softmax is over all K, also where the window leaves the
    sequence, as in the paper's code. It is a cross-correlation, as in PyTorch: with ``w = kernel``, or
    ``kernel.softmax(-1).repeat_interleave(C // H, 0)`` for "lightweight", equals
    ``F.conv1d(F.pad(x.mT, (offset, K - 1 - offset)), w[:, None], groups=C).mT``. Sums are float32 for half dtypes.

    Args:
        x: [B, S, C] tokens by channels, float32, bfloat16, float16 or float64.
        kernel: [C, K] of "depthwise", [H, K] of "lightweight", [B, S, H, K] of "dynamic", x's dtype; K ≥ 1, also larger
            than S, and C a multiple of H ≥ 1.
        kind: "depthwise", "lightweight" or "dynamic".
        causal: a token sees itself and the K − 1 before it.

    Returns:
        [B, S, C], x's dtype. Under autocast x and kernel are cast.

    Raises:
        TypeError: x or kernel is no floating-point tensor, kernel has another dtype than x, or causal is no bool.
        ValueError: x is not 3-dimensional, kind is unknown, or kernel has another shape or device.

    Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions (arXiv:1901.10430); Tay et al., Are
    Pre-trained Convolutions Better than Pre-trained Transformers? (arXiv:2105.03322).
    """
    check_float("x", x)
    check_float("kernel", kernel)
    x, kernel = autocast(x, kernel)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, S, C], got {shape_text(x)}")
    check_choice("kind", kind, tuple(_KINDS))
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if kernel.dtype != x.dtype:
        raise TypeError(f"kernel must have the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(kernel.dtype)}")
    _check_kernel(kernel, x, kind)
    check_same_device("kernel", kernel, "x", x)
    if kernel_answers("token_conv", x):
        return call(torch.ops.fastmix.token_conv.default, x, kernel, kind, causal)
    return reference.token_conv(x, kernel, kind=kind, causal=causal)


def _check_kernel(kernel: Tensor, x: Tensor, kind: str) -> None:
    b, s, c = x.shape
    # The sizes that x determines; H and K are the kernel's own.
    known = {"depthwise": [c], "lightweight": [], "dynamic": [b, s]}[kind]
    form = _KINDS[kind]
    if kernel.ndim != form.count(",") + 1 or list(kernel.shape[: len(known)]) != known or kernel.shape[-1] == 0:
        sizes = (
            form if not known else f"{form} = [{', '.join([*map(str, known), *form[1:-1].split(', ')[len(known) :]])}]"
        )
        raise ValueError(f"kernel must be {sizes} with K ≥ 1 if kind is {kind!r}, got {shape_text(kernel)}")
    heads = kernel.shape[-2]
    if kind != "depthwise" and (heads == 0 or c % heads != 0):
        raise ValueError(f"kernel must be {form} with C = {c} a multiple of H ≥ 1, got {heads} heads")


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("fastmix::token_conv", "(Tensor x, Tensor kernel, str kind, bool causal) -> Tensor", tags=_TAGS)
torch.library.define(
    "fastmix::token_conv_bwd",
    "(Tensor grad_output, Tensor x, Tensor kernel, str kind, bool causal) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("fastmix::token_conv")
def _(x, kernel, kind, causal):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastmix::token_conv_bwd")
def _(grad_output, x, kernel, kind, causal):
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.kind, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output):
    op = torch.ops.fastmix.token_conv_bwd.default
    return *call(op, grad_output, *ctx.saved_tensors, ctx.kind, ctx.causal), None, None


def _reference(x, kernel, kind, causal):
    """With the op's arguments."""
    return reference.token_conv(x, kernel, kind=kind, causal=causal)


torch.library.register_autograd("fastmix::token_conv", _backward, setup_context=_save)
differentiate_backward("token_conv_bwd", _reference, num_inputs=2)


def _token_conv_cuda(x, kernel, kind, causal):
    from tritonkernels import token_conv as triton_kernels

    return triton_kernels.token_conv(x, kernel, kind != "depthwise", causal)


def _token_conv_bwd_cuda(grad_output, x, kernel, kind, causal):
    from tritonkernels import token_conv as triton_kernels

    return triton_kernels.token_conv_bwd(grad_output, x, kernel, kind != "depthwise", causal)


if _library.triton_serves:
    torch.library.impl("fastmix::token_conv", "CUDA", _token_conv_cuda)
    torch.library.impl("fastmix::token_conv_bwd", "CUDA", _token_conv_bwd_cuda)
for _name in ("token_conv", "token_conv_bwd"):
    note_kernels(_name)
