"""What the kernels of token_conv.py share: tiles of tokens × channels, shifted along the tokens, and their weights."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels._launch import power_of_two


@triton.jit
def tokens_of(tile, S, BLOCK_S: tl.constexpr):
    """(sample, tokens) of a tile; the last one of a sample has tokens past the end."""
    tiles = tl.cdiv(S, BLOCK_S)
    return (tile // tiles).to(tl.int64), tile % tiles * BLOCK_S + tl.arange(0, BLOCK_S)


@triton.jit
def shifted(x, token, S, stride, c, inside_c):
    """Rows `token` of x as float32, 0 outside of the sequence."""
    mask = ((token >= 0) & (token < S))[:, None] & inside_c[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softmax_parts(logits, K, mask, SOFTMAX: tl.constexpr):
    """(largest logit, sum of exponentials) of rows of K logits; of plain weights nothing is used."""
    zero = tl.where(mask, 0.0, 0.0)
    largest, total = zero, zero
    if SOFTMAX:
        largest = zero - float("inf")
        for k in range(K):
            largest = tl.maximum(largest, tl.load(logits + k, mask=mask, other=0.0).to(tl.float32))
        for k in range(K):
            total += tl.exp(tl.load(logits + k, mask=mask, other=0.0).to(tl.float32) - largest)
    return largest, total


@triton.jit
def weight_of(pointer, mask, largest, total, SOFTMAX: tl.constexpr):
    value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        return tl.where(mask, tl.exp(value - largest) / total, 0.0)
    return value


def offset_of(taps: int, causal: bool) -> int:
    return taps - 1 if causal else (taps - 1) // 2


def tile_of(tokens: int, channels: int) -> tuple[int, int]:
    """(tokens, channels) of a program that writes a tile."""
    block_c = power_of_two(channels, 1, 128)
    return power_of_two(tokens, 1, min(4096 // block_c, 64)), block_c
