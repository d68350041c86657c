"""Cases of affine_grad_sample and affine_grad_norm_sq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmix
from fastmix.reference import affine_grad_norm as reference
from fastmix.testing.cases import Case


def sample_case(
    name: str,
    sizes: tuple[int, int, int, int],
    statistics: tuple[int, ...],
    *,
    mean: bool = True,
    offset: float = 0.0,
    spread: float = 1.0,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    """sizes: B, R, C, L; statistics: the shape of mean (None without `mean`) and rstd; offset, spread: of input."""

    def make(generator):
        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        input, grad_output = offset + spread * draw(*sizes), draw(*sizes)
        values = {"mean": offset + 0.1 * spread * draw(*statistics), "rstd": (1 + draw(*statistics).square()) / spread}
        values["mean"] = values["mean"] if mean else None
        return {"input": transform(input), "grad_output": transform(grad_output), **values}

    return Case(
        "affine_grad_norm",
        f"affine_grad_sample {name}",
        fastmix.affine_grad_sample,
        reference.affine_grad_sample,
        make,
        independent=1,
    )


def norm_case(name: str, shape: tuple[int, ...], channel_dim: int = -1, bias: bool = True) -> Case:
    def make(generator):
        input, grad_output = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        return {"input": input, "grad_output": grad_output, "channel_dim": channel_dim, "bias": bias}

    # A norm is one number, whose error may be 0 by chance: the slice is the batch.
    return Case(
        "affine_grad_norm", f"affine_grad_norm_sq {name}", fastmix.affine_grad_norm_sq, _reference_norm_sq, make
    )


def _reference_norm_sq(input: Tensor, grad_output: Tensor, channel_dim: int, bias: bool) -> Tensor:
    # [B, 1, C, L]
    x, g = (tensor.movedim(channel_dim, 1).unsqueeze(-1).flatten(2)[:, None] for tensor in (input, grad_output))
    grads = reference.affine_grad_sample(x, g, None, torch.ones_like(x[..., 0]))
    return sum(grad.square().sum(1) for grad in grads[: 1 + bias])


CASES = [
    *(
        sample_case(f"{'x'.join(map(str, sizes))}, statistics of {'x'.join(map(str, statistics))}"
                    f"{'' if mean else ', no mean'}", sizes, statistics, mean=mean)
        for sizes, statistics, mean in [
            # LayerNorm and RMSNorm
            ((3, 1, 9, 1), (3, 1, 1), True), ((3, 7, 40, 1), (3, 7, 1), True), ((2, 50, 33, 1), (2, 50, 1), False),
            ((2, 130, 70, 1), (2, 130, 1), True), ((1, 5, 300, 1), (1, 5, 1), False),
            # GroupNorm and InstanceNorm
            ((3, 1, 8, 25), (3, 1, 8), True), ((2, 1, 33, 100), (2, 1, 33), True), ((3, 1, 6, 7), (3, 1, 1), True),
            ((2, 1, 12, 600), (2, 1, 12), False), ((2, 1, 5, 1), (2, 1, 5), True),
            # Positions on both sides, and statistics that broadcast
            ((3, 5, 6, 7), (3, 5, 6), True), ((2, 9, 17, 3), (1, 1, 1), True), ((2, 4, 10, 33), (4, 10), False),
            ((3, 4, 6, 5), (), True), ((5, 1, 6, 1), (5, 1, 6), True),
        ]
    ),
    sample_case("empty batch", (0, 4, 6, 1), (0, 4, 1)),
    sample_case("no position", (3, 0, 6, 1), (3, 0, 1)),
    sample_case("no position behind the channels", (3, 1, 6, 0), (3, 1, 6)),
    # Σ g·x − mean·Σ g would lose what lies behind the mean.
    sample_case("mean far from 0, rows", (3, 40, 12, 1), (3, 40, 1), offset=1e3),
    sample_case("mean far from 0, channels", (3, 1, 12, 40), (3, 1, 12), offset=1e3),
    sample_case("nearly constant inputs", (3, 20, 12, 1), (3, 20, 1), offset=1.0, spread=1e-2),
    sample_case("large values", (3, 20, 12, 1), (3, 20, 1), transform=lambda x: 1e3 * x),
    sample_case("small values", (3, 20, 12, 1), (3, 20, 1), transform=lambda x: 1e-3 * x),
    sample_case("transposed", (3, 20, 12, 1), (3, 20, 1), transform=lambda x: x.transpose(1, 2).contiguous()
                .transpose(1, 2)),
    sample_case("channels last", (3, 1, 12, 20), (3, 1, 12), transform=lambda x: x.mT.contiguous().mT),
    *(
        norm_case(f"{'x'.join(map(str, shape))}, channel_dim {dim}{'' if bias else ', without bias'}", shape, dim, bias)
        for shape, dim, bias in [
            ((4, 9), -1, True), ((4, 9), 1, False), ((3, 7, 12), -1, True), ((3, 7, 12), 2, False),
            ((3, 12, 7), 1, True), ((2, 6, 5, 8), 1, True), ((2, 6, 5, 8), -2, False), ((2, 3, 5, 4, 6), -1, True),
            ((0, 3, 6), 1, True),
        ]
    ),
]  # fmt: skip
