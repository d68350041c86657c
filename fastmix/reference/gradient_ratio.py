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
    # The root's derivative at 0 is taken to be 0. NaN is not 0, and stays.
    is_zero = norm_sq == 0
    norm = torch.where(is_zero, 0, torch.where(is_zero, 1, norm_sq).sqrt())
    above, below = (value, norm + value.abs() + eps) if mode == "gn" else (value * norm, norm_sq + eps)
    is_zero = below == 0
    return torch.where(is_zero, 0, above) / torch.where(is_zero, 1, below)
