"""Fourier mixing (FNet) and the global filter (GFNet): public functions, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._check import check_choice, check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops._route import call, data_is_visible, differentiate_backward, kernel_answers, note_kernels
from fastmix.reference import fft_mixing as reference

# The transform is divided by (S·H)^exponent.
_EXPONENTS = {"backward": 0.0, "ortho": 0.5, "forward": 1.0}


def fourier_mixing(x: Tensor, *, norm: str = "backward", lengths: Tensor | None = None) -> Tensor:
    """Real part of the two-dimensional discrete Fourier transform, FNet's token mixing.

    Equals ``torch.fft.fft2(x, norm=norm).real``, that is y = Re(F_S x F_H). The operator is symmetric: its
    gradient is the operator itself. float32 accumulation for bfloat16 and float16.

    Args:
        x: [..., S, H] tokens by channels, float32, bfloat16, float16 or float64; S, H ≥ 1.
        norm: "backward" (no factor, FNet's), "ortho" (1/√(S·H)) or "forward" (1/(S·H)).
        lengths: int32 or int64 of shape ``x.shape[:-2]``, values 0..S: transforms only each sample's first
            ``lengths[b]`` tokens, with the length ``lengths[b]`` in place of S in the factor. The other tokens
            come out 0, whatever they held.

    Returns:
        [..., S, H], x's dtype.

    Raises:
        TypeError: x is integer or complex, or lengths is not int32 or int64.
        ValueError: x has fewer than 2 dimensions or an empty one of the last two, norm is unknown, lengths has
            another shape, device or a value outside 0..S.

    Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms (arXiv:2105.03824).
    """
    check_float("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must be [..., S, H], got {shape_text(x)}")
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"x must have at least one token and one channel, got {shape_text(x)}")
    check_choice("norm", norm, tuple(_EXPONENTS))
    if lengths is not None:
        _check_lengths(lengths, x)
    if kernel_answers("fourier_mixing", x):
        return call(torch.ops.fastmix.fourier_mixing.default, x, lengths, _EXPONENTS[norm])
    return reference.fourier_mixing(x, norm=norm, lengths=lengths)


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution over the image plane by a learned filter in frequency space, GFNet's token mixing.

    Equals ``irfft2(rfft2(x, dim=(1, 2), norm="ortho") * weight, s=(h, w), dim=(1, 2), norm="ortho")``, computed in
    float32 for bfloat16 and float16, in x's dtype.

    Args:
        x: [B, h, w, C] images, channels last, float32, bfloat16, float16 or float64; h, w ≥ 1.
        weight: complex [h, w // 2 + 1, C], or the same as real and imaginary part, [h, w // 2 + 1, C, 2].

    Returns:
        [B, h, w, C], x's dtype.

    Raises:
        TypeError: x is integer or complex, weight is an integer tensor.
        ValueError: x is not 4-dimensional or has no pixel, weight has another shape or device.

    Rao et al., Global Filter Networks for Image Classification (arXiv:2107.00645).
    """
    check_float("x", x)
    if x.ndim != 4 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, h, w, C] with h, w ≥ 1, got {shape_text(x)}")
    check_tensor("weight", weight)
    if not (weight.is_complex() or weight.is_floating_point()):
        raise TypeError(f"weight must be complex or floating point, got {dtype_name(weight.dtype)}")
    expected = [x.shape[1], x.shape[2] // 2 + 1, x.shape[3]] + ([] if weight.is_complex() else [2])
    if list(weight.shape) != expected:
        kind = "[h, w // 2 + 1, C]" if weight.is_complex() else "[h, w // 2 + 1, C, 2]"
        raise ValueError(f"weight must be {kind} = {expected}, got {shape_text(weight)}")
    check_same_device("weight", weight, "x", x)
    if kernel_answers("global_filter", x):
        if weight.is_complex():
            weight = torch.view_as_real(weight.resolve_conj())
        return call(torch.ops.fastmix.global_filter.default, x, weight.to(torch.float32))
    return reference.global_filter(x, weight)


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    check_tensor("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {dtype_name(lengths.dtype)}")
    if lengths.shape != x.shape[:-2]:
        raise ValueError(f"lengths must have the shape x.shape[:-2] = {list(x.shape[:-2])}, got {shape_text(lengths)}")
    check_same_device("lengths", lengths, "x", x)
    # Where values can't be read (compiling, capturing a CUDA graph, vmap), the op itself checks them.
    if lengths.numel() > 0 and data_is_visible(lengths):
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > x.shape[-2]:
            raise ValueError(f"lengths must be in 0..S = 0..{x.shape[-2]}, got values from {low} to {high}")


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("fastmix::fourier_mixing", "(Tensor x, Tensor? lengths, float exponent) -> Tensor", tags=_TAGS)
torch.library.define("fastmix::global_filter", "(Tensor x, Tensor weight) -> Tensor", tags=_TAGS)
torch.library.define(
    "fastmix::global_filter_bwd", "(Tensor grad_output, Tensor x, Tensor weight) -> (Tensor, Tensor)", tags=_TAGS
)


@torch.library.register_fake("fastmix::fourier_mixing")
def _(x, lengths, exponent):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastmix::global_filter")
def _(x, weight):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastmix::global_filter_bwd")
def _(grad_output, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_fourier_mixing(ctx, inputs, output):
    _, lengths, ctx.exponent = inputs
    ctx.save_for_backward(lengths)


def _fourier_mixing_bwd(ctx, grad_output):
    # The operator is its own transpose, at any order.
    return torch.ops.fastmix.fourier_mixing.default(grad_output, *ctx.saved_tensors, ctx.exponent), None, None


def _save_global_filter(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _global_filter_bwd(ctx, grad_output):
    return torch.ops.fastmix.global_filter_bwd.default(grad_output, *ctx.saved_tensors)


torch.library.register_autograd("fastmix::fourier_mixing", _fourier_mixing_bwd, setup_context=_save_fourier_mixing)
torch.library.register_autograd("fastmix::global_filter", _global_filter_bwd, setup_context=_save_global_filter)
differentiate_backward("global_filter_bwd", reference.global_filter, num_inputs=2)
for _op in ("fourier_mixing", "global_filter", "global_filter_bwd"):
    note_kernels(_op)
