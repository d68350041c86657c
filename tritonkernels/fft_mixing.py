"""Fourier mixing Y = scale·Re(F_S X F_H) by products with folded DFT tables (see _dft.py), in three kernels.

_fft_fold.py folds both axes; `columns` and `rows` multiply along H, then along S, accumulating in fp32. A program owns
a tile of outputs, in `rows` with its mirrors Y[s, h] = Y[−s, −h] = A − B, Y[−s, h] = Y[s, −h] = A + B.
Half dtypes multiply in fp16, where folded rows are at most 1 in size and so every sum fits, whatever the input's size;
fp32 multiplies in 3×TF32. Limits: S, H ≤ 1024.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tritonkernels._dft import OUT_PAD, SLOT_PAD, Axis, dft_tables, round_up
from tritonkernels._fft_fold import alternating, fourier_mixing_fold_kernel, power_of_two

_MAX_LENGTH = 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a group of samples, for both intermediates: an H200's L2 (60 MB) keeps them, as input and output stream past them.
_WORKSPACE_BYTES = 52 << 20


@triton.jit
def _largest_exponent(exponent_ptr, sample, slot_count, BLOCK: tl.constexpr):
    """Of each sample in `sample` [N], or of one sample."""
    slots = tl.arange(0, BLOCK)
    found = sample.to(tl.int32) * 0
    for start in range(0, slot_count, BLOCK):
        slot = start + slots
        if len(sample.shape) == 0:
            field = tl.load(exponent_ptr + sample * slot_count + slot, mask=slot < slot_count, other=0)
            found = tl.maximum(found, tl.max(field, 0))
        else:
            rows = exponent_ptr + sample[:, None] * slot_count
            field = tl.load(rows + slot[None, :], mask=(slot < slot_count)[None, :], other=0)
            found = tl.maximum(found, tl.max(field, 1))
    return found


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def fourier_mixing_columns_kernel(
    folded_ptr,  # [2, rows, stride]
    extra_ptr,  # [rows]
    exponent_ptr,  # [samples, slot_count]
    table_ptr,  # [2 · H-classes, padded slots, padded outputs]
    out_ptr,  # [2, rows, stride]: the frequencies of H in their order, all rows of a sample on one scale
    rows,
    slots_s,
    width,
    stride,
    row_count,
    slot_count,
    plane,
    table_slots,
    table_outs,
    SPLIT_S: tl.constexpr,
    SPLIT_H: tl.constexpr,
    EXTRA_H: tl.constexpr,
    DIVIDE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CLASSES: tl.constexpr = 2 if SPLIT_H else 1
    tiles_n = tl.cdiv(stride, BLOCK_N * CLASSES)
    tile_n = tl.program_id(0) % tiles_n
    parity = tl.program_id(0) // tiles_n % 2
    # Offsets inside a tile are 32-bit: they take half the registers. Rows past the end repeat the last one.
    top = tl.program_id(0) // (2 * tiles_n) * BLOCK_M
    local = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - top)
    row = top + local
    corner = parity * plane + top.to(tl.int64) * stride
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Before the products, whose accumulators leave few registers.
    if EXTRA_H:
        extra = tl.load(extra_ptr + row, mask=row * 0 + parity == 0, other=0.0)
    if DIVIDE:
        sample, of_sample = row // row_count, row % row_count
        slot = of_sample
        if SPLIT_S:
            slot = tl.where(of_sample == 2 * slots_s, slots_s, of_sample % slots_s)
            # Slot 0 of the odd sines was written with row S/4 (see _dft.py).
            slot = tl.where((of_sample == slots_s) & (parity == 1), slots_s, slot)
        largest = _largest_exponent(exponent_ptr, sample, slot_count, 32)
        factor = power_of_two(127 + tl.load(exponent_ptr + sample * slot_count + slot) - largest)

    left = folded_ptr + corner + (local[:, None] * stride + k[None, :])  # [M, K]
    right = table_ptr + parity * CLASSES * table_slots * table_outs + k[:, None] * table_outs + col[None, :]  # [K, N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        mask = (start + k < width)[None, :]
        acc = tl.dot(_load(left, mask, EVEN), tl.load(right), acc, input_precision=PRECISION)
        if SPLIT_H:
            a = _load(left + width, mask, EVEN)
            acc_odd = tl.dot(a, tl.load(right + table_slots * table_outs), acc_odd, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * table_outs

    if EXTRA_H:
        acc += extra[:, None] * alternating(col)[None, :]
    if DIVIDE:
        acc *= factor[:, None]
        acc_odd *= factor[:, None]
    out = tl.interleave(acc, acc_odd) if SPLIT_H else acc  # [M, N · classes]
    col = tile_n * BLOCK_N * CLASSES + tl.arange(0, BLOCK_N * CLASSES)
    to = out_ptr + corner + (local[:, None] * stride + col[None, :])
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=(col < stride)[None, :])


@triton.jit
def _store(y, s, h, values, H, inside_s, inside_h):
    mask = inside_s[:, None] & inside_h[None, :]
    tl.store(y + (s[:, None] * H + h[None, :]), values, mask=mask)


@triton.jit
def fourier_mixing_rows_kernel(
    mixed_ptr,  # [2, rows, stride]
    nyquist_ptr,  # [rows]
    exponent_ptr,  # [samples, slot_count]
    table_ptr,  # [2 · S-classes, padded outputs, padded slots]
    y_ptr,  # [samples, S, H]
    scale,
    S,
    H,
    slots_s,
    outs_h,
    stride,
    row_count,
    slot_count,
    plane,
    table_slots,
    table_outs,
    SPLIT_S: tl.constexpr,
    EXTRA_S: tl.constexpr,
    EXTRA_H: tl.constexpr,
    DIVIDE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CLASSES: tl.constexpr = 2 if SPLIT_S else 1
    tiles_n = tl.cdiv(outs_h, BLOCK_N)
    tiles_m = tl.cdiv(slots_s, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    residue = tl.program_id(0) // (tiles_n * tiles_m) % CLASSES
    sample = (tl.program_id(0) // (tiles_n * tiles_m * CLASSES)).to(tl.int64)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_stride = (h < stride)[None, :]
    first = sample * row_count + residue * slots_s

    cosines = table_ptr + residue * table_slots * table_outs + i[:, None] * table_slots  # [M, 1]
    mixed = mixed_ptr + first * stride + h[None, :]  # [1, N]

    power = tl.full([], 1.0, tl.float32)
    if DIVIDE:
        power = power_of_two(1 + _largest_exponent(exponent_ptr, sample, slot_count, 32))
    extra_row = sample * row_count + row_count - 1
    in_even = residue == 0
    if EXTRA_S:
        extra = tl.load(mixed_ptr + extra_row * stride + h, mask=h + stride * residue < stride, other=0.0).to(
            tl.float32
        )
    y = y_ptr + sample * S * H
    freq = CLASSES * i + residue
    inside_s, inside_h = i < slots_s, h < outs_h
    mirror_s, mirror_h = inside_s & (freq > 0), inside_h & (h > 0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    # Output H/2: a matrix-vector product. Output S/2: an alternating sum of rows. Neither fills a tile.
    EDGE: tl.constexpr = BLOCK_K // 2 if BLOCK_K > 32 else BLOCK_K  # larger ones would set the kernel's registers
    e = tl.arange(0, EDGE)
    if EXTRA_H and tile_n == 0:
        column = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, slots_s, EDGE):
            vector = tl.load(nyquist_ptr + first + start + e, mask=start + e < slots_s, other=0.0)
            column += tl.sum(tl.load(cosines + (start + e)[None, :]).to(tl.float32) * vector[None, :], 1)
        if EXTRA_S:
            column += alternating(i) * tl.load(nyquist_ptr + extra_row, mask=in_even, other=0.0)
        column = (column * scale).to(dtype)
        tl.store(y + freq * H + H // 2, column, mask=inside_s)
        tl.store(y + (S - freq) * H + H // 2, column, mask=mirror_s)
    if EXTRA_S and in_even and tile_m == 0:
        line = alternating(slots_s) * extra
        corner = tl.zeros([EDGE], tl.float32)
        for start in range(0, slots_s, EDGE):
            inside_k = start + e < slots_s
            sign = tl.where(inside_k, alternating(start + e), 0.0)
            block = tl.load(mixed + (start + e)[:, None] * stride, mask=inside_k[:, None] & in_stride, other=0.0)
            line += tl.sum(block.to(tl.float32) * sign[:, None], 0)
            if EXTRA_H:
                corner += tl.load(nyquist_ptr + first + start + e, mask=inside_k, other=0.0) * sign
        line = (line * scale * power).to(dtype)
        tl.store(y + (S // 2) * H + h, line, mask=inside_h)
        tl.store(y + (S // 2) * H + H - h, line, mask=mirror_h)
        if EXTRA_H and tile_n == 0:
            last = tl.sum(corner, 0) + alternating(slots_s) * tl.load(nyquist_ptr + extra_row)
            tl.store(y + (S // 2) * H + H // 2, (last * scale).to(dtype))

    left, right = cosines + k[None, :], mixed + k[:, None] * stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_sin = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, slots_s, BLOCK_K):
        mask = (start + k < slots_s)[:, None] & in_stride
        acc = tl.dot(tl.load(left), _load(right, mask, EVEN), acc, input_precision=PRECISION)
        sines = tl.load(left + CLASSES * table_slots * table_outs)
        acc_sin = tl.dot(sines, _load(right + plane, mask, EVEN), acc_sin, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * stride

    if EXTRA_S:
        acc += alternating(i)[:, None] * extra[None, :]
    acc = acc * scale * power
    acc_sin = acc_sin * scale * power
    values = (acc - acc_sin).to(dtype)
    _store(y, freq, h, values, H, inside_s, inside_h)
    _store(y, S - freq, H - h, values, H, mirror_s, mirror_h)
    values = (acc + acc_sin).to(dtype)
    _store(y, S - freq, h, values, H, mirror_s, inside_h)
    _store(y, freq, H - h, values, H, inside_s, mirror_h)


@dataclass(frozen=True)
class _Launch:
    """One kernel's launch: the grid, the integers, the compile-time constants."""

    kernel: object
    programs: int
    integers: dict[str, int]
    constants: dict[str, object]
    options: dict[str, int]

    def __call__(self, *pointers, **scalars):
        self.kernel[(self.programs,)](*pointers, **scalars, **self.integers, **self.constants, **self.options)


