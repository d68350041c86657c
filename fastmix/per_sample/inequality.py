"""How much a network's gradient by its input says about the gradient by its parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.ops._check import check_float, check_same_device, dtype_name

# Elementwise, without parameters, and without random numbers.
_ACTIVATIONS = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
}  # fmt: skip
# Such activations in eval mode.
_RANDOM_IN_TRAINING = {nn.AlphaDropout, nn.Dropout, nn.FeatureAlphaDropout, nn.RReLU}


def gradient_inequality(mlp: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides of ‖∇_x f‖²·Σ_t (1 + ‖h^(t)‖²)/(‖W^(t)‖²·‖∇_x h^(t)‖²) ≤ ‖∇_θ f‖² for each sample.

    h^(t) is the input of the t-th linear layer, ∇_x h^(t) its Jacobian by the network's input, θ all weights and
    biases, and matrices have the spectral norm: an input gradient that is large somewhere needs a parameter gradient
    that is. A layer without bias has ‖h‖² for 1 + ‖h‖². Where ∇_x h^(t) or W^(t) is 0, the factor is infinite and ∇_x f
    is 0; the left side is 0 there. Equality holds for one layer, for layers of one unit behind the first, and for
    orthogonal weights with nothing between them.

    The sides are computed in float64, from a Jacobian [B, units, in_features] that is carried through the layers, and
    rounded once; they have no graph. Spectral norms cost an eigenvalue decomposition for each sample and layer, of the
    smaller of units and in_features: a few samples at a time where both are large.

    Args:
        mlp: nn.Linear layers and elementwise activations without parameters, in any order, nested nn.Sequential
            included, with one output. Frozen parameters count too.
        x: [B, in_features], of the weights' dtype.

    Returns:
        The left side [B], the right side [B], and the factors of the L linear layers [L, B], float32 (float64 for
        float64 x).

    Raises:
        TypeError: mlp is no nn.Sequential, x no floating-point tensor or not of the weights' dtype.
        ValueError: mlp has another layer, a linear layer whose weight is computed, shared or not yet initialised, a
            layer that draws random numbers, more than one output or no linear layer, or x is not [B, in_features].

    Dherin, Munn and Barrett, The Geometric Occam's Razor Implicit in Deep Learning (arXiv:2111.15090).
    """
    layers = _checked_layers(mlp)
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    _check_input(x, linears[0])
    with torch.inference_mode(False), torch.no_grad():
        squared_inputs, squared_jacobians, slopes, jacobian = _forward(layers, x.double())
        input_gradient_sq = jacobian.square().sum((1, 2))
        # The gradient at each layer's output, from the last one back.
        delta = jacobian.new_ones(len(x), 1)
        squared_deltas = []
        for layer, slope in zip(reversed(layers), reversed(slopes), strict=True):
            if isinstance(layer, nn.Linear):
                squared_deltas.append(delta.square().sum(1))
                delta = delta @ layer.weight.double()
            else:
                delta = delta * slope
        squared_weights = torch.stack([_spectral_norm_sq(layer.weight.double()) for layer in linears])[:, None]
        per_layer = squared_inputs / (squared_weights * squared_jacobians)
        lhs = torch.where(input_gradient_sq == 0, 0.0, input_gradient_sq * per_layer.sum(0))
        rhs = (squared_inputs * torch.stack(squared_deltas[::-1])).sum(0)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return lhs.to(dtype), rhs.to(dtype), per_layer.to(dtype)


