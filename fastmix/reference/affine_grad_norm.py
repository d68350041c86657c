"""Per-sample gradients of a normalisation layer's scale and shift in plain PyTorch: specification and tests' oracle."""

from __future__ import annotations

from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def affine_grad_sample(input: Tensor, grad_output: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g·(x − mean)·rstd and Σ g, both [B, C], the sums over R and L of x = input and g = grad_output.

    input and grad_output are [B, R, C, L]; mean (None: 0) and rstd broadcast to [B, R, C].
    """
    dtype = compute_dtype(input)
    x, g = input.to(dtype), grad_output.to(dtype)
    if mean is not None:
        x = x - mean.to(dtype).expand(input.shape[:3])[..., None]
    x = x * rstd.to(dtype).expand(input.shape[:3])[..., None]
    return (g * x).sum((1, 3)), g.sum((1, 3))
