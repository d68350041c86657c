"""The token MLP with its hidden layer on chip, for S, S_out ≤ 256: attention without softmax.

A program owns some channels of a sample. It keeps norm(x)ᵀ [channels, S] in shared memory and yᵀ [channels, S_out] in
fp32 accumulators, and walks the hidden units: act(norm(x)ᵀ·W1ᵀ + b1) goes from one product to the next in registers.
Tokens are the products' columns, which need no powers of two: up to three parts, 196 = 128 + 64 + 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, tf32, wide
from tritonkernels._token_norm import Normalised, load_normalised
from tritonkernels._token_product import activate, packed, store_output


@triton.jit
def _load_part(weight_ptr, row, row_stride, column):
    """[rows, columns] of a packed weight."""
    return tl.load(weight_ptr + row[:, None] * row_stride + column[None, :])


@triton.jit
def _input_part(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    b,
    token,
    channel,
    S,
    C,
    x_batch,
    x_row,
    NORM: tl.constexpr,
):
    """norm(x)ᵀ [channels, tokens]."""
    inside = channel < C
    u = load_normalised(
        x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, b, token, channel, inside, S, C, x_batch, x_row, NORM
    )
    return tl.trans(u.to(x_ptr.dtype.element_ty))


@triton.jit
def _output_part(
    y,  # [channels, tokens]
    b2_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    b,
    token,
    channel,
    S_OUT,
    C,
    residual_batch,
    residual_row,
):
    y = tl.trans(y)
    if b2_ptr is not None:
        y += tl.load(b2_ptr + token, mask=token < S_OUT, other=0.0)[:, None]
    store_output(
        y,
        None,
        None,
        scale_ptr,
        residual_ptr,
        None,
        out_ptr,
        b,
        token,
        channel,
        token < S_OUT,
        channel < C,
        S_OUT,
        C,
        0,
        0,
        0,
        0,
        residual_batch,
        residual_row,
    )


@triton.jit
def token_mixing_mlp_fwd_kernel(
    x_ptr,  # [B, S, C]
    w1_ptr,  # [D in whole blocks, IN_0 + IN_1 + IN_2]
    w2_ptr,  # [OUT_0 + OUT_1 + OUT_2, D in whole blocks]
    b1_ptr,
    b2_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    S,
    S_OUT,
    D,
    C,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    w1_row,
    w2_row,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_0: tl.constexpr,
    IN_1: tl.constexpr,
    IN_2: tl.constexpr,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BF16: tl.constexpr = w2_ptr.dtype.element_ty == tl.bfloat16
    tiles = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_0 = tl.arange(0, IN_0)
    out_0 = tl.arange(0, OUT_0)
    u_0 = _input_part(
        x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, b, in_0, channel, S, C, x_batch, x_row, NORM
    )
    y_0 = tl.zeros([BLOCK_C, OUT_0], tl.float32)
    if IN_1 > 0:
        in_1 = IN_0 + tl.arange(0, IN_1)
        u_1 = _input_part(
            x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, b, in_1, channel, S, C, x_batch, x_row, NORM
        )
    if IN_2 > 0:
        in_2 = IN_0 + IN_1 + tl.arange(0, IN_2)
        u_2 = _input_part(
            x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, b, in_2, channel, S, C, x_batch, x_row, NORM
        )
    if OUT_1 > 0:
        out_1 = OUT_0 + tl.arange(0, OUT_1)
        y_1 = tl.zeros([BLOCK_C, OUT_1], tl.float32)
    if OUT_2 > 0:
        out_2 = OUT_0 + OUT_1 + tl.arange(0, OUT_2)
        y_2 = tl.zeros([BLOCK_C, OUT_2], tl.float32)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        hidden = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        hidden = tl.dot(u_0, tl.trans(_load_part(w1_ptr, d, w1_row, in_0)), hidden, input_precision=PRECISION)
        if IN_1 > 0:
            hidden = tl.dot(u_1, tl.trans(_load_part(w1_ptr, d, w1_row, in_1)), hidden, input_precision=PRECISION)
        if IN_2 > 0:
            hidden = tl.dot(u_2, tl.trans(_load_part(w1_ptr, d, w1_row, in_2)), hidden, input_precision=PRECISION)
        if b1_ptr is not None:
            hidden += tl.load(b1_ptr + d, mask=d < D, other=0.0)[None, :]
        hidden = activate(hidden, ACTIVATION, BF16).to(w2_ptr.dtype.element_ty)  # act(0) = 0 beyond D
        y_0 = tl.dot(hidden, tl.trans(_load_part(w2_ptr, out_0, w2_row, d)), y_0, input_precision=PRECISION)
        if OUT_1 > 0:
            y_1 = tl.dot(hidden, tl.trans(_load_part(w2_ptr, out_1, w2_row, d)), y_1, input_precision=PRECISION)
        if OUT_2 > 0:
            y_2 = tl.dot(hidden, tl.trans(_load_part(w2_ptr, out_2, w2_row, d)), y_2, input_precision=PRECISION)

    _output_part(
        y_0, b2_ptr, scale_ptr, residual_ptr, out_ptr, b, out_0, channel, S_OUT, C, residual_batch, residual_row
    )
    if OUT_1 > 0:
        _output_part(
            y_1, b2_ptr, scale_ptr, residual_ptr, out_ptr, b, out_1, channel, S_OUT, C, residual_batch, residual_row
        )
    if OUT_2 > 0:
        _output_part(
            y_2, b2_ptr, scale_ptr, residual_ptr, out_ptr, b, out_2, channel, S_OUT, C, residual_batch, residual_row
        )


_LONGEST = 256
_PROGRAMS = 132  # one a multiprocessor of an H200


def stays_on_chip(s: int, s_out: int, dtype: torch.dtype) -> bool:
    """Whether `mlp_on_chip` serves the sizes; in float32 the products take more than a register file."""
    return max(s, s_out) <= _LONGEST and dtype != torch.float32


def parts(length: int) -> tuple[int, int, int]:
    """Up to three powers of two from 16 on, the rest 0, whose sum is the least that covers length."""
    sizes = [0, *(size for size in (16, 32, 64, 128, 256) if size < 2 * max(length, 16))]
    sums = ((a, b, c) for a in sizes for b in sizes for c in sizes if a >= b >= c and a + b + c >= length)
    return min(sums, key=lambda part: (sum(part), 3 - part.count(0)))


def on_chip_blocks(batch: int, c: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_D): the widest block of channels that leaves no multiprocessor without work."""
    block_c = 128 if dtype == torch.bfloat16 else 64
    while block_c > 32 and batch * triton.cdiv(c, block_c) < _PROGRAMS:
        block_c //= 2
    return block_c, 32


