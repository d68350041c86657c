"""The ratio of a value and its gradient's norm in plain PyTorch: specification and the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def gradient_ratio(value: Tensor, gradient: Tensor, *, mode: str, eps: float) -> Tensor:
    """value/(n + |value| + eps) for "gn", value·n/(n² + eps) for "gran", with n = ‖gradient_b‖; 0 where that is 0/0."""
    dtype = torch.promote_types(compute_dtype(value), compute_dtype(gradient))
    value, gradient = value.to(dtype), gradient.to(dtype)
    norm_sq = gradient.unsqueeze(-1).flatten(1).square().sum(1)
    # The root's derivative at 0 is taken to be 0.
    positive = norm_sq > 0
    norm = torch.where(positive, torch.where(positive, norm_sq, 1).sqrt(), 0)
    above, below = (value, norm + value.abs() + eps) if mode == "gn" else (value * norm, norm_sq + eps)
    return torch.where(below > 0, above, 0) / torch.where(below > 0, below, 1)
