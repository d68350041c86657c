"""Cases of gradient_ratio."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmix
from fastmix.ops.gradient_ratio import resolve_eps
from fastmix.reference import gradient_ratio as reference
from fastmix.testing.cases import Case


def ratio_case(
    name: str,
    shape: tuple[int, ...],
    mode: str = "gn",
    eps: float | None = None,
    *,
    value: float = 1.0,
    gradient: float = 1.0,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    """shape: of the gradient; value, gradient: the scales of the arguments; transform: of the gradient."""

    def make(generator):
        drawn = gradient * torch.randn(shape, generator=generator, dtype=torch.float64)
        values = value * torch.randn(shape[0], generator=generator, dtype=torch.float64)
        return {"value": values, "gradient": transform(drawn), "mode": mode, "eps": eps}

    # A ratio is one number, whose error may be 0 by chance: the slice is the batch.
    return Case(
        "gradient_ratio",
        f"{mode} {name}{'' if eps is None else f', eps {eps}'}",
        fastmix.gradient_ratio,
        _reference,
        make,
        gradients={"value": 0, "gradient": 1},
    )


def _reference(value: Tensor, gradient: Tensor, mode: str, eps: float | None) -> Tensor:
    return reference.gradient_ratio(value, gradient, mode=mode, eps=resolve_eps(mode, eps))


def _zero_first(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[1:]])


CASES = [
    ratio_case(f"{'x'.join(map(str, shape))}", shape, mode)
    for mode in ("gn", "gran")
    for shape in [
        (4, 3, 8, 8), (5, 7), (3, 1), (6,), (2, 3, 37, 41), (1, 40000), (33, 129), (2, 16384), (3, 16385), (0, 3, 4),
        (3, 0),
    ]
]  # fmt: skip
CASES += [
    case
    for mode in ("gn", "gran")
    for case in [
        ratio_case("no norm", (4, 30), mode, transform=torch.zeros_like),
        ratio_case("no norm in the first sample", (4, 30), mode, transform=_zero_first),
        ratio_case("no norm and no value", (4, 30), mode, value=0.0, transform=_zero_first),
        ratio_case("no norm and no value", (4, 30), mode, 0.0, value=0.0, transform=_zero_first),
        ratio_case("no value", (4, 30), mode, value=0.0),
        ratio_case("", (4, 30), mode, 0.25),
        ratio_case("", (4, 30), mode, 0.0),
        ratio_case("large gradients", (4, 300), mode, gradient=1e3),
        ratio_case("small gradients", (4, 300), mode, 0.0, gradient=1e-3),
        ratio_case("large values", (4, 300), mode, value=1e3),
        ratio_case("channels last", (2, 3, 5, 6), mode,
                   transform=lambda x: x.to(memory_format=torch.channels_last)),
        ratio_case("every other element", (3, 2, 20), mode, transform=lambda x: x[..., ::2]),
        ratio_case("expanded", (3, 5, 1), mode, transform=lambda x: x.expand(3, 5, 4)),
        ratio_case("samples last", (3, 40), mode, transform=lambda x: x.t().contiguous().t()),
    ]
]  # fmt: skip
