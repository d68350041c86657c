"""out_b = scale_b·(x_b·y_b + added_b) for every sample b, with operands of any strides, for what is no norm.

A program owns a tile of one sample's out. Positions that do not count are neither read nor summed, and their places of
out become 0; samples that another form serves are left out. x has y's dtype or, where it is such an out itself, the one
that holds it: y then multiplies in that one. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._grad_norm_tile import add_product, gram_norm, positions_of
from tritonkernels._launch import launch, power_of_two, tf32


@triton.jit
def linear_grad_product_kernel(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, K, N]
    added_ptr,  # [B, M], or None
    scale_ptr,  # [B], or None
    lengths_ptr,  # [B]
    gram_ptr,  # [B, pairs, 4] of the Gram form's norms, or None: all samples are served
    out_ptr,  # [B, M, N]
    M,
    N,
    K,
    pairs,
    x_sample,
    x_m,
    x_k,
    y_sample,
    y_k,
    y_n,
    added_sample,
    added_m,
    out_sample,
    out_m,
    out_n,
    M_POSITIONS: tl.constexpr,
    N_POSITIONS: tl.constexpr,
    K_POSITIONS: tl.constexpr,
    LOST: tl.constexpr,  # whether those samples are served whose gradient the Gram form lost, or the others
    CHAINED: tl.constexpr,  # x is an out of another product: 0 where positions do not count
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // (blocks_m * blocks_n)).to(tl.int64)
    m = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    last_m = positions_of(lengths_ptr if M_POSITIONS else None, b, M)
    last_n = positions_of(lengths_ptr if N_POSITIONS else None, b, N)
    last_k = positions_of(lengths_ptr if K_POSITIONS else None, b, K)
    rows = M
    if gram_ptr is not None:
        _, lost = gram_norm(gram_ptr, b, pairs, True)
        last_k, rows = tl.where(lost == LOST, last_k, 0), tl.where(lost == LOST, rows, 0)
    # Blocks of a row that end anywhere can't be copied 16 bytes at a time.
    last_k_of_x = K if CHAINED else last_k
    inside = (m < last_m)[:, None] & (n < last_n)[None, :]
    x = x_ptr + b * x_sample + m.to(tl.int64)[:, None] * x_m
    y = y_ptr + b * y_sample + n.to(tl.int64)[None, :] * y_n
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, last_k, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at = k.to(tl.int64)
        left = tl.load(x + at[None, :] * x_k, mask=(m < last_m)[:, None] & (k < last_k_of_x)[None, :], other=0.0)
        right = tl.load(y + at[:, None] * y_k, mask=(k < last_k)[:, None] & (n < last_n)[None, :], other=0.0)
        out = add_product(out, left, right.to(left.dtype), PRECISION)
    if added_ptr is not None:
        out += tl.load(added_ptr + b * added_sample + m * added_m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    if scale_ptr is not None:
        out *= tl.load(scale_ptr + b)
    out = tl.where(inside, out, 0.0).to(out_ptr.dtype.element_ty)
    to = out_ptr + b * out_sample + m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
    tl.store(to, out, mask=(m < rows)[:, None] & (n < N)[None, :])


def product_blocks(m: int, n: int, k: int, operand: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K)."""
    largest, deepest = (64, 32) if operand == torch.float32 else (128, 64)
    return power_of_two(m, 16, largest), power_of_two(n, 16, largest), power_of_two(k, 16, deepest)


def product(
    x: Tensor,
    y: Tensor,
    out: Tensor,
    *,
    positions: str,
    chained: bool = False,
    lengths: Tensor | None = None,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    gram: Tensor | None = None,
    lost: bool = False,
) -> Tensor:
    """out [B, M, N], written and given back; `positions` names the dimensions among m, n, k that `lengths` limits.

    chained: x is an out of this function, written with the same lengths. gram: with `gram_parts`, only the samples
    whose gradient is lost, or only the others.
    """
    (b, m, k), n = x.shape, y.shape[2]
    block_m, block_n, block_k = product_blocks(m, n, k, x.dtype)
    launch(
        linear_grad_product_kernel,
        b * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),
        {"num_warps": 8 if block_m * block_n >= 128 * 128 else 4, "num_stages": 3},
        x_ptr=x,
        y_ptr=y,
        added_ptr=added,
        scale_ptr=scale,
        lengths_ptr=lengths,
        gram_ptr=gram,
        out_ptr=out,
        M=m,
        N=n,
        K=k,
        pairs=0 if gram is None else gram.shape[1],
        x_sample=x.stride(0),
        x_m=x.stride(1),
        x_k=x.stride(2),
        y_sample=y.stride(0),
        y_k=y.stride(1),
        y_n=y.stride(2),
        added_sample=0 if added is None else added.stride(0),
        added_m=0 if added is None else added.stride(1),
        out_sample=out.stride(0),
        out_m=out.stride(1),
        out_n=out.stride(2),
        M_POSITIONS="m" in positions,
        N_POSITIONS="n" in positions,
        K_POSITIONS="k" in positions,
        LOST=lost,
        CHAINED=chained,
        PRECISION=tf32(y.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return out
