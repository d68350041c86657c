"""Per-sample gradient norms of a convolution: public functions, schemas, fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._check import shape_text
from fastmix.ops._route import call, kernel_answers, needs_gradient, note_kernels
from fastmix.ops.grad_norm import check_pair, check_sample_weight
from fastmix.reference import conv_grad_norm as reference

Sizes = int | tuple[int, ...]


def conv_weight_grad_with_norm(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's weight and the squared norm of every sample's part of it, in one pass.

    dW = Σ_b s_b·dW_b and ‖dW_b‖², where dW_b = ``torch.nn.grad.conv2d_weight(input[b:b+1], …, grad_output[b:b+1])``
    and s are the sample weights, which do not enter the norms. A transposed convolution's weight has the gradient of a
    convolution with input and grad_output exchanged. Accumulated in float32 for bfloat16 and float16, and returned so.
    Differentiable (by the reference).

    Args:
        input: [B, I, *spatial] with one to three spatial dimensions, float32, bfloat16, float16 or float64; padded
            already unless with zeros.
        grad_output: [B, O, *spatial] the gradient of the convolution's output, input's dtype.
        kernel_size: the weight's spatial sizes, an int or one for each spatial dimension, as are the following.
        stride: the convolution's.
        padding: the convolution's, with zeros.
        dilation: the convolution's.
        groups: the convolution's, a divisor of I and of O.
        sample_weight: [B] floating-point factors s; None: 1.

    Returns:
        dW [O, I/groups, *kernel_size] and the squared norms [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: sizes that no convolution with these options has, or sample_weight is not [B].

    Rochette et al., Efficient Per-Example Gradient Computations in Convolutional Neural Networks (arXiv:1912.06015).
    """
    sizes = _check(input, grad_output, kernel_size, stride, padding, dilation, groups)
    if sample_weight is not None:
        sample_weight = check_sample_weight(sample_weight, input)
    op = "conv_weight_grad_with_norm"
    if kernel_answers(op, input) and not needs_gradient(input, grad_output, sample_weight):
        a, g, *lifted = _lift(input, grad_output, sizes)
        dw, norm_sq = call(torch.ops.fastmix.conv_weight_grad_with_norm.default, a, g, sample_weight, *lifted, groups)
        return dw.view(*dw.shape[:2], *sizes[0]), norm_sq
    options = dict(zip(("stride", "padding", "dilation"), sizes[1:], strict=True))
    return reference.conv_weight_grad_with_norm(
        input, grad_output, sizes[0], **options, groups=groups, sample_weight=sample_weight
    )


