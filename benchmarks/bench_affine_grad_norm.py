"""Per-sample gradients of the scale and shift of LayerNorm, GroupNorm and InstanceNorm, against PyTorch."""

from __future__ import annotations

import math

import torch

from fastmix.benchmarks import grad_norm_peers as peers
from fastmix.benchmarks.harness import FORWARD, BenchCase, Provider
from fastmix.testing.affine_grad_norm import sample_case

# Name → B, R, C, L of the input, and the shape of its statistics.
LAYERS = {
    "LayerNorm B8 T128 C512": ((8, 128, 512, 1), (8, 128, 1)),
    "LayerNorm B2 T1024 C256": ((2, 1024, 256, 1), (2, 1024, 1)),
    "InstanceNorm B16 C64 28x28": ((16, 1, 64, 784), (16, 1, 64)),
}
GPU_LAYERS = {
    "LayerNorm B32 T1024 C1024": ((32, 1024, 1024, 1), (32, 1024, 1)),
    "InstanceNorm B256 C64 56x56": ((256, 1, 64, 3136), (256, 1, 64)),
}


def cases(device: str) -> list[BenchCase]:
    layers, dtype = (GPU_LAYERS, torch.bfloat16) if device == "cuda" else (LAYERS, torch.float32)
    return [_affine(name, *sizes, dtype) for name, sizes in layers.items()]


def _affine(name: str, sizes: tuple[int, int, int, int], statistics: tuple[int, ...], dtype: torch.dtype) -> BenchCase:
    elements = math.prod(sizes)
    return BenchCase(
        sample_case(name, sizes, statistics),
        dtype,
        # Read the input and the gradient of the output; an element is normalised, multiplied and added twice.
        moved_bytes={FORWARD: 2 * elements * dtype.itemsize},
        flops={FORWARD: 5 * elements},
        peers=(Provider("normalise, multiply, sum", peers.affine_products),),
        headline=True,
    )
