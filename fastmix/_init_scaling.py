"""Initialisers by fans: LeCun's, Xavier's and He's, each from three distributions, and what draws them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fastmix.ops._check import check_choice, check_float, shape_text


def lecun_normal_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a normal distribution of variance gain²/fan_in: layers keep the second moment of their input.

    LeCun et al., Efficient BackProp (1998).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the standard deviation, such as :func:`activation_gain` of the activation before the layer.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: t is no floating-point tensor.
        ValueError: t has fewer than 2 dimensions, gain is negative or infinite, or groups does not divide t.shape[0].
    """
    return _scaled(t, draw_normal, gain, "fan_in", groups, transposed, generator)


def lecun_uniform_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a uniform distribution of variance gain²/fan_in, U[−√3σ, √3σ]; else as :func:`lecun_normal_`.

    LeCun et al., Efficient BackProp (1998).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the standard deviation.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`lecun_normal_`.
        ValueError: as :func:`lecun_normal_`.
    """
    return _scaled(t, draw_uniform, gain, "fan_in", groups, transposed, generator)


def lecun_truncated_normal_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a normal distribution cut off at ±2σ, of variance gain²/fan_in; else as :func:`lecun_normal_`.

    Flax's and Keras's ``lecun_normal``. LeCun et al., Efficient BackProp (1998).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the resulting standard deviation.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`lecun_normal_`.
        ValueError: as :func:`lecun_normal_`.
    """
    return _scaled(t, draw_truncated, gain, "fan_in", groups, transposed, generator)


def xavier_normal_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a normal distribution of variance gain²·2/(fan_in + fan_out), between forward's and backward's.

    ``torch.nn.init.xavier_normal_(t, gain)``, which counts groups·fan_out. Glorot and Bengio, Understanding the
    difficulty of training deep feedforward neural networks (2010).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the standard deviation.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`lecun_normal_`.
        ValueError: as :func:`lecun_normal_`.
    """
    return _scaled(t, draw_normal, gain, "fan_mean", groups, transposed, generator)


def xavier_uniform_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a uniform distribution of variance gain²·2/(fan_in + fan_out); else as :func:`xavier_normal_`.

    ``torch.nn.init.xavier_uniform_(t, gain)``, which counts groups·fan_out. Glorot and Bengio (2010).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the standard deviation.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`lecun_normal_`.
        ValueError: as :func:`lecun_normal_`.
    """
    return _scaled(t, draw_uniform, gain, "fan_mean", groups, transposed, generator)


def xavier_truncated_normal_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t from a normal distribution cut off at ±2σ, of variance gain²·2/(fan_in + fan_out).

    Flax's and Keras's ``glorot_normal``. Glorot and Bengio (2010).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the resulting standard deviation.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`lecun_normal_`.
        ValueError: as :func:`lecun_normal_`.
    """
    return _scaled(t, draw_truncated, gain, "fan_mean", groups, transposed, generator)


def he_normal_(
    t: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    *,
    groups: int = 1,
    transposed: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Fills t from a normal distribution of variance 2/((1 + a²)·fan): for layers behind a (leaky) ReLU.

    ``torch.nn.init.kaiming_normal_(t, a, mode)``, which counts groups·fan_out. For another activation, take
    :func:`lecun_normal_` with its :func:`activation_gain`. He et al., Delving Deep into Rectifiers (arXiv:1502.01852).

    Args:
        t: weight [out, in/groups, *kernel].
        a: slope of the leaky ReLU where its input is negative.
        mode: "fan_in" keeps the second moment of the activations, "fan_out" that of the gradients.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: t is no floating-point tensor.
        ValueError: t has fewer than 2 dimensions, mode is neither, a is not finite, or groups does not divide
            t.shape[0].
    """
    return _scaled(t, draw_normal, _relu_gain(a), _he_mode(mode), groups, transposed, generator)


