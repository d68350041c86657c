"""Cases of token_mixing_mlp and token_linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmix
from fastmix.reference import token_mixing as reference
from fastmix.testing.cases import Case

# Arguments that have a row for each sample, so that each sample is a slice of its gradient.
_PER_SAMPLE = ("x", "gate", "added", "residual")


def mlp_case(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    s_out: int | None = None,
    bias: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
    **options: Any,
) -> Case:
    """shape: [B, S, C, D]; options as `_options` takes them; change: of the arguments."""
    b, s, c, d = shape
    s_out = s if s_out is None else s_out

    def make(generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(b, s, c), "w1": draw(d, s) / s**0.5, "w2": draw(s_out, d) / d**0.5}
        if bias:
            inputs |= {"b1": draw(d), "b2": draw(s_out)}
        return change(inputs | _options(draw, (b, s, c), s_out, **options))

    return _case(f"token_mixing_mlp {name}", fastmix.token_mixing_mlp, reference.token_mixing_mlp, make)


def linear_case(
    name: str,
    shape: tuple[int, int, int],
    *,
    s_out: int | None = None,
    heads: int | None = None,
    bias: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
    **options: Any,
) -> Case:
    """shape: [B, S, C]; options as `_options` takes them; change: of the arguments."""
    b, s, c = shape
    s_out = s if s_out is None else s_out
    leading = () if heads is None else (heads,)

    def make(generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(b, s, c), "weight": draw(*leading, s_out, s) / s**0.5}
        if bias:
            inputs["bias"] = draw(*leading, s_out)
        return change(inputs | _options(draw, shape, s_out, **options))

    return _case(f"token_linear {name}", fastmix.token_linear, reference.token_linear, make)


def _options(
    draw: Callable[..., Tensor],
    shape: tuple[int, int, int],
    s_out: int,
    *,
    norm: str | None = None,
    weighted: bool = True,
    given: tuple[str, ...] = (),
    **others: Any,
) -> dict[str, Any]:
    """weighted: the norm has a weight and a bias; given: which of scale, gate, added and residual there are."""
    b, s, c = shape
    options = {"norm": norm, **others}
    if norm and weighted:
        size = s if norm == "token_layer" else c
        options |= {"norm_weight": draw(size), "norm_bias": draw(size)}
    return options | {name: draw(c) if name == "scale" else draw(b, s_out, c) for name in given}


def _case(name: str, function: Callable, plain: Callable, make: Callable[[torch.Generator], dict[str, Any]]) -> Case:
    tensors = [key for key, value in make(torch.Generator()).items() if isinstance(value, Tensor)]
    gradients = {key: int(key in _PER_SAMPLE) for key in tensors}
    return Case("token_mixing", name, function, plain, make, independent=1, gradients=gradients)


def changed(**functions: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: inputs | {name: function(inputs[name]) for name, function in functions.items()}


def _residual_is_x(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"residual": inputs["x"]}


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _chunk(x: Tensor) -> Tensor:
    """As one half of a wider tensor: rows further apart, channels contiguous."""
    return torch.cat([x, x], dim=2)[:, :, x.shape[2] :]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


NORMS = (None, "layer", "affine", "token_layer")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

CASES = [
    *(
        mlp_case(f"{s}x{c}x{d}", (2, s, c, d), norm="layer", given=("residual",))
        for s, c, d in [
            (1, 1, 1), (1, 16, 8), (7, 5, 3), (49, 40, 33), (100, 33, 65), (196, 70, 97), (197, 64, 128), (1024, 9, 5),
        ]
    ),
    *(
        mlp_case(f"{norm}, {activation}", (2, 17, 31, 19), norm=norm, activation=activation, given=("scale",))
        for norm in NORMS
        for activation in ACTIVATIONS
    ),
    mlp_case("plain", (2, 9, 13, 6), bias=False),
    mlp_case("without norm weights", (2, 9, 13, 6), norm="layer", weighted=False),
    mlp_case("affine without weights", (2, 9, 13, 6), norm="affine", weighted=False),
    mlp_case("token_layer without weights", (2, 9, 13, 6), norm="token_layer", weighted=False),
    mlp_case("other length", (3, 11, 70, 6), s_out=23, norm="layer", given=("scale", "residual")),
    mlp_case("x is residual", (3, 11, 70, 6), norm="layer", change=_residual_is_x),
    mlp_case("eps", (2, 9, 13, 6), norm="layer", eps=0.5),
    mlp_case("many samples", (70, 2, 40, 9), norm="layer", given=("residual",)),
    mlp_case("several panels", (3, 5, 300, 4), norm="layer", given=("scale", "residual")),
    mlp_case("empty batch", (0, 9, 13, 6), norm="layer", given=("scale", "residual")),
    mlp_case("transposed", (2, 9, 13, 6), norm="layer", given=("residual",), change=changed(
        x=_transposed, residual=_transposed, w1=lambda w: w.t().contiguous().t())),
    mlp_case("chunk", (2, 9, 70, 6), norm="layer", given=("residual",), change=changed(x=_chunk, residual=_chunk)),
    mlp_case("expanded", (2, 9, 13, 6), norm="layer", given=("residual",), change=changed(
        x=_expanded, residual=_expanded)),
    mlp_case("large values", (2, 17, 31, 19), change=changed(x=lambda x: x * 1e3)),
    mlp_case("small values", (2, 17, 31, 19), norm="layer", change=changed(x=lambda x: x * 1e-3)),
    mlp_case("constant", (2, 17, 31, 19), norm="layer", change=changed(x=torch.ones_like)),
    mlp_case("large mean", (2, 17, 31, 19), norm="layer", change=changed(x=lambda x: x + 100)),
    *(
        linear_case(f"{s}x{c}", (2, s, c), norm="affine", given=("scale", "residual"))
        for s, c in [(1, 1), (1, 16), (7, 5), (49, 40), (100, 33), (196, 70), (197, 64), (1024, 9)]
    ),
    *(
        linear_case(f"{norm}, {' '.join(given) or 'plain'}", (2, 17, 31), norm=norm, given=given)
        for norm in NORMS
        for given in [(), ("gate",), ("gate", "added"), ("scale", "gate", "added", "residual")]
    ),
    linear_case("without bias", (2, 9, 13), bias=False, norm="layer", given=("gate",)),
    linear_case("without norm weights", (2, 9, 13), norm="layer", weighted=False),
    linear_case("other length", (3, 11, 70), s_out=23, norm="layer", given=("scale", "gate", "added", "residual")),
    linear_case("heads", (2, 11, 30), heads=3, norm="layer", given=("gate", "residual")),
    linear_case("a head for each channel", (2, 11, 7), heads=7, bias=False),
    linear_case("wide heads", (2, 5, 400), heads=2, s_out=6, norm="token_layer", given=("scale", "added")),
    linear_case("x is residual", (3, 11, 70), norm="affine", given=("scale",), change=_residual_is_x),
    linear_case("many samples", (70, 2, 40), norm="layer", given=("gate",)),
    linear_case("empty batch", (0, 9, 13), heads=1, norm="layer", given=("scale", "gate", "added", "residual")),
    linear_case("chunks", (2, 9, 70), norm="layer", given=("gate", "added"), change=changed(
        x=_chunk, gate=_chunk, added=_chunk)),
    linear_case("transposed", (2, 9, 13), given=("gate", "added"), change=changed(
        x=_transposed, gate=_transposed, added=_transposed)),
    linear_case("expanded", (2, 9, 13), given=("gate", "added"), change=changed(
        x=_expanded, gate=_expanded, added=_expanded)),
    linear_case("large values", (2, 17, 31), norm="layer", given=("gate",), change=changed(x=lambda x: x * 1e3)),
]  # fmt: skip
