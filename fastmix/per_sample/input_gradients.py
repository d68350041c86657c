"""Gradients by the input: norms, penalties on them, and the points at which WGAN-GP takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.ops._check import check_same_device, dtype_name
from fastmix.per_sample._contributions import real as as_real
from fastmix.per_sample._input_gradient import check_samples, value_and_gradient


def input_gradient_norms(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Norms ‖∇_x f(x_i)‖ of each sample's gradient by its input.

    Equivalent to ``torch.autograd.grad(fn(x).sum(), x)[0].flatten(1).norm(dim=1)``: a sample's output must not depend
    on the rest of the batch. With gradients enabled the norms are differentiable, with gradient 0 where a norm is 0;
    under `torch.no_grad` or `torch.inference_mode` they are not, and no graph is kept. Differentiable norms need
    functions with a double backward: one that is compiled by torch.compile has none, and serves under no_grad only.

    Args:
        fn: x → [B] or [B, 1], a module or any function.
        x: [B, …], float or complex. If it requires a gradient (a generator's output) the norms' gradient flows on to
            it; else fn is given a detached leaf.

    Returns:
        [B], float32 (float64 for float64 x).

    Raises:
        TypeError: fn is not callable or gives no real floating-point tensor, or x is no floating-point or complex
            tensor.
        ValueError: fn's output is not [B] or [B, 1] or does not depend on x, x has no batch dimension, or fn is a
            module with a BatchNorm that takes its statistics from the batch.
    """
    return _safe_sqrt(_squared_norms(fn, x))


def input_gradient_penalty(fn: Callable[[Tensor], Tensor], x: Tensor, *, target: float | None = None) -> Tensor:
    """Gradient penalty on the input: mean_i ‖∇_x f(x_i)‖², or mean_i (‖∇_x f(x_i)‖ − target)².

    ::

        x_hat = fastmix.per_sample.interpolate(real, fake)
        penalty = fastmix.per_sample.input_gradient_penalty(critic, x_hat, target=1.0)
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()

    Without a target no root is taken. With one, a sample whose gradient is 0 has the penalty target² and gives no
    gradient. Differentiable as `input_gradient_norms` is.

    Args:
        fn: x → [B] or [B, 1], a module or any function.
        x: [B, …], float or complex. If it requires a gradient the penalty's gradient flows on to it; else fn is given
            a detached leaf.
        target: the norm that is asked for, 1 in WGAN-GP.

    Returns:
        A scalar, float32 (float64 for float64 x); 0 for an empty batch.

    Raises:
        TypeError: fn is not callable or gives no real floating-point tensor, x is no floating-point or complex tensor,
            or target is no number.
        ValueError: target is negative or not finite, fn's output is not [B] or [B, 1] or does not depend on x, x has
            no batch dimension, or fn is a module with a BatchNorm that takes its statistics from the batch.

    Gulrajani et al., Improved Training of Wasserstein GANs (arXiv:1704.00028); Mescheder et al., Which Training
    Methods for GANs do actually Converge? (arXiv:1801.04406).
    """
    if isinstance(target, bool) or not isinstance(target, float | int | None):
        raise TypeError(f"target must be a float or None, got {type(target).__name__}")
    if target is not None and not 0 <= target < float("inf"):
        raise ValueError(f"target must be finite and at least 0, got {target}")
    squared = _squared_norms(fn, x)
    penalties = squared if target is None else (_safe_sqrt(squared) - target).square()
    return penalties.sum() / max(len(x), 1)


def interpolate(real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Points ε·real + (1 − ε)·fake between pairs of samples, one ε ~ U[0, 1) for each pair.

    They are detached, as where WGAN-GP trains its critic: neither `real` nor the generator that made `fake` gets a
    gradient through them.

    Args:
        real: [B, …], float or complex.
        fake: like real.
        generator: of ε, on real's device.

    Returns:
        Like real, without a graph.

    Raises:
        TypeError: real is no floating-point or complex tensor, or fake has another dtype.
        ValueError: they differ in shape or device, or have no batch dimension.

    Gulrajani et al., Improved Training of Wasserstein GANs (arXiv:1704.00028).
    """
    check_samples("real", real)
    check_samples("fake", fake)
    if fake.dtype != real.dtype:
        raise TypeError(f"fake must have real's dtype {dtype_name(real.dtype)}, got {dtype_name(fake.dtype)}")
    if fake.shape != real.shape:
        raise ValueError(f"fake must have real's shape {list(real.shape)}, got {list(fake.shape)}")
    check_same_device("fake", fake, "real", real)
    # Halves are rounded once.
    dtype = torch.promote_types(real.dtype, torch.float32)
    shape = (len(real), *[1] * (real.ndim - 1))
    epsilon = torch.rand(shape, generator=generator, device=real.device, dtype=dtype.to_real())
    return torch.lerp(fake.detach().to(dtype), real.detach().to(dtype), epsilon.to(dtype)).to(real.dtype)


def _squared_norms(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[B]"""
    _, gradient = value_and_gradient("fn", fn, x)
    gradient = as_real(gradient)
    rows = gradient.reshape(len(gradient), gradient.shape[1:].numel())
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1)


def _safe_sqrt(squared: Tensor) -> Tensor:
    """The root, with gradients of any order 0 where it is 0: the second ones of torch.linalg.vector_norm are NaN."""
    is_zero = squared == 0  # NaN is not, and stays
    return squared.where(~is_zero, 1.0).sqrt().where(~is_zero, 0.0)