def he_uniform_(
    t: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    *,
    groups: int = 1,
    transposed: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Fills t from a uniform distribution of variance 2/((1 + a²)·fan); else as :func:`he_normal_`.

    ``torch.nn.init.kaiming_uniform_(t, a, mode)``, which counts groups·fan_out. He et al. (arXiv:1502.01852).

    Args:
        t: weight [out, in/groups, *kernel].
        a: slope of the leaky ReLU where its input is negative.
        mode: "fan_in" or "fan_out".
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`he_normal_`.
        ValueError: as :func:`he_normal_`.
    """
    return _scaled(t, draw_uniform, _relu_gain(a), _he_mode(mode), groups, transposed, generator)


def he_truncated_normal_(
    t: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    *,
    groups: int = 1,
    transposed: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Fills t from a normal distribution cut off at ±2σ, of variance 2/((1 + a²)·fan); else as :func:`he_normal_`.

    Flax's and Keras's ``he_normal`` where a = 0. He et al. (arXiv:1502.01852).

    Args:
        t: weight [out, in/groups, *kernel].
        a: slope of the leaky ReLU where its input is negative.
        mode: "fan_in" or "fan_out".
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: as :func:`he_normal_`.
        ValueError: as :func:`he_normal_`.
    """
    return _scaled(t, draw_truncated, _relu_gain(a), _he_mode(mode), groups, transposed, generator)


# Fans


def _scaled(
    t: Tensor,
    draw: Callable[[Tensor, float, Generator | None], Tensor],
    gain: float,
    mode: str,
    groups: int,
    transposed: bool,
    generator: Generator | None,
) -> Tensor:
    check_finite("gain", gain, 0)
    check_weight(t, groups)
    if t.numel() == 0:
        return t
    kernel = math.prod(t.shape[2:])
    fan_out, fan_in = t.shape[0] // groups * kernel, t.shape[1] * kernel
    if transposed:
        fan_in, fan_out = fan_out, fan_in
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_mean": (fan_in + fan_out) / 2}[mode]
    return fill(t, lambda x: draw(x, gain / math.sqrt(fan), generator))


def _relu_gain(a: float) -> float:
    check_finite("a", a)
    return math.sqrt(2 / (1 + a * a))


def _he_mode(mode: str) -> str:
    check_choice("mode", mode, ("fan_in", "fan_out"))
    return mode


# Drawing


def fill(t: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """t as draw fills a tensor of its shape: itself, or a float32 one where t has less precision."""
    if t.numel() == 0 or t.is_meta:
        return t
    with torch.no_grad():
        if t.dtype in (torch.bfloat16, torch.float16):
            # float32's draws, rounded: a seed gives the same model in each dtype, and QR takes no halves.
            return t.copy_(draw(torch.empty_like(t, dtype=torch.float32)))
        draw(t)
    return t


def draw_normal(t: Tensor, std: float, generator: Generator | None) -> Tensor:
    return t.normal_(0, std, generator=generator)


def draw_uniform(t: Tensor, std: float, generator: Generator | None) -> Tensor:
    bound = math.sqrt(3) * std
    return t.uniform_(-bound, bound, generator=generator)


def draw_truncated(t: Tensor, std: float, generator: Generator | None, mean: float = 0.0, cut: float = 2.0) -> Tensor:
    if std == 0:
        return t.fill_(mean)
    cut = max(cut, 1e-6)  # uniform but for the last digit
    sigma = std / truncated_std(cut)
    bound = cut * sigma
    return torch.nn.init.trunc_normal_(t, mean, sigma, mean - bound, mean + bound, generator=generator)


def truncated_std(cut: float) -> float:
    """The standard deviation k of N(0, 1) restricted to [−cut, cut].

    k² = 1 − √(2/π)·cut·exp(−cut²/2)/erf(cut/√2), which cancels for a small cut, as s/(1 + s) with
    s = Σ cut²ⁿ/(1·3·…·(2n + 1)), n ≥ 1, which does not.
    """
    if cut > 9:
        return 1.0
    s, term, odd = 0.0, 1.0, 1
    while s + term != s:
        odd += 2
        term *= cut * cut / odd
        s += term
    return math.sqrt(s / (1 + s))


# Checks


def check_finite(name: str, value: float, least: float = -math.inf) -> None:
    if not math.isfinite(value) or value < least:
        range_text = "finite" if least == -math.inf else f"finite and at least {least}"
        raise ValueError(f"{name} must be {range_text}, got {value}")


def check_weight(t: Tensor, groups: int) -> None:
    check_float("t", t)
    if t.ndim < 2:
        raise ValueError(f"t must have at least 2 dimensions, [out, in, …], got {shape_text(t)}")
    if groups < 1 or t.shape[0] % groups:
        raise ValueError(f"groups must divide t.shape[0] = {t.shape[0]}, got {groups}")
