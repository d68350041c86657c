"""The backward of external attention, in three kernels: see external_attention.py.

dA = dy·mvᵀ, dP = (dA − Σ_m dA·A) / r, dL = P·(dP − Σ_s dP·P), dx = dL·mk. `dots` sums dP·P along the tokens, a split
of a head's tokens each; `tokens` writes dx, A and dL of a block; `memory` multiplies dmk = dLᵀ·x and dmv = Aᵀ·dy, a
part of all blocks each, whose sums the launcher adds.
"""

import triton
import triton.language as tl

from tritonkernels._external_softmax import by_memory, operand, softmax_of_block, store_by_channels


@triton.jit
def _gradient_of_softmax(
    x, dy, mk, mv, statistics, count, M, size, x_row, dy_row,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """P, A and dP [BLOCK_S, BLOCK_M]."""
    softmax, attention, total = softmax_of_block(
        x, mk, statistics, count, M, size, x_row, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D
    )
    gradient = by_memory(dy, mv, count, M, size, dy_row, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D)
    gradient = (gradient - tl.sum(gradient * attention, 1)[:, None]) / total[:, None]
    return softmax, attention, gradient


@triton.jit
def external_attention_dots_kernel(
    x_ptr,  # [B, S, C], rows x_row apart
    dy_ptr,  # [B, S, C], rows dy_row apart
    mk_ptr,  # [M, size]
    mv_ptr,  # [M, size]
    statistics_ptr,  # [pairs, 2, M]
    dots_ptr,  # [pairs, splits, M]: Σ_s dP·P
    heads,
    S,
    M,
    size,
    x_sample,
    x_row,
    dy_sample,
    dy_row,
    splits,
    split_rows,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    sample, head = pair // heads, pair % heads
    x = x_ptr + sample * x_sample + head * size
    dy = dy_ptr + sample * dy_sample + head * size
    statistics = statistics_ptr + pair * 2 * M
    slot = tl.arange(0, BLOCK_M)
    dots = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * split_rows, S)
    for first in range(split * split_rows, last, BLOCK_S):
        at = tl.cast(first, tl.int64)
        softmax, _, gradient = _gradient_of_softmax(
            x + at * x_row, dy + at * dy_row, mk_ptr, mv_ptr, statistics, last - first, M, size, x_row, dy_row,
            PRECISION, BLOCK_S, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dots += tl.sum(gradient * softmax, 0)
    tl.store(dots_ptr + (pair * splits + split) * M + slot, dots, mask=slot < M)


@triton.jit
def external_attention_tokens_kernel(
    x_ptr,  # [B, S, C], rows x_row apart
    dy_ptr,  # [B, S, C], rows dy_row apart
    mk_ptr,  # [M, size]
    mv_ptr,  # [M, size]
    statistics_ptr,  # [pairs, 2, M]
    dots_ptr,  # [pairs, splits, M]
    dx_ptr,  # [B, S, C]
    attention_ptr,  # [pairs, S, M]
    dlogits_ptr,  # [pairs, S, M]
    heads,
    S,
    M,
    size,
    x_sample,
    x_row,
    dy_sample,
    dy_row,
    splits,
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
    dy = dy_ptr + sample * dy_sample + first * dy_row + head * size
    softmax, attention, gradient = _gradient_of_softmax(
        x, dy, mk_ptr, mv_ptr, statistics_ptr + pair * 2 * M, count, M, size, x_row, dy_row,
        PRECISION, BLOCK_S, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    row, slot = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_M)
    dots = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        dots += tl.load(dots_ptr + (pair * splits + split) * M + slot, mask=slot < M, other=0.0)
    gradient = softmax * (gradient - dots[None, :])
    block = (pair * S + first) * M
    at, inside = row * M + slot[None, :], (row < count) & (slot < M)[None, :]
    tl.store(attention_ptr + block + at, attention.to(attention_ptr.dtype.element_ty), mask=inside)
    tl.store(dlogits_ptr + block + at, gradient.to(dlogits_ptr.dtype.element_ty), mask=inside)
    c = heads * size
    dx = dx_ptr + (sample * S + first) * c + head * size
    store_by_channels(gradient, mk_ptr, dx, count, M, size, c, WIDE, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D)


@triton.jit
def external_attention_memory_kernel(
    x_ptr,  # [B, S, C], rows x_row apart
    dy_ptr,  # [B, S, C], rows dy_row apart
    attention_ptr,  # [pairs, S, M]
    dlogits_ptr,  # [pairs, S, M]
    parts_ptr,  # [parts, 2, M, size]: dmk, dmv
    heads,
    S,
    M,
    size,
    x_sample,
    x_row,
    dy_sample,
    dy_row,
    blocks,  # of BLOCK_S rows in all heads
    part_blocks,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(size, BLOCK_D)
    part = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    row, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)[:, None]
    dmk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dmv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_head = tl.cdiv(S, BLOCK_S)
    for block in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks)):
        pair = tl.cast(block // of_head, tl.int64)
        sample, head = pair // heads, pair % heads
        count = S - block % of_head * BLOCK_S
        first = tl.cast(block % of_head * BLOCK_S, tl.int64)
        # A and dL transposed, since they are the left operands.
        at = (pair * S + first) * M + row[None, :] * M + slot
        inside = (row < count)[None, :] & (slot < M)
        inside_x = (row < count)[:, None] & (channel < size)
        x = x_ptr + sample * x_sample + first * x_row + head * size + row[:, None] * x_row + channel
        right = operand(tl.load(x, mask=inside_x, other=0.0), x_ptr, WIDE)
        dmk = tl.dot(tl.load(dlogits_ptr + at, mask=inside, other=0.0), right, dmk, input_precision=PRECISION)
        dy = dy_ptr + sample * dy_sample + first * dy_row + head * size + row[:, None] * dy_row + channel
        right = operand(tl.load(dy, mask=inside_x, other=0.0), dy_ptr, WIDE)
        dmv = tl.dot(tl.load(attention_ptr + at, mask=inside, other=0.0), right, dmv, input_precision=PRECISION)
    to = parts_ptr + tl.cast(part, tl.int64) * 2 * M * size + slot * size + channel
    inside = (slot < M) & (channel < size)
    tl.store(to, dmk, mask=inside)
    tl.store(to + M * size, dmv, mask=inside)
