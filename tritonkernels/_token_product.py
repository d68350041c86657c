"""The product along the tokens that both ops stand on: out = residual + scale ⊙ gate ⊙ (act(W·norm(x) + bias) + added).

A program owns a tile [rows of W, channels of one head] of a sample, accumulates in fp32, normalises x's tile on its way
to the tensor cores and applies the rest before it stores. W is padded with zeros to whole blocks where its rows are not
aligned or do not fill them, so that no load of it needs a mask. Every size is served.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, power_of_two
from tritonkernels._token_norm import Normalised, load_normalised, load_rows

# The numbers of the op.
GELU: tl.constexpr = tl.constexpr(0)
GELU_TANH: tl.constexpr = tl.constexpr(1)
RELU: tl.constexpr = tl.constexpr(2)
SILU: tl.constexpr = tl.constexpr(3)


@triton.jit
def _power(x):
    return tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _normal_cdf(x, power, BF16: tl.constexpr):
    """Φ(x), given exp(−x²/2): by Abramowitz and Stegun 26.2.17, error 8e-8."""
    if BF16:
        # A polynomial on [−4, 4], where x·Φ(x) errs by 2e-4 and the ends are 0 and 1: neither exponential nor division,
        # which would take as long as the products.
        z = tl.minimum(tl.maximum(x, -4.0), 4.0)
        square = z * z
        p = 2.258812607e-08 * square - 1.588822628e-06
        p = p * square + 4.776379106e-05
        p = p * square - 8.121864952e-04
        p = p * square + 8.763686190e-03
        p = p * square - 6.455440322e-02
        p = p * square + 3.978702660e-01
        cdf = 0.5 + z * p
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = tail * t + 0.127414796
        tail = tail * t * power
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return cdf


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, BF16: tl.constexpr):
    """act(x); BF16: as exact as a result needs that is rounded to bfloat16."""
    if ACTIVATION == GELU:
        return x * _normal_cdf(x, _power(x), BF16)
    if ACTIVATION == GELU_TANH:
        return x * _logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    if ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, x)
    return x * _logistic(x)


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, BF16: tl.constexpr):
    """act(x) and act'(x)."""
    if ACTIVATION == GELU:
        power = _power(x)
        cdf = _normal_cdf(x, power, BF16)
        return x * cdf, cdf + 0.3989422804014327 * x * power
    if ACTIVATION == GELU_TANH:
        square = x * x
        s = _logistic(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    if ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    s = _logistic(x)
    return x * s, s + x * s * (1.0 - s)


@triton.jit
def token_pack_kernel(
    weight_ptr,
    out_ptr,  # [heads, out_rows, out_columns]
    rows,
    columns,
    head_stride,
    row_stride,
    column_stride,
    out_rows,
    out_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_c = tl.cdiv(out_columns, BLOCK_C)
    tiles_r = tl.cdiv(out_rows, BLOCK_R)
    column = (tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    row = (tl.program_id(0) // tiles_c % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    head = (tl.program_id(0) // (tiles_c * tiles_r)).to(tl.int64)
    at = weight_ptr + head * head_stride + row * row_stride + column * column_stride
    weight = tl.load(at, mask=(row < rows) & (column < columns), other=0.0)
    inside = (row < out_rows) & (column < out_columns)
    to = out_ptr + (head * out_rows + row) * out_columns + column
    tl.store(to, weight.to(out_ptr.dtype.element_ty), mask=inside)


def packed(weight: Tensor, row_multiple: int, column_multiple: int, dtype: torch.dtype) -> Tensor:
    """weight [heads, rows, columns] in dtype, padded with zeros; itself where nothing has to change."""
    heads, rows, columns = weight.shape
    out_rows, out_columns = _round_up(rows, row_multiple), _round_up(columns, column_multiple)
    aligned = weight.stride(2) == 1 or weight.stride(1) == 1
    if aligned and weight.dtype == dtype and (out_rows, out_columns) == (rows, columns):
        return weight
    out = weight.new_empty(heads, out_rows, out_columns, dtype=dtype)
    block_r, block_c = 32, 64
    launch(
        token_pack_kernel,
        heads * triton.cdiv(out_rows, block_r) * triton.cdiv(out_columns, block_c),
        {"num_warps": 4},
        weight_ptr=weight,
        out_ptr=out,
        rows=rows,
        columns=columns,
        head_stride=weight.stride(0),
        row_stride=weight.stride(1),
        column_stride=weight.stride(2),
        out_rows=out_rows,
        out_columns=out_columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@triton.jit
def store_output(
    out,  # [tokens, channels]
    added_ptr,
    gate_ptr,
    scale_ptr,
    residual_ptr,
    saved_ptr,
    out_ptr,
    b,
    token,
    channel,
    inside_tokens,
    inside_channels,
    S,
    C,
    added_batch,
    added_row,
    gate_batch,
    gate_row,
    residual_batch,
    residual_row,
):
    """residual + scale ⊙ gate ⊙ (out + added), the sum in brackets also to saved."""
    mask = inside_tokens[:, None] & inside_channels[None, :]
    to = b * S * C + token.to(tl.int64)[:, None] * C + channel[None, :]
    if added_ptr is not None:
        out += load_rows(added_ptr + b * added_batch, token, added_row, channel, inside_tokens, inside_channels)
    if saved_ptr is not None:
        tl.store(saved_ptr + to, out.to(saved_ptr.dtype.element_ty), mask=mask)
    if gate_ptr is not None:
        out *= load_rows(gate_ptr + b * gate_batch, token, gate_row, channel, inside_tokens, inside_channels)
    if scale_ptr is not None:
        out *= tl.load(scale_ptr + channel, mask=inside_channels, other=0.0)[None, :]
    if residual_ptr is not None:
        out += load_rows(
            residual_ptr + b * residual_batch, token, residual_row, channel, inside_tokens, inside_channels
        )
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_product_kernel(
    weight_ptr,  # [heads, rows, columns] in whole blocks
    x_ptr,  # [B, K, C]
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    bias_ptr,  # [heads, M] or None
    added_ptr,  # [B, M, C] or None, like gate, residual, saved
    gate_ptr,
    scale_ptr,  # [C] or None
    residual_ptr,
    saved_ptr,
    out_ptr,  # [B, M, C]
    M,
    K,
    C,
    head_channels,
    weight_head,
    weight_row,
    weight_column,
    x_batch,
    x_row,
    added_batch,
    added_row,
    gate_batch,
    gate_row,
    residual_batch,
    residual_row,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,  # None is none
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbours share the channels of a sample, which stay in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(head_channels, BLOCK_N)
    heads = C // head_channels
    top = tl.program_id(0) % tiles_m * BLOCK_M
    tile_n = tl.program_id(0) // tiles_m % tiles_n
    head = tl.program_id(0) // (tiles_m * tiles_n) % heads
    b = (tl.program_id(0) // (tiles_m * tiles_n * heads)).to(tl.int64)
    row = top + tl.arange(0, BLOCK_M)
    in_head = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_channels = in_head < head_channels
    channel = head * head_channels + in_head
    k = tl.arange(0, BLOCK_K)

    weight = weight_ptr + head.to(tl.int64) * weight_head
    weight += row.to(tl.int64)[:, None] * weight_row + k.to(tl.int64)[None, :] * weight_column
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        u = load_normalised(
            x_ptr,
            mean_ptr,
            rstd_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            b,
            start + k,
            channel,
            inside_channels,
            K,
            C,
            x_batch,
            x_row,
            NORM,
        )
        acc = tl.dot(tl.load(weight), u.to(weight_ptr.dtype.element_ty), acc, input_precision=PRECISION)
        weight += BLOCK_K * weight_column

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + head * M + row, mask=row < M, other=0.0)[:, None]
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION, out_ptr.dtype.element_ty == tl.bfloat16)
    store_output(
        acc,
        added_ptr,
        gate_ptr,
        scale_ptr,
        residual_ptr,
        saved_ptr,
        out_ptr,
        b,
        row,
        channel,
        row < M,
        inside_channels,
        M,
        C,
        added_batch,
        added_row,
        gate_batch,
        gate_row,
        residual_batch,
        residual_row,
    )


def product_blocks(rows: int, columns: int, channels: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K) for W [rows, columns] times [columns, channels] with operands of dtype.

    Half dtypes: all rows of a short sequence in one program, which then reads x once; two programs a multiprocessor.
    """
    if dtype == torch.float32:
        return power_of_two(rows, 16, 64), power_of_two(channels, 16, 64), power_of_two(columns, 16, 32)
    block_m = power_of_two(rows, 64, 256)
    if rows > 256 and _round_up(rows, 256) > _round_up(rows, 128):
        block_m = 128
    block_n = power_of_two(channels, 16, 64 if block_m == 256 and rows <= 256 else 128)
    return block_m, block_n, 32 if 0 < columns % 64 <= 32 else 64


def token_product(
    weight: Tensor,
    u: Normalised,
    out: Tensor,
    *,
    operand: torch.dtype,
    tf32: str,
    bias: Tensor | None = None,
    activation: int | None = None,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    saved: Tensor | None = None,
) -> Tensor:
    """Fills out [B, M, C] from weight [heads, M, K] and u [B, K, C].

    added, gate and residual are as `rows` gives them; operands go to the tensor cores in the dtype `operand`, float32
    ones by the method `tf32`.
    """
    heads, m, k = weight.shape
    batch, _, c = u.x.shape
    channels = c // heads
    block_m, block_n, block_k = product_blocks(m, k, channels, operand)
    weight = packed(weight, block_m, block_k, operand)
    strides = {
        f"{name}_{axis}": 0 if value is None else value.stride(dim)
        for name, value in (("added", added), ("gate", gate), ("residual", residual))
        for dim, axis in enumerate(("batch", "row"))
    }
    large = block_m * block_n >= (128 * 64 if operand == torch.float32 else 128 * 128)
    launch(
        token_product_kernel,
        batch * heads * triton.cdiv(m, block_m) * triton.cdiv(channels, block_n),
        {"num_warps": 8 if large else 4, "num_stages": 3},
        **u.for_rows(m).arguments,
        weight_ptr=weight,
        bias_ptr=bias,
        added_ptr=added,
        gate_ptr=gate,
        scale_ptr=scale,
        residual_ptr=residual,
        saved_ptr=saved,
        out_ptr=out,
        M=m,
        K=k,
        C=c,
        head_channels=channels,
        weight_head=weight.stride(0),
        weight_row=weight.stride(1),
        weight_column=weight.stride(2),
        **strides,
        ACTIVATION=activation,
        PRECISION=tf32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return out