def mlp_on_chip(
    u: Normalised,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: int,
    out: Tensor,
) -> Tensor:
    """Fills out [B, S_out, C]; residual as `rows` gives it."""
    batch, s, c = u.x.shape
    dtype = u.x.dtype
    d, s_out = w1.shape[0], w2.shape[0]
    block_c, block_d = on_chip_blocks(batch, c, dtype)
    inputs, outputs = parts(s), parts(s_out)
    w1 = packed(w1[None], block_d, sum(inputs), dtype)
    w2 = packed(w2[None], sum(outputs), block_d, wide(dtype))
    launch(
        token_mixing_mlp_fwd_kernel,
        batch * triton.cdiv(c, block_c),
        {"num_warps": 8 if block_c == 128 else 4, "num_stages": 3},
        **u.arguments,
        w1_ptr=w1,
        w2_ptr=w2,
        b1_ptr=b1,
        b2_ptr=b2,
        scale_ptr=scale,
        residual_ptr=residual,
        out_ptr=out,
        S=s,
        S_OUT=s_out,
        D=d,
        C=c,
        residual_batch=0 if residual is None else residual.stride(0),
        residual_row=0 if residual is None else residual.stride(1),
        w1_row=w1.stride(1),
        w2_row=w2.stride(1),
        ACTIVATION=activation,
        PRECISION=tf32(dtype),
        **{f"IN_{index}": size for index, size in enumerate(inputs)},
        **{f"OUT_{index}": size for index, size in enumerate(outputs)},
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return out
