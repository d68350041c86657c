"""The gain of an activation, by adaptive quadrature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.ops._check import dtype_name

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda z: z,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}

_LIMIT = 50.0  # beyond it φ(z) < 1e-543
_PANEL = 0.25
_HALVINGS = 46  # panels down to 3.6e-15
_MOST_PANELS = 2**16  # at once
_TOLERANCE = 1e-13  # of the integral, for one panel
_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(16))


def activation_gain(fn_or_name: str | Callable[[Tensor], Tensor]) -> float:
    """The factor that makes an activation keep the second moment: 1/√E[fn(z)²], z ~ N(0, 1).

    Multiplied into the standard deviation of the *next* layer's weights, it keeps the second moment of the activations
    at 1 (√2 for ReLU, 1/√0.2933790 for sigmoid, 1 for SELU). Adaptive Gauss–Legendre quadrature in float64, accurate to
    1e-9 also where fn has kinks or jumps. Principle: He et al., Delving Deep into Rectifiers (arXiv:1502.01852),
    eq. 10, with the activation's own second moment; Klambauer et al. (arXiv:1706.02515) for SELU.

    Args:
        fn_or_name: an elementwise function of a float64 tensor, such as ``torch.tanh`` or ``torch.nn.GELU()`` (a module
            is evaluated as a copy in eval mode), or a name of ``torch.nn.functional``: "celu", "elu", "gelu",
            "gelu_tanh" (the tanh approximation), "hardsigmoid", "hardswish", "hardtanh", "leaky_relu" (slope 0.01),
            "linear", "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh".

    Returns:
        The gain.

    Raises:
        TypeError: fn_or_name is neither a name nor callable, or the function does not give a float64 tensor.
        ValueError: an unknown name; a function that is not elementwise, gives NaN, overflows where |z| ≤ 50, is zero
            almost everywhere, or whose second moment diverges (it grows like exp(z²/4) or has a pole) or cannot be
            integrated (random values, thousands of jumps).
    """
    name = fn_or_name if isinstance(fn_or_name, str) else getattr(fn_or_name, "__name__", type(fn_or_name).__name__)
    if isinstance(fn_or_name, str):
        if fn_or_name not in _ACTIVATIONS:
            known = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"fn_or_name must be a function or one of {known}, got {fn_or_name!r}")
        fn = _ACTIVATIONS[fn_or_name]
    elif isinstance(fn_or_name, nn.Module):
        fn = copy.deepcopy(fn_or_name).to("cpu", torch.float64).eval()
    elif callable(fn_or_name):
        fn = fn_or_name
    else:
        raise TypeError(f"fn_or_name must be a function or a name, got {type(fn_or_name).__name__}")
    with torch.no_grad():
        return _second_moment(fn, name) ** -0.5


def _second_moment(fn: Callable[[Tensor], Tensor], name: str) -> float:
    """∫ fn(z)²·φ(z) dz: panels are halved until neither half changes what the whole gave."""
    width, settled_sum = _PANEL, 0.0
    left = torch.arange(-_LIMIT, _LIMIT, width, dtype=torch.float64, device="cpu")
    whole = _integrals(fn, name, left, width)
    tail = float(whole[0] + whole[-1])
    for _ in range(_HALVINGS):
        width /= 2
        left = torch.stack((left, left + width))
        halves = _integrals(fn, name, left, width)
        total = settled_sum + float(halves.sum())
        settled = (halves.sum(0) - whole).abs() <= _TOLERANCE * total
        settled_sum += float(halves[:, settled].sum())
        left, whole = left[:, ~settled].flatten(), halves[:, ~settled].flatten()
        if left.numel() == 0:
            break
        if left.numel() > _MOST_PANELS:
            raise ValueError(f"{name} must be piecewise smooth, and give the same for the same input")
    else:
        raise ValueError(f"the second moment of {name} must be finite: it does not converge near z = {left[0]:.6g}")
    if total == 0:
        raise ValueError(f"{name} must not be zero almost everywhere")
    if tail > _TOLERANCE * total:
        raise ValueError(f"the second moment of {name} must be finite: it grows like exp(z²/4) or faster")
    return total


def _integrals(fn: Callable[[Tensor], Tensor], name: str, left: Tensor, width: float) -> Tensor:
    """Of fn²·φ over [left, left + width], in left's shape."""
    nodes, weights = _NODES * (width / 2), _WEIGHTS * (width / 2)
    z = left[..., None] + (width / 2 + nodes)
    points = z.flatten()
    values = fn(points)
    if not isinstance(values, Tensor) or values.dtype != torch.float64:
        given = dtype_name(values.dtype) if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must give a float64 tensor for one, got {given}")
    if values.shape != points.shape:
        raise ValueError(f"{name} must be elementwise, got {list(values.shape)} for {list(points.shape)}")
    if not values.isfinite().all():
        worst = float(points[values.isfinite().logical_not()].abs().min())
        raise ValueError(f"{name} must be finite for |z| ≤ {_LIMIT:g}, is not at |z| = {worst:.6g}")
    # The root of φ first: fn(z)² alone would overflow.
    density = values.view_as(z) * torch.exp(-z.square() / 4)
    return density.square() @ weights / math.sqrt(2 * math.pi)
