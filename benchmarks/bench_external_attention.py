"""External attention against the composition that the paper's code writes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.benchmarks.peers import compiled
from fastmix.testing.external_attention import external_attention_case

MEMORY = 64
# (B, S, C, heads)
HEADLINE = (8, 196, 512, 1)
SHAPES = (HEADLINE, (1, 196, 512, 1), (8, 1024, 256, 4), (1, 4096, 256, 8), (8, 197, 384, 6), (2, 4096, 512, 1))
GPU_SHAPES = ((256, 196, 512, 1), (64, 1024, 256, 4), (8, 16384, 512, 1))


def cases(device: str) -> list[BenchCase]:
    on_gpu = device == "cuda"
    both = (torch.float32, torch.bfloat16)
    return [
        *(_external_attention(shape, dtype) for shape in GPU_SHAPES if on_gpu for dtype in both),
        *(_external_attention(shape, torch.float32) for shape in SHAPES),
        *(_external_attention(shape, torch.bfloat16) for shape in SHAPES[:3]),
    ]


def _external_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> BenchCase:
    b, s, c, heads = shape
    tokens, memory = b * s * c * dtype.itemsize, 2 * MEMORY * (c // heads) * dtype.itemsize
    product = 2 * b * s * c * MEMORY  # operations of one product of all tokens with the memory
    # Forward: read x and the memory, write y; two products. Backward: read dy, x and the memory, write their gradients;
    # four products. What is kept between them, or computed again, is no work of the operator.
    return BenchCase(
        external_attention_case(f"{b}x{s}x{c}, M {MEMORY}, {heads} heads", (b, s, c), MEMORY, heads),
        dtype,
        moved_bytes={FORWARD: 2 * tokens + memory, BOTH: 5 * tokens + 3 * memory},
        flops={FORWARD: 2 * product, BOTH: 6 * product},
        peers=_PEERS,
        headline=shape == HEADLINE,
    )


def _composition(x: Tensor, mk: Tensor, mv: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    attention = torch.softmax(heads @ mk.t(), dim=-2)
    attention = attention / (1e-9 + attention.sum(dim=-1, keepdim=True))
    return (attention @ mv).transpose(1, 2).flatten(-2)


def _composition_in_float32(x: Tensor, mk: Tensor, mv: Tensor, num_heads: int) -> Tensor:
    return _composition(x.float(), mk.float(), mv.float(), num_heads).to(x.dtype)


_PEERS = (
    Provider("eager", _composition),
    Provider("eager, float32", _composition_in_float32),
    compiled("eager", _composition),
)
