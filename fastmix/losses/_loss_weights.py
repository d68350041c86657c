"""Weights of losses that need more than a line: of the generalised mean, and by the norms of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def group_mean(values: Tensor) -> Tensor:
    """The mean over the ranks of the default process group, where there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def generalized_mean_weights(losses: Tensor, gamma: float) -> Tensor:
    """The gradient of L = (mean_i L_i^γ)^(1/γ), (L_i/L)^(γ−1)/n; the geometric mean's for γ = 0."""
    logs = losses.double().log()  # large powers are as exact as their logarithms
    # Relative to the geometric mean no power is formed that could overflow while the result is a number.
    relative = logs - logs.mean()
    exponents = gamma * relative
    if gamma == 0:
        log_mean = torch.zeros_like(relative.sum())
    elif bool(exponents.abs().max() < 1):
        # Near γ = 0 the mean of the powers is nearly 1: its logarithm, divided by γ, would be rounding errors.
        log_mean = exponents.expm1().mean().log1p() / gamma
    else:
        log_mean = (exponents.logsumexp(0) - math.log(len(losses))) / gamma
    return ((gamma - 1) * (relative - log_mean)).exp() / len(losses)


def gradient_norm_weights(losses: Tensor | Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """1/‖∇L_i‖ over all parameters together, 0 where that is 0."""
    norms = torch.stack([_gradient_norm(i, loss, parameters) for i, loss in enumerate(losses)])
    if not bool(norms.isfinite().all()):
        raise ValueError(f"losses must have finite gradients by shared_parameters, got norms {norms.tolist()}")
    return torch.where(norms > 0, torch.where(norms > 0, norms, 1).reciprocal(), 0).to(losses[0].device)


def _gradient_norm(index: int, loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if not loss.requires_grad:
        raise ValueError(f"losses[{index}] must depend on shared_parameters in training mode, got one without a graph")
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(f"losses[{index}] must depend on shared_parameters, got one that does not")
    # A rank may not use a parameter that another one does: what is reduced has the same sizes everywhere.
    used = (torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True))
    norms = [
        torch.linalg.vector_norm(group_mean(grad), dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in used
    ]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
