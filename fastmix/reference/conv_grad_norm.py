"""Per-sample gradients of a convolution in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def conv_weight_grad_sample(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """dW_b [B, O, I/groups, *kernel_size], the gradient from sample b."""
    dtype = compute_dtype(input)
    b, o = grad_output.shape[:2]
    shape = (o, input.shape[1] // groups, *kernel_size)
    if grad_output.numel() == 0 or input.numel() == 0:
        return torch.zeros(b, *shape, dtype=dtype, device=input.device)
    # Contiguous, since PyTorch fails on some shapes in its channels-last format.
    input, grad_output = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (input, grad_output))
    # The gradient of a convolution in which every sample has channels, and a weight, of its own.
    weight_grad = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)
    return weight_grad[len(kernel_size) - 1](
        input.to(dtype).reshape(1, -1, *input.shape[2:]),
        [b * o, *shape[1:]],
        grad_output.to(dtype).reshape(1, -1, *grad_output.shape[2:]),
        stride,
        padding,
        dilation,
        b * groups,
    ).view(b, *shape)


def conv_weight_grad_with_norm(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: tuple[int, ...],
    *,
    sample_weight: Tensor | None = None,
    **options: int | tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Σ_b sample_weight_b·dW_b and ‖dW_b‖² [B], of the gradients from the samples."""
    grads = conv_weight_grad_sample(input, grad_output, kernel_size, **options)
    norm_sq = grads.flatten(1).square().sum(1)
    if sample_weight is not None:
        grads = grads * sample_weight.to(grads.dtype).view(-1, *[1] * (grads.ndim - 1))
    return grads.sum(0), norm_sq
