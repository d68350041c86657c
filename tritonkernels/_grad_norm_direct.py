"""The direct form of per-sample norms: the gradient Σ_t g_t a_tᵀ itself, a tile at a time, squared in registers.

A program owns a run of a sample's tiles (and of its blocks of Σ_t g_t for the bias); runs are summed in their order.
After the Gram form only samples whose norm was lost have anything to do. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._grad_norm_tile import add_product, gram_norm, positions_of, total
from tritonkernels._launch import launch, power_of_two, tf32
from tritonkernels._token_norm import load_rows

_PROGRAMS = 1024  # that wait for the few samples that are lost


@triton.jit
def linear_grad_norm_direct_kernel(
    a_ptr,  # [B, T, in_features]
    g_ptr,  # [B, T, out_features]
    lengths_ptr,  # [B]
    gram_ptr,  # [B, pairs, 4] of the Gram form, or None
    parts_ptr,  # [B, runs]
    T,
    in_features,
    out_features,
    a_sample,
    a_row,
    g_sample,
    g_row,
    pairs,
    runs,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b, run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    count = positions_of(lengths_ptr, b, T)
    blocks_o, blocks_i = tl.cdiv(out_features, BLOCK_O), tl.cdiv(in_features, BLOCK_I)
    if gram_ptr is not None:
        _, lost = gram_norm(gram_ptr, b, pairs, False)
        blocks_o = tl.where(lost, blocks_o, 0)
    a, g = a_ptr + b * a_sample, g_ptr + b * g_sample
    row = tl.arange(0, BLOCK_T)
    norm_sq = tl.cast(0.0, tl.float32)
    for tile in range(run, blocks_o * blocks_i, runs):
        o = tile // blocks_i * BLOCK_O + tl.arange(0, BLOCK_O)
        i = tile % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
        gradient = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for first in range(0, count, BLOCK_T):
            t = first + row
            g_block = load_rows(g, t, g_row, o, t < count, o < out_features)
            a_block = load_rows(a, t, a_row, i, t < count, i < in_features)
            gradient = add_product(gradient, tl.trans(g_block), a_block, PRECISION)
        norm_sq += total(gradient * gradient)
    if BIAS:
        for block in range(run, blocks_o, runs):
            o = block * BLOCK_O + tl.arange(0, BLOCK_O)
            sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
            for first in range(0, count, BLOCK_T):
                t = first + row
                sums += load_rows(g, t, g_row, o, t < count, o < out_features).to(tl.float32)
            sums_of_o = tl.sum(sums, 0)
            norm_sq += tl.sum(sums_of_o * sums_of_o, 0)
    tl.store(parts_ptr + b * runs + run, norm_sq)


def direct_blocks(t: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_O, BLOCK_I, BLOCK_T)."""
    largest, deepest = (64, 32) if dtype == torch.float32 else (128, 64)
    return (
        power_of_two(out_features, 16, largest),
        power_of_two(in_features, 16, largest),
        power_of_two(t, 16, deepest),
    )


def direct_parts(a: Tensor, g: Tensor, lengths: Tensor | None, bias: bool, gram: Tensor | None) -> Tensor:
    """[B, runs], whose sums are the norms; with the parts of the Gram form only those that it lost."""
    (b, t, in_features), out_features = a.shape, g.shape[2]
    block_o, block_i, block_t = direct_blocks(t, in_features, out_features, a.dtype)
    runs = max(1, triton.cdiv(out_features, block_o) * triton.cdiv(in_features, block_i))
    if gram is not None:
        runs = min(runs, max(8, _PROGRAMS // b))
    parts = torch.empty(b, runs, device=a.device, dtype=torch.float32)
    launch(
        linear_grad_norm_direct_kernel,
        b * runs,
        {"num_warps": 8 if block_o * block_i >= 128 * 128 else 4, "num_stages": 3},
        a_ptr=a,
        g_ptr=g,
        lengths_ptr=lengths,
        gram_ptr=gram,
        parts_ptr=parts,
        T=t,
        in_features=in_features,
        out_features=out_features,
        a_sample=a.stride(0),
        a_row=a.stride(1),
        g_sample=g.stride(0),
        g_row=g.stride(1),
        pairs=0 if gram is None else gram.shape[1],
        runs=runs,
        BIAS=bias,
        PRECISION=tf32(a.dtype),
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        BLOCK_T=block_t,
    )
    return parts
