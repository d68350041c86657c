"""The Gram form of per-sample norms, n² = Σ_tu (a_t·a_u)(g_t·g_u), the bias adding 1 to a_t·a_u.

A program owns a pair of a sample's blocks of positions and both their products, which never leave the chip; pairs are
summed in their order. A norm that is small beside its terms of t = u has lost digits: it is computed again from the
gradient itself (_grad_norm_direct.py), exact without a second, centred copy of a. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._grad_norm_direct import direct_parts
from tritonkernels._grad_norm_tile import add_product, gram_norm, positions_of, total
from tritonkernels._launch import launch, power_of_two, tf32
from tritonkernels._token_norm import load_rows


@triton.jit
def linear_grad_norm_gram_kernel(
    a_ptr,  # [B, T, in_features]
    g_ptr,  # [B, T, out_features]
    lengths_ptr,  # [B]
    gram_ptr,  # [B, pairs, 4]: parts of the weight's n² and of its terms of t = u, then the bias's
    T,
    in_features,
    out_features,
    a_sample,
    a_row,
    g_sample,
    g_row,
    BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    pairs = blocks * (blocks + 1) // 2
    b, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    count = positions_of(lengths_ptr, b, T)
    # Every pair once: a block and the one pair // blocks behind it, round the end.
    first_t, first_u = pair % blocks * BLOCK_T, (pair + pair // blocks) % blocks * BLOCK_T
    t, u = first_t + tl.arange(0, BLOCK_T), first_u + tl.arange(0, BLOCK_T)
    a, g = a_ptr + b * a_sample, g_ptr + b * g_sample
    column = tl.arange(0, BLOCK_K)
    steps_of_a = tl.cdiv(in_features, BLOCK_K)
    steps = tl.where(tl.maximum(first_t, first_u) < count, steps_of_a + tl.cdiv(out_features, BLOCK_K), 0)
    products_of_a = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    # One loop for both, so that the first loads of g overlap with the last products of a.
    for step in range(steps):
        of_a = step < steps_of_a
        x, row = tl.where(of_a, a, g), tl.where(of_a, a_row, g_row)
        k = tl.where(of_a, step, step - steps_of_a) * BLOCK_K + column
        inside = k < tl.where(of_a, in_features, out_features)
        left = load_rows(x, t, row, k, t < count, inside)
        right = left if ONE_BLOCK else load_rows(x, u, row, k, u < count, inside)
        products = add_product(products, left, tl.trans(right), PRECISION)
        if step == steps_of_a - 1:
            products_of_a = products
            products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    to = gram_ptr + (b * pairs + pair) * 4
    times, diagonal = tl.where(pair < blocks, 1.0, 2.0), t[:, None] == u[None, :]
    if BIAS:
        tl.store(to + 2, total(products) * times)
        tl.store(to + 3, total(tl.where(diagonal, products, 0.0)))
    else:
        tl.store(to + 2, 0.0)
        tl.store(to + 3, 0.0)
    terms = products * products_of_a
    tl.store(to, total(terms) * times)
    tl.store(to + 1, total(tl.where(diagonal, terms, 0.0)))


@triton.jit
def linear_grad_norm_choose_kernel(
    gram_ptr,  # [B, pairs, 4]
    direct_ptr,  # [B, runs], of the samples whose norm is lost
    norm_sq_ptr,  # [B]
    pairs,
    runs,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    norm_sq, lost = gram_norm(gram_ptr, b, pairs, False)
    if lost:
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, runs, BLOCK):
            run = first + tl.arange(0, BLOCK)
            sums += tl.load(direct_ptr + b * runs + run, mask=run < runs, other=0.0)
        norm_sq = tl.sum(sums, 0)
    tl.store(norm_sq_ptr + b, norm_sq)


@triton.jit
def _sum_of_squares(row, size, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < size, other=0.0).to(tl.float32)
        sums += x * x
    return tl.sum(sums, 0)


@triton.jit
def linear_grad_norm_row_kernel(
    a_ptr,  # [B, 1, in_features]
    g_ptr,  # [B, 1, out_features]
    lengths_ptr,  # [B]
    norm_sq_ptr,  # [B]
    in_features,
    out_features,
    a_sample,
    g_sample,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One position: ‖a‖²‖g‖²."""
    b = tl.program_id(0).to(tl.int64)
    count = positions_of(lengths_ptr, b, 1)
    of_a = _sum_of_squares(a_ptr + b * a_sample, in_features * count, BLOCK)
    of_g = _sum_of_squares(g_ptr + b * g_sample, out_features * count, BLOCK)
    if BIAS:
        of_a += 1.0
    tl.store(norm_sq_ptr + b, of_a * of_g)


def gram_blocks(t: int, dtype: torch.dtype) -> tuple[int, int, dict[str, int]]:
    """(BLOCK_T, BLOCK_K, options). Small blocks are waited for, not computed with: more of them are on their way."""
    if dtype == torch.float32:
        block = power_of_two(t, 16, 64)
        return block, 32, {"num_warps": max(1, block // 16), "num_stages": 3}
    block = power_of_two(t, 16, 128)
    return block, 64, {"num_warps": block // 16, "num_stages": {16: 6, 32: 5, 64: 4, 128: 3}[block]}


def gram_parts(a: Tensor, g: Tensor, lengths: Tensor | None, bias: bool) -> Tensor:
    """[B, pairs, 4]: see `gram_norm`; a and g as `rows` gives them, not empty."""
    (b, t, in_features), out_features = a.shape, g.shape[2]
    block_t, block_k, options = gram_blocks(t, a.dtype)
    blocks = triton.cdiv(t, block_t)
    pairs = blocks * (blocks + 1) // 2
    gram = torch.empty(b, pairs, 4, device=a.device, dtype=torch.float32)
    launch(
        linear_grad_norm_gram_kernel,
        b * pairs,
        options,
        a_ptr=a,
        g_ptr=g,
        lengths_ptr=lengths,
        gram_ptr=gram,
        T=t,
        in_features=in_features,
        out_features=out_features,
        a_sample=a.stride(0),
        a_row=a.stride(1),
        g_sample=g.stride(0),
        g_row=g.stride(1),
        BIAS=bias,
        ONE_BLOCK=blocks == 1,
        PRECISION=tf32(a.dtype),
        BLOCK_T=block_t,
        BLOCK_K=block_k,
    )
    return gram


def norm_sq_by_gram(a: Tensor, g: Tensor, lengths: Tensor | None, bias: bool) -> Tensor:
    """[B]; a and g as `rows` gives them, not empty."""
    (b, t, in_features), out_features = a.shape, g.shape[2]
    norm_sq = torch.empty(b, device=a.device, dtype=torch.float32)
    if t == 1:
        block = power_of_two(max(in_features, out_features), 16, 4096)
        launch(
            linear_grad_norm_row_kernel,
            b,
            {"num_warps": max(1, block // 512)},
            a_ptr=a,
            g_ptr=g,
            lengths_ptr=lengths,
            norm_sq_ptr=norm_sq,
            in_features=in_features,
            out_features=out_features,
            a_sample=a.stride(0),
            g_sample=g.stride(0),
            BIAS=bias,
            BLOCK=block,
        )
        return norm_sq
    gram = gram_parts(a, g, lengths, bias)
    direct = direct_parts(a, g, lengths, bias, gram)
    launch(
        linear_grad_norm_choose_kernel,
        b,
        {"num_warps": 1},
        gram_ptr=gram,
        direct_ptr=direct,
        norm_sq_ptr=norm_sq,
        pairs=gram.shape[1],
        runs=direct.shape[1],
        BLOCK=128,
    )
    return norm_sq