def _forward(layers: list[nn.Module], h: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None], Tensor]:
    """(1 + ‖h‖²) and ‖∇_x h‖² [L, B] at the linear layers, activations' slopes g'(h) [B, units], and ∇_x f."""
    jacobian = None  # the identity
    squared_inputs, squared_jacobians, slopes = [], [], []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            squared_inputs.append(h.square().sum(1) + (layer.bias is not None))
            squared_jacobians.append(h.new_ones(len(h)) if jacobian is None else _spectral_norm_sq(jacobian))
            weight = layer.weight.double()
            h = F.linear(h, weight, None if layer.bias is None else layer.bias.double())
            jacobian = weight.expand(len(h), -1, -1) if jacobian is None else weight @ jacobian
            slopes.append(None)
        else:
            with torch.enable_grad():
                before = h.clone().requires_grad_()
                h = layer(before.clone())  # which may work in place
                (slope,) = torch.autograd.grad(h.sum(), before)
            h = h.detach()
            jacobian = torch.diag_embed(slope) if jacobian is None else slope[:, :, None] * jacobian
            slopes.append(slope)
    return torch.stack(squared_inputs), torch.stack(squared_jacobians), slopes, jacobian


def _spectral_norm_sq(matrix: Tensor) -> Tensor:
    """Of matrices [..., m, n]: the smaller of the two Gram matrices has the largest singular value's square."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    finite = gram.isfinite().all(-1).all(-1)  # of others there are no eigenvalues
    largest = torch.linalg.eigvalsh(gram.where(finite[..., None, None], 0.0))[..., -1].clamp(min=0)
    return largest.where(finite, torch.nan)


# Checks


def _checked_layers(mlp: nn.Sequential) -> list[nn.Module]:
    if not isinstance(mlp, nn.Sequential):
        raise TypeError(f"mlp must be a torch.nn.Sequential, got {type(mlp).__name__}")
    named = list(_flatten(mlp))
    seen: set[nn.Parameter] = set()
    for name, layer in named:
        kind = type(layer)
        if isinstance(layer, nn.Linear):
            _check_linear(name, layer)
            if not seen.isdisjoint(layer.parameters()):
                raise ValueError(f"mlp must use each parameter once, got {name!r} with one of a layer before")
            seen.update(layer.parameters())
        elif kind in _RANDOM_IN_TRAINING:
            if layer.training:
                raise ValueError(f"mlp must draw no random numbers, got {name!r}, a {kind.__name__} in training mode")
        elif kind not in _ACTIVATIONS:
            raise ValueError(
                "mlp must consist of nn.Linear and elementwise activations of torch.nn without parameters, got "
                f"{name!r}, a {kind.__name__}"
            )
    linears = [(name, layer) for name, layer in named if isinstance(layer, nn.Linear)]
    if not linears:
        raise ValueError("mlp must have a linear layer, got none")
    name, last = linears[-1]
    if last.out_features != 1:
        raise ValueError(f"mlp must have one output, [B, 1], got {last.out_features} of {name!r}")
    return [layer for _, layer in named]


def _flatten(mlp: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """In the order in which they run; a layer that is used twice, twice."""
    for name, layer in mlp.named_modules(remove_duplicate=False):
        if not isinstance(layer, nn.Sequential):
            yield name, layer
        elif type(layer).forward is not nn.Sequential.forward:
            raise ValueError(f"mlp must run as nn.Sequential does, got {type(layer).__name__} with its own forward")


def _check_linear(name: str, layer: nn.Linear) -> None:
    if type(layer).forward is not nn.Linear.forward:
        raise ValueError(f"mlp must consist of plain linear layers, got {name!r}, a {type(layer).__name__}")
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise ValueError(f"mlp must be initialised, got {name!r}, a LazyLinear: call mlp once")
    if not isinstance(layer.weight, nn.Parameter) or not isinstance(layer.bias, nn.Parameter | None):
        raise ValueError(f"mlp must hold its weights and biases as parameters, got {name!r}, which computes one")


def _check_input(x: Tensor, first: nn.Linear) -> None:
    check_float("x", x)
    if x.dtype != first.weight.dtype:
        raise TypeError(f"x must have the weights' dtype {dtype_name(first.weight.dtype)}, got {dtype_name(x.dtype)}")
    check_same_device("x", x, "mlp", first.weight)
    if x.ndim != 2 or x.shape[1] != first.in_features:
        raise ValueError(f"x must be [B, in_features] with in_features = {first.in_features}, got {list(x.shape)}")
