"""Norms of an embedding's per-sample gradients, against the ways of Opacus."""

from __future__ import annotations

import torch

from fastmix.benchmarks import grad_norm_peers as peers
from fastmix.benchmarks.harness import FORWARD, BenchCase, Provider
from fastmix.testing.embedding_grad_norm import embedding_case

# B, L, D
SHAPES = ((8, 128, 512), (2, 1024, 256))
GPU_SHAPES = ((32, 1024, 1024),)
VOCABULARY = 1000


def cases(device: str) -> list[BenchCase]:
    shapes, dtype = (GPU_SHAPES, torch.bfloat16) if device == "cuda" else (SHAPES, torch.float32)
    return [_embedding(shape, dtype) for shape in shapes]


def _embedding(shape: tuple[int, int, int], dtype: torch.dtype) -> BenchCase:
    b, length, d = shape
    elements = b * length * d
    return BenchCase(
        embedding_case(f"B{b} L{length} D{d}, {VOCABULARY} ids", shape, VOCABULARY),
        dtype,
        # Read the ids and the gradient of the output; a row is added to those of its id, and the sum squared.
        moved_bytes={FORWARD: elements * dtype.itemsize + 8 * b * length},
        flops={FORWARD: 3 * elements},
        peers=(
            Provider("a table a sample", peers.embedding_tables),
            Provider("pairs of equal ids", peers.embedding_pairs),
        ),
        headline=True,
    )
