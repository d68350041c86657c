"""What the kernels of per-sample gradients share: how many positions count, sums beside the matrix units."""

import triton
import triton.language as tl


@triton.jit
def positions_of(lengths_ptr, b, T):
    """How many positions of sample b count."""
    count = tl.cast(T, tl.int32)
    if lengths_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), count)
    return count


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr):
    """acc + x·y, added in fp32 outside of the matrix units: these truncate, and a long sum would shrink.

    A limit on imprecise sums says nothing about these dtypes, but keeps the compiler from joining product and sum.
    """
    return acc + tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=16)


@triton.jit
def total(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def gram_norm(gram_ptr, b, pairs, FOR_GRADIENT: tl.constexpr):
    """(n², whether its digits are lost) from the parts [B, pairs, 4] of the Gram form.

    A term errs by a share of |a_t||a_u||g_t||g_u|, independent of the others: their sum by that share of
    Σ_t |a_t|²|g_t|², and what is kept by 8 such shares. Also lost is what is not finite on the way. FOR_GRADIENT: the
    weight's part has to keep its own digits, for the bias's has no gradient by a.
    """
    BLOCK: tl.constexpr = 32
    part = tl.arange(0, 4)
    sums = tl.zeros([BLOCK, 4], tl.float32)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)[:, None]
        sums += tl.load(gram_ptr + (b * pairs + pair) * 4 + part[None, :], mask=pair < pairs, other=0.0)
    sums = tl.sum(sums, 0)
    norm_sq, diagonal = tl.sum(tl.where(part % 2 == 0, sums, 0.0)), tl.sum(tl.where(part % 2 == 1, sums, 0.0))
    kept = (8 * norm_sq >= diagonal) & (norm_sq < float("inf"))
    if FOR_GRADIENT:
        weight, weight_diagonal = tl.sum(tl.where(part == 0, sums, 0.0)), tl.sum(tl.where(part == 1, sums, 0.0))
        kept &= 8 * weight >= weight_diagonal
    return norm_sq, kept == 0
