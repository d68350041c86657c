"""Gradient normalisation of a GAN's discriminator."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.ops._check import check_float
from fastmix.ops.gradient_ratio import gradient_ratio, resolve_eps
from fastmix.per_sample._input_gradient import as_input, check_function, check_value, gradient_of
from fastmix.per_sample._piecewise_linear import PiecewiseLinear


def gradient_normalize(
    discriminator: Callable[[Tensor], Tensor], x: Tensor, *, mode: str = "gn", eps: float | None = None
) -> Tensor:
    """A discriminator's output, normalised by the norm of its gradient by its input.

    With D = discriminator(x) and n = ‖∇_x D‖ for each sample: D/(n + |D| + eps) for "gn" (gradient normalisation, in
    [−1, 1]), D·n/(n² + eps) for "gran" (GraN, not bounded). Nothing is detached: use it in the discriminator's and in
    the generator's step. The gradient by x has norm at most 1 if D is piecewise linear. Equivalent to::

        x = x if x.requires_grad else x.detach().requires_grad_()
        value = discriminator(x).reshape(-1)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return fastmix.gradient_ratio(value, gradient, mode=mode, eps=eps)

    If every function that the discriminator calls is known to be piecewise linear (convolutions, linear layers, ReLUs,
    pooling, sums, BatchNorm in evaluation …), gradients are found with one backward less, and are the same: D is then
    a scalar product of x and ∇_x D and a multiple of the biases, so that nothing but ∇_x D has to be differentiated.
    A discriminator without trainable parameters (``requires_grad_(False)`` in the generator's step) costs one forward
    and one backward. Smooth activations, normalisations of activations and all else are differentiated twice.

    A compiled discriminator runs eagerly, since compiled code can't be differentiated twice. Inside compiled code,
    values need ``torch._dynamo.config.trace_autograd_ops = True``.

    Args:
        discriminator: a module or function of x that gives a number for each sample, [B] or [B, 1], and treats samples
            apart (no BatchNorm in training). It is called once.
        x: [B, …] samples, float32, bfloat16, float16 or float64. One that requires a gradient gets it.
        mode: "gn" or "gran".
        eps: at least 0; None: 0 for "gn" and 0.1 for "gran".

    Returns:
        [B], float32 or float64. Without gradients enabled, values alone.

    Raises:
        TypeError: the discriminator is not callable, x is no floating-point tensor, the output is no real
            floating-point tensor, or eps is no number.
        ValueError: x has no batch dimension, the output is not [B] or [B, 1] or does not depend on x, samples are
            coupled by BatchNorm in training, mode is unknown, or eps is negative.

    Wu et al., Gradient Normalization for Generative Adversarial Networks (arXiv:2109.02235); Bhaskara et al., GraN-GAN:
    Piecewise Gradient Normalization for Generative Adversarial Networks (arXiv:2111.03162).
    """
    check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [B, …], got []")
    eps = resolve_eps(mode, eps)
    check_function("discriminator", discriminator)
    if torch.compiler.is_compiling():
        value, gradient = _traced(discriminator, x)
        return gradient_ratio(value, gradient, mode=mode, eps=eps)
    with_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        needs_gradient = with_graph and x.requires_grad
        x = as_input(x, keep_graph=with_graph)
        value, gradient = _value_and_gradient(discriminator, x, with_graph, needs_gradient)
    return gradient_ratio(value, gradient, mode=mode, eps=eps)


def _value_and_gradient(
    discriminator: Callable[[Tensor], Tensor], x: Tensor, with_graph: bool, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """D(x) [B] and ∇_x D; needs_gradient: of x."""
    # What is compiled can't be differentiated twice. Nobody has compiled anything unless this module is loaded.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with eager, PiecewiseLinear(x) as pieces:
        output = discriminator(x)
    value = check_value("discriminator", output, len(x))
    pieces.scale.only_input = True
    try:
        if not (with_graph and pieces.homogeneous(output)):
            return value, gradient_of("discriminator", value, x, create_graph=with_graph)
        inputs = (x, pieces.scale.tensor)
        gradient, by_scale = torch.autograd.grad(value.sum(), inputs, create_graph=True, allow_unused=True)
    finally:
        pieces.scale.only_input = False
    return _Homogeneous.apply(value.detach(), x if needs_gradient else x.detach(), gradient, by_scale), gradient


def _traced(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in what a compiler follows."""
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if with_graph and x.requires_grad else x.detach().requires_grad_()
        value = check_value("discriminator", discriminator(x), len(x))
        return value, gradient_of("discriminator", value, x, create_graph=with_graph)


class _Homogeneous(torch.autograd.Function):
    """The value ⟨v, x⟩ + v_s of samples x, which is given."""

    @staticmethod
    def forward(ctx, value: Tensor, x: Tensor, v: Tensor, v_s: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, v)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, v = ctx.saved_tensors
        _, needs_x, needs_v, needs_v_s = ctx.needs_input_grad
        grad = grad.to(x.dtype)
        rows = grad.view(-1, *[1] * (x.ndim - 1))
        return None, rows * v if needs_x else None, rows * x if needs_v else None, grad if needs_v_s else None
