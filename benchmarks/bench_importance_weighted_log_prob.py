"""The importance-weighted estimate of a VAE's log p(x), against PyTorch's operations one after the other."""

from __future__ import annotations

import torch

from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.reference.importance_weighted_log_prob import importance_weighted_log_prob as eager
from fastmix.testing.importance_weighted_log_prob import density_case

# B, K, D
SHAPES = [(64, 5000, 64), (16, 512, 128)]
GPU_SHAPES = [(256, 5000, 64), (64, 5000, 64)]


def cases(device: str) -> list[BenchCase]:
    shapes, dtypes = (
        (GPU_SHAPES, (torch.bfloat16, torch.float32)) if device == "cuda" else (SHAPES, (torch.float32, torch.bfloat16))
    )
    return [_case(shape, dtype, headline=dtype == dtypes[0]) for dtype in dtypes for shape in shapes]


def _case(shape: tuple[int, int, int], dtype: torch.dtype, *, headline: bool) -> BenchCase:
    b, k, d = shape
    elements = b * k * d
    return BenchCase(
        density_case("", shape),
        dtype,
        # The latents are read, by the backward again, which writes as much.
        moved_bytes={FORWARD: elements * dtype.itemsize, BOTH: 3 * elements * dtype.itemsize},
        # Two differences, a sum, two products, an addition; the backward does so again, and seven for the gradients.
        flops={FORWARD: 6 * elements, BOTH: 19 * elements},
        peers=(Provider("PyTorch eager", eager),),
        headline=headline,
    )