def conv_weight_grad_sample(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Every sample's own gradient of a convolution's weight, where that is small enough to be kept.

    dW_b = ``torch.nn.grad.conv2d_weight(input[b:b+1], …, grad_output[b:b+1])``, accumulated in float32 for bfloat16 and
    float16, and returned so. Differentiable (by the reference).

    Args:
        input: [B, I, *spatial], and the further arguments: as of `conv_weight_grad_with_norm`.
        grad_output: [B, O, *spatial].
        kernel_size: the weight's spatial sizes.
        stride: the convolution's.
        padding: the convolution's, with zeros.
        dilation: the convolution's.
        groups: the convolution's.

    Returns:
        [B, O, I/groups, *kernel_size], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: sizes that no convolution with these options has.

    Rochette et al., Efficient Per-Example Gradient Computations in Convolutional Neural Networks (arXiv:1912.06015).
    """
    sizes = _check(input, grad_output, kernel_size, stride, padding, dilation, groups)
    if kernel_answers("conv_weight_grad_sample", input) and not needs_gradient(input, grad_output):
        a, g, *lifted = _lift(input, grad_output, sizes)
        grads = call(torch.ops.fastmix.conv_weight_grad_sample.default, a, g, *lifted, groups)
        return grads.view(*grads.shape[:3], *sizes[0])
    options = dict(zip(("stride", "padding", "dilation"), sizes[1:], strict=True))
    return reference.conv_weight_grad_sample(input, grad_output, sizes[0], **options, groups=groups)


def _lift(input: Tensor, grad_output: Tensor, sizes: list[tuple[int, ...]]) -> tuple[Tensor | list[int], ...]:
    """The ops know three spatial dimensions; missing ones have size 1."""
    missing = 5 - input.ndim
    tensors = (tensor.view(*tensor.shape[:2], *[1] * missing, *tensor.shape[2:]) for tensor in (input, grad_output))
    return *tensors, *([fill] * missing + list(size) for fill, size in zip((1, 1, 0, 1), sizes, strict=True))


def conv_grad_norm_sq(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
) -> Tensor:
    """Squared norm of every sample's gradient of a convolution: of its weight, and of its bias.

    ‖dW_b‖² + ‖Σ g_b over the positions‖², dW_b as in `conv_weight_grad_with_norm`.

    Args:
        input: [B, I, *spatial], and the further arguments: as of `conv_weight_grad_with_norm`.
        grad_output: [B, O, *spatial].
        kernel_size: the weight's spatial sizes.
        stride: the convolution's.
        padding: the convolution's, with zeros.
        dilation: the convolution's.
        groups: the convolution's.
        bias: whether the bias's part counts.

    Returns:
        [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: sizes that no convolution with these options has.

    Rochette et al., Efficient Per-Example Gradient Computations in Convolutional Neural Networks (arXiv:1912.06015).
    """
    _, norm_sq = conv_weight_grad_with_norm(
        input, grad_output, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return norm_sq + grad_output.flatten(2).sum(2, dtype=norm_sq.dtype).square().sum(1) if bias else norm_sq


def _check(input, grad_output, kernel_size, stride, padding, dilation, groups) -> list[tuple[int, ...]]:
    """The sizes of kernel, stride, padding and dilation for each spatial dimension."""
    check_pair(input, grad_output)
    if not 3 <= input.ndim <= 5:
        raise ValueError(f"input must be [B, I, *spatial] with 1 to 3 spatial dimensions, got {shape_text(input)}")
    if grad_output.ndim != input.ndim or len(grad_output) != len(input):
        raise ValueError(
            f"grad_output must be [B, O, *spatial] with B and the dimensions of input, {shape_text(input)}, "
            f"got {shape_text(grad_output)}"
        )
    spatial = input.ndim - 2
    values = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    options = [_expand(name, value, spatial, minimum=int(name != "padding")) for name, value in values.items()]
    channels = input.shape[1], grad_output.shape[1]
    if not isinstance(groups, int) or groups < 1 or any(size % groups for size in channels):
        raise ValueError(f"groups must divide I = {channels[0]} and O = {channels[1]}, got {groups!r}")
    expected = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(input.shape[2:], *options, strict=True)
    ]
    if list(grad_output.shape[2:]) != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"grad_output must be [B, O, {sizes}] for these options, got {shape_text(grad_output)}")
    return options


def _expand(name: str, value: Sizes, spatial: int, minimum: int) -> tuple[int, ...]:
    sizes = (value,) * spatial if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != spatial or not all(isinstance(size, int) and size >= minimum for size in sizes):
        raise ValueError(f"{name} must be an int ≥ {minimum} or {spatial} of them, got {value!r}")
    return sizes


_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPTIONS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
torch.library.define(
    "fastmix::conv_weight_grad_with_norm",
    f"(Tensor input, Tensor grad_output, Tensor? sample_weight, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::conv_weight_grad_sample", f"(Tensor input, Tensor grad_output, {_OPTIONS}) -> Tensor", tags=_TAGS
)


@torch.library.register_fake("fastmix::conv_weight_grad_with_norm")
def _(input, grad_output, sample_weight, kernel_size, stride, padding, dilation, groups):
    shape = [grad_output.shape[1], input.shape[1] // groups, *kernel_size]
    dw = input.new_empty(shape, dtype=torch.float32)
    return dw, dw.new_empty(input.shape[0])


@torch.library.register_fake("fastmix::conv_weight_grad_sample")
def _(input, grad_output, kernel_size, stride, padding, dilation, groups):
    shape = [input.shape[0], grad_output.shape[1], input.shape[1] // groups, *kernel_size]
    return input.new_empty(shape, dtype=torch.float32)


for _name in ("conv_weight_grad_with_norm", "conv_weight_grad_sample"):
    note_kernels(_name)
