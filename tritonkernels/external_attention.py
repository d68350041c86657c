"""External attention: P = softmax over the tokens of x·mkᵀ, r = 1e-9 + Σ_m P, A = P / r, y = A·mv.

A program owns a block of one head's tokens and all M slots. The softmax runs along the tokens: `statistics` takes a
split of them each, `combine` puts the splits together in their order, `output` computes the logits again. Accumulates
in fp32. A is bfloat16 beside bfloat16, else fp32 in TF32 (three times for fp32). Limit: M ≤ 256.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._external_gradients import (
    external_attention_dots_kernel,
    external_attention_memory_kernel,
    external_attention_tokens_kernel,
)
from tritonkernels._external_softmax import by_memory, softmax_of_block, store_by_channels
from tritonkernels._launch import launch, noted_launches, power_of_two, rows, tf32, wide

MAX_MEMORY = 256
_PROGRAMS = 512  # that fill a GPU


@triton.jit
def _add_exponentials(largest, total, block_largest, block_total):
    """(largest, Σ exp(· − largest)) of two parts; a part of nothing but −inf adds nothing."""
    both = tl.maximum(largest, block_largest)
    base = tl.where(both == float("-inf"), 0.0, both)
    return both, total * tl.exp(largest - base) + block_total * tl.exp(block_largest - base)


@triton.jit
def external_attention_statistics_kernel(
    x_ptr,  # [B, S, C], rows x_row apart
    mk_ptr,  # [M, size]
    statistics_ptr,  # [pairs, splits, 2, M]: largest logit, sum of exponentials
    heads,
    S,
    M,
    size,
    x_sample,
    x_row,
    splits,
    split_rows,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    x = x_ptr + pair // heads * x_sample + pair % heads * size
    row, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * split_rows, S)
    for first in range(split * split_rows, last, BLOCK_S):
        tokens, count = x + tl.cast(first, tl.int64) * x_row, last - first
        logits = by_memory(tokens, mk_ptr, count, M, size, x_row, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D)
        logits = tl.where((row < count)[:, None], logits, float("-inf"))
        block_largest = tl.max(logits, 0)
        base = tl.where(block_largest == float("-inf"), 0.0, block_largest)
        block_total = tl.sum(tl.exp(logits - base[None, :]), 0)
        largest, total = _add_exponentials(largest, total, block_largest, block_total)
    statistics = statistics_ptr + (pair * splits + split) * 2 * M + slot
    tl.store(statistics, largest, mask=slot < M)
    tl.store(statistics + M, total, mask=slot < M)


@triton.jit
def external_attention_combine_kernel(
    parts_ptr,  # [pairs, splits, 2, M]
    statistics_ptr,  # [pairs, 2, M]
    M,
    splits,
    BLOCK_M: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_M)
    inside_m = slot < M
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        part = parts_ptr + (pair * splits + split) * 2 * M + slot
        part_largest = tl.load(part, mask=inside_m, other=0.0)
        part_total = tl.load(part + M, mask=inside_m, other=0.0)
        largest, total = _add_exponentials(largest, total, part_largest, part_total)
    tl.store(statistics_ptr + pair * 2 * M + slot, largest, mask=inside_m)
    tl.store(statistics_ptr + pair * 2 * M + M + slot, total, mask=inside_m)


@triton.jit
def external_attention_output_kernel(
    x_ptr,  # [B, S, C], rows x_row apart
    mk_ptr,  # [M, size]
    mv_ptr,  # [M, size]
    statistics_ptr,  # [pairs, 2, M]
    y_ptr,  # [B, S, C]
    heads,
    S,
    M,
    size,
    x_sample,
    x_row,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_S)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    first = (tl.program_id(0) % blocks * BLOCK_S).to(tl.int64)
    count = S - tl.program_id(0) % blocks * BLOCK_S
    x = x_ptr + sample * x_sample + first * x_row + head * size
    _, attention, _ = softmax_of_block(
        x, mk_ptr, statistics_ptr + pair * 2 * M, count, M, size, x_row, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D
    )
    c = heads * size
    y = y_ptr + (sample * S + first) * c + head * size
    store_by_channels(attention, mv_ptr, y, count, M, size, c, WIDE, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D)


@dataclass(frozen=True)
class _Plan:
    num_warps: int
    block_s: int
    block_m: int
    block_d: int
    blocks: int  # of a head's rows
    splits: int  # of a head's rows, for sums along the tokens
    split_rows: int
    parts: int  # of all blocks, for the gradients of the memory
    part_blocks: int

    @property
    def tile(self) -> dict[str, int]:
        return {"BLOCK_S": self.block_s, "BLOCK_M": self.block_m, "BLOCK_D": self.block_d}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": 2}


@functools.lru_cache(maxsize=256)
def _plan(pairs: int, s: int, m: int, size: int, half: bool) -> _Plan:
    """By the shape alone, so that sums keep their order.

    float32 multiplies three times, with parts of both operands in registers: on less of them at a time.
    """
    block_m, block_d = power_of_two(m, 16, MAX_MEMORY), power_of_two(size, 16, 64 if half else 32)
    block_s = 64 if block_m <= 128 else 32
    blocks = triton.cdiv(s, block_s)
    split_blocks = triton.cdiv(blocks, max(1, min(_PROGRAMS // pairs, 32)))
    part_blocks = triton.cdiv(pairs * blocks, max(1, min(_PROGRAMS // triton.cdiv(size, block_d), 64)))
    return _Plan(
        4 if block_m <= 64 and half else 8,
        block_s,
        block_m,
        block_d,
        blocks,
        splits=triton.cdiv(blocks, split_blocks),
        split_rows=split_blocks * block_s,
        parts=triton.cdiv(pairs * blocks, part_blocks),
        part_blocks=part_blocks,
    )


def _tokens(name: str, tensor: Tensor) -> dict[str, object]:
    return {f"{name}_ptr": tensor, f"{name}_sample": tensor.stride(0), f"{name}_row": tensor.stride(1)}


def external_attention(x: Tensor, mk: Tensor, mv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """y [B, S, C], and the largest logits and sums of exponentials [B, heads, 2, M] for the backward."""
    (b, s, c), m, pairs = x.shape, mk.shape[0], x.shape[0] * heads
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    statistics = torch.empty(b, heads, 2, m, device=x.device, dtype=torch.float32)
    if y.numel() == 0:
        return y, statistics
    plan = _plan(pairs, s, m, c // heads, x.dtype != torch.float32)
    x, mk, mv = rows(x), mk.contiguous(), mv.contiguous()
    shared = {**_tokens("x", x), "mk_ptr": mk, "heads": heads, "S": s, "M": m, "size": c // heads}
    shared |= {"PRECISION": tf32(x.dtype), **plan.tile}
    split = {"splits": plan.splits, "split_rows": plan.split_rows}
    parts = statistics
    if plan.splits > 1:
        parts = torch.empty(pairs, plan.splits, 2, m, device=x.device, dtype=torch.float32)
    launch(
        external_attention_statistics_kernel,
        pairs * plan.splits,
        plan.options,
        statistics_ptr=parts,
        **shared,
        **split,
    )
    if plan.splits > 1:
        launch(
            external_attention_combine_kernel,
            pairs,
            {"num_warps": 1},
            parts_ptr=parts,
            statistics_ptr=statistics,
            M=m,
            splits=plan.splits,
            BLOCK_M=plan.block_m,
        )
    launch(
        external_attention_output_kernel,
        pairs * plan.blocks,
        plan.options,
        mv_ptr=mv,
        statistics_ptr=statistics,
        y_ptr=y,
        WIDE=wide(x.dtype) == torch.float32,
        **shared,
    )
    return y, statistics


def external_attention_bwd(
    dy: Tensor, x: Tensor, mk: Tensor, mv: Tensor, statistics: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dmk and dmv."""
    b, s, _ = x.shape
    (m, size), pairs = mk.shape, b * heads
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if dx.numel() == 0:
        return dx, torch.zeros_like(mk), torch.zeros_like(mv)
    plan = _plan(pairs, s, m, size, x.dtype != torch.float32)
    dots = torch.empty(pairs, plan.splits, m, device=x.device, dtype=torch.float32)
    attention, dlogits = torch.empty(2, pairs, s, m, device=x.device, dtype=wide(x.dtype))
    parts = torch.empty(plan.parts, 2, m, size, device=x.device, dtype=torch.float32)
    x, dy, mk, mv = rows(x), rows(dy), mk.contiguous(), mv.contiguous()
    shared = {**_tokens("x", x), **_tokens("dy", dy), "heads": heads, "S": s, "M": m, "size": size}
    shared |= {"PRECISION": tf32(x.dtype), **plan.tile}
    softmax = {"mk_ptr": mk, "mv_ptr": mv, "statistics_ptr": statistics, "dots_ptr": dots, "splits": plan.splits}
    products = {"attention_ptr": attention, "dlogits_ptr": dlogits, "WIDE": wide(x.dtype) == torch.float32}
    launch(
        external_attention_dots_kernel,
        pairs * plan.splits,
        plan.options,
        split_rows=plan.split_rows,
        **shared,
        **softmax,
    )
    launch(
        external_attention_tokens_kernel,
        pairs * plan.blocks,
        plan.options,
        dx_ptr=dx,
        **shared,
        **softmax,
        **products,
    )
    launch(
        external_attention_memory_kernel,
        plan.parts * triton.cdiv(size, plan.block_d),
        plan.options,
        parts_ptr=parts,
        blocks=pairs * plan.blocks,
        part_blocks=plan.part_blocks,
        **shared,
        **products,
    )
    dmk, dmv = parts.sum(0).to(x.dtype)
    return dx, dmk, dmv


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes, for tests/triton_compile.py; `main` is the measured one."""
    cases = []
    for batch, heads, s, m, size, dtype in (
        (64, 1, 196, 64, 512, torch.bfloat16),
        (64, 1, 196, 64, 512, torch.float32),
        (2, 8, 4096, 256, 32, torch.float16),
    ):
        x = torch.empty(batch, s, heads * size, device="meta", dtype=dtype)
        mk = torch.empty(m, size, device="meta", dtype=dtype)
        label = f"B{batch} h{heads} S{s} M{m} d{size} {str(dtype).removeprefix('torch.')}"
        main = (s, dtype) == (196, torch.bfloat16)
        statistics = torch.empty(batch, heads, 2, m, device="meta", dtype=torch.float32)
        cases += noted_launches(label, main, external_attention, x, mk, mk, heads)
        cases += noted_launches(label, main, external_attention_bwd, x, x, mk, mk, statistics, heads)
    # That one has no product.
    return [case | {"main": case["main"] and case["kernel"] is not external_attention_combine_kernel} for case in cases]
