"""Per-sample gradients of a normalisation layer's scale and shift: public functions, schema, fake."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_float, check_same_device, shape_text
from fastmix.ops._route import call, kernel_answers, needs_gradient, note_kernels
from fastmix.ops.grad_norm import check_pair
from fastmix.reference import affine_grad_norm as reference


def affine_grad_norm_sq(input: Tensor, grad_output: Tensor, *, channel_dim: int = -1, bias: bool = True) -> Tensor:
    """Squared norm of every sample's gradient of a normalisation layer's scale and shift.

    For y = x̂·γ + β, the end of LayerNorm, RMSNorm, GroupNorm and InstanceNorm: ‖Σ g·x̂‖² + ‖Σ g‖² for each sample, sums
    over its positions, norms over the channels. float32 for bfloat16 and float16. Differentiable (by the reference).

    Args:
        input: [B, …] the normalised activations x̂, what γ multiplies; float32, bfloat16, float16 or float64.
        grad_output: the gradient of the layer's output, input's shape and dtype.
        channel_dim: the dimension along which γ lies: -1 for LayerNorm and RMSNorm, 1 for GroupNorm and InstanceNorm.
        bias: whether the shift's part counts.

    Returns:
        [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or their dtypes differ.
        ValueError: the shapes differ, or channel_dim is the batch's or none of input's.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    check_pair(input, grad_output)
    if not 0 < channel_dim % max(input.ndim, 1) < input.ndim or not -input.ndim <= channel_dim < input.ndim:
        raise ValueError(
            f"channel_dim must be a dimension of input {shape_text(input)} behind the first, got {channel_dim}"
        )
    if grad_output.shape != input.shape:
        raise ValueError(f"grad_output must be {shape_text(input)} as input, got {shape_text(grad_output)}")
    dim = channel_dim % input.ndim
    shape = [input.shape[0], input.shape[1:dim].numel(), input.shape[dim], input.shape[dim + 1 :].numel()]
    ones = input.new_ones((), dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
    grads = affine_grad_sample(input.reshape(shape), grad_output.reshape(shape), None, ones.expand(shape[:3]))
    return sum(grad.square().sum(1) for grad in grads[: 1 + bool(bias)])


def affine_grad_sample(input: Tensor, grad_output: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample's own gradient of a normalisation layer's scale and shift, which are small enough to be kept.

    Σ g·(x − mean)·rstd and Σ g, the sums over R and L: with mean and rstd the layer's statistics, so that no normalised
    tensor is made. float32 for bfloat16 and float16. Differentiable (by the reference).

    Args:
        input: [B, R, C, L] the layer's input x, R and L the positions before and behind the channels (LayerNorm:
            L = 1; GroupNorm: R = 1); float32, bfloat16, float16 or float64.
        grad_output: [B, R, C, L] the gradient g of the layer's output, input's dtype.
        mean: broadcastable to [B, R, C], floating-point; None (RMSNorm): 0.
        rstd: broadcastable to [B, R, C], floating-point: the reciprocal standard deviation.

    Returns:
        The gradients of scale and shift, [B, C] each, float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: a shape differs.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    check_pair(input, grad_output)
    if input.ndim != 4:
        raise ValueError(f"input must be [B, R, C, L], got {shape_text(input)}")
    if grad_output.shape != input.shape:
        raise ValueError(f"grad_output must be {shape_text(input)} as input, got {shape_text(grad_output)}")
    rstd = _statistic("rstd", rstd, input)
    mean = None if mean is None else _statistic("mean", mean, input)
    if kernel_answers("affine_grad_sample", input) and not needs_gradient(input, grad_output, mean, rstd):
        return call(torch.ops.fastmix.affine_grad_sample.default, input, grad_output, mean, rstd)
    return reference.affine_grad_sample(input, grad_output, mean, rstd)


def _statistic(name: str, value: Tensor, input: Tensor) -> Tensor:
    check_float(name, value)
    check_same_device(name, value, "input", input)
    try:
        value = value.expand(input.shape[:3])
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to [B, R, C] = {list(input.shape[:3])}, got {shape_text(value)}"
        ) from None
    return value if input.dtype == torch.float64 else value.float()


torch.library.define(
    "fastmix::affine_grad_sample",
    "(Tensor input, Tensor grad_output, Tensor? mean, Tensor rstd) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastmix::affine_grad_sample")
def _(input, grad_output, mean, rstd):
    grads = input.new_empty([2, input.shape[0], input.shape[2]], dtype=torch.float32)
    return grads[0], grads.new_empty(grads[0].shape)


def _affine_grad_sample_cuda(input, grad_output, mean, rstd):
    from tritonkernels.affine_grad_norm import affine_grad_sample as kernel

    return kernel(input, grad_output, mean, rstd)


if _library.triton_serves:
    torch.library.impl("fastmix::affine_grad_sample", "CUDA", _affine_grad_sample_cuda)
note_kernels("affine_grad_sample")