def _block(length: int, largest: int) -> int:
    """The tile for `length` rows or columns: little padding, unless that takes many small tiles."""
    cost = {64: 1.05, 32: 1.3, 16: 1.7}
    tiles = [tile for tile in (128, 64, 32, 16) if tile <= largest]
    return min(tiles, key=lambda tile: round_up(length, tile) * cost.get(tile, 1.0))


@functools.lru_cache(maxsize=256)
def _plan(samples: int, s: int, h: int, half: bool, target: int) -> tuple[int, int, _Launch, _Launch, _Launch]:
    """(stride, rows, fold, columns, mix) of a group of samples: a pure function of its arguments."""
    rows, cols = Axis(s), Axis(h)
    width = round_up(cols.slots, 16)
    outs = cols.classes * cols.slots
    stride = max(cols.classes * width, round_up(outs, 16))
    row_count, slot_count = rows.entries, rows.slots + rows.extra
    total = samples * row_count
    shared = {"stride": stride, "row_count": row_count, "slot_count": slot_count, "plane": total * stride}
    flags = {"EXTRA_H": cols.extra, "DIVIDE": half}
    precision = {"PRECISION": "tf32" if half else "tf32x3"}  # of no account to fp16
    deepest, widest = (64, 128) if half else (32, 64)

    lanes = max(triton.next_power_of_2(width), 32)
    fold = _Launch(
        fourier_mixing_fold_kernel,
        samples * slot_count,
        {"S": s, "H": h, "slots_s": rows.slots, "slots_h": cols.slots, "width": width, **shared},
        {"SPLIT_S": rows.split, "SPLIT_H": cols.split, **flags, "BLOCK": lanes},
        {"num_warps": max(1, lanes // 256)},  # eight columns a thread: its fixed work is large,
    )
    m, n = _block(total, widest), _block(cols.slots, widest // cols.classes)
    k = min(deepest, max(16, triton.next_power_of_2(cols.slots)))
    columns = _Launch(
        fourier_mixing_columns_kernel,
        triton.cdiv(total, m) * 2 * triton.cdiv(stride, n * cols.classes),
        {"rows": total, "slots_s": rows.slots, "width": width, **shared, **_table_sizes(cols)},
        {"SPLIT_S": rows.split, "SPLIT_H": cols.split, **flags, "EVEN": width % k == 0, **precision}
        | {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k},
        _options(m, n, half, target),
    )
    m, n = _block(rows.slots, widest), _block(outs, 64)
    k = min(deepest, max(16, triton.next_power_of_2(rows.slots)))
    mix = _Launch(
        fourier_mixing_rows_kernel,
        samples * rows.classes * triton.cdiv(rows.slots, m) * triton.cdiv(outs, n),
        {"S": s, "H": h, "slots_s": rows.slots, "outs_h": outs, **shared, **_table_sizes(rows)},
        {"SPLIT_S": rows.split, "EXTRA_S": rows.extra, **flags}
        | {"EVEN": rows.slots % k == 0 and stride % n == 0, **precision, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k},
        _options(m, n, half, target),
    )
    return stride, total, fold, columns, mix


def _options(m: int, n: int, half: bool, target: int) -> dict[str, int]:
    options = {"num_warps": 8 if m * n >= (128 if half else 64) * 64 else 4, "num_stages": 2}
    # Two programs a multiprocessor, so that one stores while the other multiplies; elsewhere the limit would spill.
    if half and target == 90 and options["num_warps"] == 8:
        options["maxnreg"] = 128
    return options


def _table_sizes(axis: Axis) -> dict[str, int]:
    return {"table_slots": round_up(axis.slots, SLOT_PAD), "table_outs": round_up(axis.slots, OUT_PAD)}


def _group(batch: int, s: int, h: int, half: bool) -> int:
    """Samples at a time: as many as leave both intermediates in L2, in groups of about the same size."""
    largest = max(1, _WORKSPACE_BYTES // _workspace_bytes(s, h, half))
    return triton.cdiv(batch, triton.cdiv(batch, largest))


def _workspace_bytes(s: int, h: int, half: bool) -> int:
    stride, rows, *_ = _plan(1, s, h, half, 90)
    return 2 * 2 * rows * stride * (2 if half else 4)


def supports(s: int, h: int, dtype: torch.dtype) -> bool:
    """Whether `fourier_mixing_dense` serves [B, s, h] of this dtype."""
    return 1 <= s <= _MAX_LENGTH and 1 <= h <= _MAX_LENGTH and dtype in _DTYPES


def fourier_mixing_dense(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale·Re(F_S X F_H) of a contiguous x [B, S, H] for which `supports` holds."""
    batch, s, h = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    half = x.dtype != torch.float32
    group = _group(batch, s, h, half)
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    target = 10 * major + minor
    stride, rows, *_ = _plan(group, s, h, half, target)
    dtype = torch.float16 if half else torch.float32
    folded, mixed = torch.empty(2, 2, rows, stride, device=x.device, dtype=dtype)
    extra, nyquist = torch.empty(2, rows, device=x.device, dtype=torch.float32)
    exponents = torch.empty(rows if half else 1, device=x.device, dtype=torch.int32)
    table_h = dft_tables(h, False, x.device, dtype)
    table_s = dft_tables(s, True, x.device, dtype)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for start in range(0, batch, group):
            samples = min(group, batch - start)
            *_, fold, columns, mix = _plan(samples, s, h, half, target)
            fold(x[start:], folded, extra, nyquist, exponents)
            columns(folded, extra, exponents, table_h, mixed)
            mix(mixed, nyquist, exponents, table_s, y[start:], scale=scale)
    return y


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes on sm_<target>, for tests/triton_compile.py; `main` is the measured one."""
    cases = []
    for batch, s, h, dtype in (
        (64, 512, 768, torch.bfloat16),
        (64, 512, 768, torch.float32),
        (8, 1024, 1024, torch.float16),
        (8, 198, 98, torch.float16),
        (3, 127, 65, torch.float32),
    ):
        half = dtype != torch.float32
        ours = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
        types = {"x_ptr": ours, "y_ptr": ours, "exponent_ptr": "*i32", "extra_ptr": "*fp32", "nyquist_ptr": "*fp32"}
        types |= dict.fromkeys(("folded_ptr", "mixed_ptr", "out_ptr", "table_ptr"), "*fp16" if half else "*fp32")
        for launch in _plan(_group(batch, s, h, half), s, h, half, target)[2:]:
            cases.append(
                {
                    "kernel": launch.kernel,
                    "types": {"scale": "fp32", **types},  # of what is no integer
                    "integers": launch.integers,
                    "constants": launch.constants,
                    "options": launch.options,
                    "label": f"B{batch} S{s} H{h} {ours[1:]}",
                    "main": (s, h, dtype) == (512, 768, torch.bfloat16),
                }
            )
    return cases
