"""Cases of importance_weighted_log_prob."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.ops.importance_weighted_log_prob import importance_weighted_log_prob
from fastmix.reference import importance_weighted_log_prob as reference
from fastmix.testing.cases import Case


def density_case(
    name: str,
    shape: tuple[int, int, int],
    *,
    logvar: float | None = None,
    log_px_z: Callable[[Tensor], Tensor] = lambda x: x - 100,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    """shape: B, K, D; logvar: of all latents, None draws it; log_px_z, of what is drawn; layout: of z."""
    b, k, d = shape

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        spread = draw(b, d) if logvar is None else torch.full((b, d), logvar, dtype=torch.float64)
        mu, noise = draw(b, d), draw(b, k, d)
        z = mu.unsqueeze(1) + (spread / 2).exp().unsqueeze(1) * noise
        return {"log_px_z": log_px_z(3 * draw(b, k)), "z": layout(z), "mu": mu, "logvar": spread}

    # A sample's value, and its gradients where one latent has most of the weight, hang on the error of one number,
    # which may be 0 by chance: the slice is the batch.
    return Case(
        "importance_weighted_log_prob",
        name or "x".join(map(str, shape)),
        importance_weighted_log_prob,
        reference.importance_weighted_log_prob,
        make,
        gradients={"log_px_z": 0, "z": 0, "mu": 0, "logvar": 0},
    )


def _without(*places: slice | int) -> Callable[[Tensor], Tensor]:
    """log_px_z without what is at places, of its samples or of its samples and latents."""

    def remove(x: Tensor) -> Tensor:
        x = x.clone()
        x[places] = -torch.inf
        return x

    return remove


_SHAPES = [
    (3, 5, 4), (2, 64, 16), (5, 1, 8), (1, 1, 1), (4, 7, 1), (2, 13, 37), (1, 1300, 33), (3, 1030, 3), (2, 70, 1031),
    (33, 9, 17), (0, 4, 3), (3, 4, 0), (0, 1, 0),
]  # fmt: skip
CASES = [density_case("", shape) for shape in _SHAPES] + [
    density_case("narrow", (3, 40, 9), logvar=-40.0),
    density_case("wide", (3, 40, 9), logvar=40.0),
    density_case("improbable", (3, 40, 9), log_px_z=lambda x: x * 1e3 - 1e4),
    density_case("one latent of weight 0", (3, 40, 9), log_px_z=_without(slice(None), 3)),
    density_case("all but one of weight 0", (3, 40, 9), log_px_z=_without(slice(None), slice(1, None))),
    density_case("no weight in the first sample", (3, 40, 9), log_px_z=_without(0)),
    density_case("no weight at all", (2, 1100, 30), log_px_z=_without(slice(None))),
    density_case("log-densities of every other latent", (3, 20, 9), log_px_z=lambda x: torch.cat([x, x], 1)[:, ::2]),
    density_case("log-densities, samples last", (3, 20, 9), log_px_z=lambda x: x.t().contiguous().t()),
    density_case("latents first", (3, 20, 9), layout=lambda z: z.transpose(0, 1).contiguous().transpose(0, 1)),
    density_case("dimensions first", (3, 20, 9), layout=lambda z: z.mT.contiguous().mT),
    density_case("every other dimension", (3, 20, 9), layout=lambda z: torch.cat([z, z], 2)[..., ::2]),
    density_case("expanded", (3, 20, 9), layout=lambda z: z[:, :1].expand(z.shape)),
]
