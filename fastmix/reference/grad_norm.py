"""Per-sample gradients of a linear layer in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype, no_autocast


def linear_grad_norm_sq(
    input: Tensor, grad_output: Tensor, *, bias: bool = True, lengths: Tensor | None = None
) -> Tensor:
    """‖Σ_t g_t a_tᵀ‖² (+ ‖Σ_t g_t‖²) for each sample of a = input [B, T, I], g = grad_output [B, T, O]."""
    if lengths is not None:
        beyond = torch.arange(input.shape[1], device=input.device) >= lengths[:, None]
        input, grad_output = (tensor.masked_fill(beyond[..., None], 0.0) for tensor in (input, grad_output))
    norm_sq = _weight_grads(input, grad_output).square().sum((1, 2))
    return norm_sq + grad_output.to(compute_dtype(input)).sum(1).square().sum(1) if bias else norm_sq


def linear_weight_grad(input: Tensor, grad_output: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    """Σ_b sample_weight_b Σ_t g_t a_tᵀ [O, I]."""
    dtype = compute_dtype(input)
    grad_output = grad_output.to(dtype)
    if sample_weight is not None:
        grad_output = grad_output * sample_weight.to(dtype)[:, None, None]
    with no_autocast(input):
        return grad_output.flatten(0, 1).t() @ input.to(dtype).flatten(0, 1)


def linear_weight_grad_with_norm(
    input: Tensor, grad_output: Tensor, *, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ_b sample_weight_b·dW_b [O, I], and ‖dW_b‖² [B] of the samples' own gradients dW_b = Σ_t g_t a_tᵀ."""
    grads = _weight_grads(input, grad_output)
    norm_sq = grads.square().sum((1, 2))
    if sample_weight is not None:
        grads = grads * sample_weight.to(grads.dtype)[:, None, None]
    return grads.sum(0), norm_sq


def linear_grad_gram(input: Tensor, grad_output: Tensor, *, bias: bool = True) -> Tensor:
    """⟨∇_b, ∇_c⟩ [B, B] of the samples' gradients of the weight (and of the bias)."""
    grads = _weight_grads(input, grad_output).flatten(1)
    if bias:
        grads = torch.cat([grads, grad_output.to(grads.dtype).sum(1)], dim=1)
    with no_autocast(input):
        return grads @ grads.t()


def _weight_grads(input: Tensor, grad_output: Tensor) -> Tensor:
    """[B, O, I], in float32 for the halves."""
    dtype = compute_dtype(input)
    with no_autocast(input):
        return grad_output.to(dtype).mT @ input.to(dtype)
