"""Fourier mixing (FNet) and the global filter (GFNet): public functions, schemas, fakes, gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmix import _library
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
    return call(torch.ops.fastmix.fourier_mixing.default, grad_output, *ctx.saved_tensors, ctx.exponent), None, None


def _save_global_filter(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _global_filter_bwd(ctx, grad_output):
    return call(torch.ops.fastmix.global_filter_bwd.default, grad_output, *ctx.saved_tensors)


torch.library.register_autograd("fastmix::fourier_mixing", _fourier_mixing_bwd, setup_context=_save_fourier_mixing)
torch.library.register_autograd("fastmix::global_filter", _global_filter_bwd, setup_context=_save_global_filter)
differentiate_backward("global_filter_bwd", reference.global_filter, num_inputs=2)

# On a GPU outputs and workspaces are allocated here, so that running out of memory is torch.OutOfMemoryError. The sizes
# are those of csrc/cuda/*_launch.h, which checks them; a workspace has room for the samples that go through together.
_GROUP_FLOATS = 5 << 20  # 20 MiB, which stay in the L2 cache between the passes


def _fourier_mixing_cuda(x, lengths, exponent):
    s, h = x.shape[-2:]
    samples = x.contiguous().view(-1, s, h)
    if choose(s, h, x.dtype, lengths is not None) == "triton":
        from tritonkernels.fft_mixing import fourier_mixing_dense

        return fourier_mixing_dense(samples, (s * h) ** -exponent).view(x.shape)
    size = _round_up(s * (h // 2 + 1), 4)
    if lengths is not None:
        lengths = lengths.reshape(-1).to(torch.int64)
        size += _round_up(16 + 12 * (1 << (2 * s - 1).bit_length()) + 2 * s, 4)  # a sample's own tables
    out = torch.empty_like(samples)
    workspace = _workspace(x, size, samples.shape[0])
    torch.ops.fastmix.fourier_mixing_out.default(samples, lengths, exponent, workspace, out)
    return out.view(x.shape)


def _global_filter_cuda(x, weight):
    batch, h, w, c = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    workspace = _workspace(x, 0 if _on_chip(h, w) else h * w * _round_up(c, 2), batch)
    torch.ops.fastmix.global_filter_out.default(x, weight, False, workspace, out)
    return out


def _global_filter_bwd_cuda(grad_output, x, weight):
    batch, h, w, c = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    if _on_chip(h, w) and h * w <= 2816:
        parts = min(batch, max(1, 512 // max(1, -(-c // 16))))  # of the batch, each with its own sum for dweight
        workspace = x.new_empty(parts * dweight.numel(), dtype=torch.float32)
    else:
        workspace = _workspace(x, h * w * _round_up(c, 2) * 2, batch)
    torch.ops.fastmix.global_filter_bwd_out.default(grad_output.contiguous(), x, weight, workspace, dx, dweight)
    return dx, dweight


def choose(s: int, h: int, dtype: torch.dtype, with_lengths: bool) -> str:
    """Who transforms on a GPU: "triton" (dense, on tensor cores) or "cuda" (butterflies in shared memory).

    By counted work, not yet by measurement; docs/decisions.md has the count.
    """
    dense = s <= 1024 and h <= 1024 and dtype != torch.float32 and not with_lengths
    return "triton" if dense and _library.has_triton else "cuda"


def _workspace(x: Tensor, floats: int, samples: int) -> Tensor:
    return x.new_empty(floats * min(samples, max(1, _GROUP_FLOATS // max(1, floats))), dtype=torch.float32)


@functools.cache
def _on_chip(h: int, w: int) -> bool:
    """Whether an image is transformed in shared memory: small, and without a prime factor above 13."""
    smooth = 2**12 * 3**8 * 5**6 * 7**5 * 11**4 * 13**4  # a multiple of every such number up to 4096
    return h * w <= 4096 and smooth % h == 0 and smooth % w == 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


if _library.cuda_loaded:
    torch.library.impl("fastmix::fourier_mixing", "CUDA", _fourier_mixing_cuda)
    torch.library.impl("fastmix::global_filter", "CUDA", _global_filter_cuda)
    torch.library.impl("fastmix::global_filter_bwd", "CUDA", _global_filter_bwd_cuda)
_GPU_MAX_LENGTH = 8192  # of a transform in shared memory
note_kernels("fourier_mixing", lambda x: x.is_cpu or max(x.shape[-2:]) <= _GPU_MAX_LENGTH)
note_kernels("global_filter", lambda x: x.is_cpu or max(x.shape[1:3]) <= _GPU_MAX_LENGTH)
note_kernels("global_filter_bwd")
