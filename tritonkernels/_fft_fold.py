"""The first of fourier mixing's three kernels: folds x along both axes in fp32 for the products of fft_mixing.py.

A program owns the rows i, S−i, S/2−i, S/2+i of a sample. It sends 16 mirrored elements to the 8 folded ones that the
cosines (even along both axes) and the sines (odd along both) need; the other combinations have no part in the result.
For products in fp16 it divides by a power of two just above the largest, so that no input is too large or too small.
"""

import triton
import triton.language as tl


@triton.jit
def _fold_rows(x, i, cols, inside, S, H, mirrored, paired, SPLIT_S: tl.constexpr):
    """One set of columns of the rows i, S−i, S/2−i, S/2+i, folded along S: cosines even, odd, sines even, odd."""
    # Flags are numbers up to here: the interpreter loses the type of a broadcast bool.
    mirrored = cols * 0 + mirrored == 1
    paired = inside & (cols * 0 + paired == 1)
    above = tl.load(x + i * H + cols, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(x + (S - i) * H + cols, mask=inside & mirrored, other=0.0).to(tl.float32)
    even = above + below
    odd = above - below
    if SPLIT_S:
        near, far = x + (S // 2 - i) * H, x + (S // 2 + i) * H
        above = tl.load(near + cols, mask=paired, other=0.0).to(tl.float32)
        below = tl.load(far + cols, mask=paired & mirrored, other=0.0).to(tl.float32)
        even2 = above + below
        odd2 = above - below
        return even + even2, even - even2, odd - odd2, odd + odd2
    return even, even, odd, odd


@triton.jit
def _fold_cosines(first, mirror, near, far, SPLIT_H: tl.constexpr):
    """Columns j, H−j, H/2−j, H/2+j folded along H for the even and the odd frequencies."""
    even, even2 = first + mirror, near + far
    if SPLIT_H:
        return even + even2, even - even2
    return even, even


@triton.jit
def _fold_sines(first, mirror, near, far, extra, j, SPLIT_H: tl.constexpr):
    odd, odd2 = first - mirror, near - far
    if SPLIT_H:
        return odd - odd2, tl.where(j > 0, odd + odd2, extra)
    return odd, odd


@triton.jit
def _store_folded(row, j, even, odd, factor, width, valid, SPLIT_H: tl.constexpr):
    mask = j < width * valid
    tl.store(row + j, (even * factor).to(row.dtype.element_ty), mask=mask)
    if SPLIT_H:
        tl.store(row + width + j, (odd * factor).to(row.dtype.element_ty), mask=mask)


@triton.jit
def alternating(index):
    return (1 - 2 * (index % 2)).to(tl.float32)


@triton.jit
def power_of_two(exponent):
    """2^(exponent − 127) from an IEEE exponent field; 0 below the normal range."""
    return (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nyquist(even, extra, j, slots):
    """Σ_h (−1)^h x[h] of folded x: the output H/2, which only the cosines have."""
    return tl.sum(tl.where(j < slots, even * alternating(j), 0.0), 0) + extra * alternating(slots)


@triton.jit
def fourier_mixing_fold_kernel(
    x_ptr,  # [samples, S, H]
    folded_ptr,  # [2, samples · row_count, stride]: parity, S-class · slots + slot (the extra row last)
    extra_ptr,  # [samples · row_count]: the folded extra column of the cosines, fp32
    nyquist_ptr,  # [samples · row_count]: output H/2 of the transform along H, fp32, not divided
    exponent_ptr,  # [samples, slot_count]: IEEE exponent of the largest folded value
    S,
    H,
    slots_s,
    slots_h,
    width,
    stride,
    row_count,
    slot_count,
    plane,
    SPLIT_S: tl.constexpr,
    SPLIT_H: tl.constexpr,
    EXTRA_H: tl.constexpr,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // slot_count).to(tl.int64)
    i = tl.program_id(0) % slot_count
    x = x_ptr + sample * S * H
    mirrored = ((i > 0) & (2 * i != S)).to(tl.int32)
    paired = (i < slots_s).to(tl.int32)
    j = tl.arange(0, BLOCK)
    inside = j < slots_h
    ce0, co0, se0, so0 = _fold_rows(x, i, j, inside, S, H, mirrored, paired, SPLIT_S)
    ce1, co1, se1, so1 = _fold_rows(x, i, H - j, inside & (j > 0), S, H, mirrored, paired, SPLIT_S)
    if SPLIT_H:  # H/2 as a product: then it is known to be aligned
        ce2, co2, se2, so2 = _fold_rows(x, i, 2 * slots_h - j, inside, S, H, mirrored, paired, SPLIT_S)
        # Column H/2 is its own mirror, and must not count twice; without a mask for it the loads stay wide.
        ce3, co3, se3, so3 = _fold_rows(x, i, 2 * slots_h + j, inside, S, H, mirrored, paired, SPLIT_S)
        ce3, co3 = tl.where(j > 0, ce3, 0.0), tl.where(j > 0, co3, 0.0)
    else:
        ce2, co2, se2, so2 = ce0, co0, se0, so0
        ce3, co3, se3, so3 = ce0, co0, se0, so0
    zero = 0.0 * tl.sum(tl.zeros([BLOCK], tl.float32), 0)
    ce_extra, co_extra, se_extra, so_extra = zero, zero, zero, zero
    if EXTRA_H:
        ce_extra, co_extra, se_extra, so_extra = _fold_rows(x, i, slots_h, i >= 0, S, H, mirrored, paired, SPLIT_S)
        if SPLIT_H:
            ce4, co4, se4, so4 = _fold_rows(x, i, H - slots_h, i >= 0, S, H, mirrored, paired, SPLIT_S)
            ce_extra, co_extra, se_extra, so_extra = ce_extra + ce4, co_extra + co4, se_extra - se4, so_extra - so4
    cee, ceo = _fold_cosines(ce0, ce1, ce2, ce3, SPLIT_H)
    see, seo = _fold_sines(se0, se1, se2, se3, se_extra, j, SPLIT_H)
    largest = tl.maximum(tl.maximum(tl.abs(cee), tl.abs(ceo)), tl.maximum(tl.abs(see), tl.abs(seo)))
    extra_size = tl.abs(ce_extra)
    if SPLIT_S:
        coe, coo = _fold_cosines(co0, co1, co2, co3, SPLIT_H)
        soe, soo = _fold_sines(so0, so1, so2, so3, so_extra, j, SPLIT_H)
        largest = tl.maximum(largest, tl.maximum(tl.maximum(tl.abs(coe), tl.abs(coo)), tl.abs(soe)))
        largest = tl.maximum(largest, tl.abs(soo))
        extra_size = tl.maximum(extra_size, tl.abs(co_extra))

    factor = zero + 1.0
    if DIVIDE:
        size = tl.maximum(tl.max(largest, 0), extra_size)
        exponent = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
        tl.store(exponent_ptr + sample * slot_count + i, tl.minimum(exponent, 252))
        factor = power_of_two(253 - tl.minimum(exponent, 252))
        # An infinity reaches every output of its sample; divided by the clamped power it might come out finite.
        factor = tl.where(exponent == 255, float("nan"), factor)

    first = sample * row_count
    row = tl.where(paired == 1, i, row_count - 1)
    _store_folded(folded_ptr + (first + row) * stride, j, cee, ceo, factor, width, 1, SPLIT_H)
    _store_folded(folded_ptr + plane + (first + row) * stride, j, see, seo, factor, width, paired, SPLIT_H)
    if EXTRA_H:
        tl.store(extra_ptr + first + row, ce_extra * factor)
        tl.store(nyquist_ptr + first + row, _nyquist(cee, ce_extra, j, slots_h))
    if SPLIT_S:
        row = slots_s + i
        _store_folded(folded_ptr + (first + row) * stride, j, coe, coo, factor, width, paired, SPLIT_H)
        if EXTRA_H:
            tl.store(extra_ptr + first + row, co_extra * factor, mask=paired == 1)
            tl.store(nyquist_ptr + first + row, _nyquist(coe, co_extra, j, slots_h), mask=paired == 1)
        row = slots_s + i % slots_s
        _store_folded(
            folded_ptr + plane + (first + row) * stride, j, soe, soo, factor, width, (i > 0).to(tl.int32), SPLIT_H
        )
