"""The hidden layer of the token MLP and its gradient, for the backward: two products side by side.

A program owns a tile [hidden units, channels] of a sample and computes W1·norm(x) + b1 and W2ᵀ·dy there; from both
follow the hidden layer and the gradient before its activation, for the products after it. Sums are partial, per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, power_of_two
from tritonkernels._token_norm import Normalised, load_normalised, load_rows
from tritonkernels._token_product import activate_with_slope, packed


@triton.jit
def token_mixing_mlp_bwd_kernel(
    x_ptr,  # [B, S, C]
    dy_ptr,  # [B, S_OUT, C]
    w1_ptr,  # [D, S] in whole blocks
    w2_ptr,  # [D, S_OUT] in whole blocks: W2ᵀ
    b1_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    scale_ptr,
    hidden_ptr,  # [B, D, C]: scale ⊙ act(W1·norm(x) + b1), or None
    dhidden_ptr,  # [B, D, C]: the gradient of W1·norm(x) + b1
    db1_ptr,  # [B · tiles of channels, D]: its sum over the tile, or None
    dscale_ptr,  # [B · tiles of D, C]: Σ_d act(…) ⊙ (W2ᵀ·dy) of the tile, or None
    S,
    S_OUT,
    D,
    C,
    x_batch,
    x_row,
    dy_batch,
    dy_row,
    w1_row,
    w1_column,
    w2_row,
    w2_column,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_d = tl.program_id(0) % tiles_d
    tile_c = tl.program_id(0) // tiles_d % tiles_c
    b = (tl.program_id(0) // (tiles_d * tiles_c)).to(tl.int64)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_channels = channel < C
    k = tl.arange(0, BLOCK_K)

    w1 = w1_ptr + d.to(tl.int64)[:, None] * w1_row + k.to(tl.int64)[None, :] * w1_column
    hidden = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for start in range(0, S, BLOCK_K):
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
            S,
            C,
            x_batch,
            x_row,
            NORM,
        )
        hidden = tl.dot(tl.load(w1), u.to(w1_ptr.dtype.element_ty), hidden, input_precision=PRECISION)
        w1 += BLOCK_K * w1_column
    w2 = w2_ptr + d.to(tl.int64)[:, None] * w2_row + k.to(tl.int64)[None, :] * w2_column
    dhidden = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for start in range(0, S_OUT, BLOCK_K):
        token = start + k
        dy = load_rows(dy_ptr + b * dy_batch, token, dy_row, channel, token < S_OUT, inside_channels)
        dhidden = tl.dot(tl.load(w2), dy.to(w2_ptr.dtype.element_ty), dhidden, input_precision=PRECISION)
        w2 += BLOCK_K * w2_column

    if b1_ptr is not None:
        hidden += tl.load(b1_ptr + d, mask=d < D, other=0.0)[:, None]
    hidden, slope = activate_with_slope(hidden, ACTIVATION, dhidden_ptr.dtype.element_ty == tl.bfloat16)
    if dscale_ptr is not None:
        to = dscale_ptr + (b * tiles_d + tile_d) * C + channel
        tl.store(to, tl.sum(hidden * dhidden, 0), mask=inside_channels)
    dhidden *= slope
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=inside_channels, other=0.0)[None, :]
        hidden *= scale
        dhidden *= scale
    if db1_ptr is not None:
        tl.store(db1_ptr + (b * tiles_c + tile_c) * D + d, tl.sum(dhidden, 1), mask=d < D)
    to = b * D * C + d.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (d < D)[:, None] & inside_channels[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + to, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    tl.store(dhidden_ptr + to, dhidden.to(dhidden_ptr.dtype.element_ty), mask=mask)


def hidden_blocks(d: int, c: int, operand: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_D, BLOCK_C, BLOCK_K)."""
    if operand == torch.float32:
        return power_of_two(d, 16, 64), power_of_two(c, 16, 64), 32
    return power_of_two(d, 64, 128), power_of_two(c, 16, 128), 64


def hidden_bwd(
    u: Normalised,
    dy: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    scale: Tensor | None,
    activation: int,
    parameter_grads: bool,
    *,
    operand: torch.dtype,
    tf32: str,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(scale ⊙ hidden layer, gradient before its activation, db1, dscale without b2's part).

    All but the second are for the gradients of parameters.
    """
    batch, s, c = u.x.shape
    d, s_out = w1.shape[0], w2.shape[0]
    block_d, block_c, block_k = hidden_blocks(d, c, operand)
    w1 = packed(w1[None], block_d, block_k, operand)
    w2 = packed(w2.mT[None], block_d, block_k, operand)
    tiles_d, tiles_c = triton.cdiv(d, block_d), triton.cdiv(c, block_c)
    hidden = dy.new_empty(batch, d, c, dtype=operand) if parameter_grads else None
    dhidden = dy.new_empty(batch, d, c, dtype=operand)
    has_db1, has_dscale = (parameter_grads and vector is not None for vector in (b1, scale))
    db1 = dy.new_empty(batch * tiles_c, d, dtype=torch.float32) if has_db1 else None
    dscale = dy.new_empty(batch * tiles_d, c, dtype=torch.float32) if has_dscale else None
    launch(
        token_mixing_mlp_bwd_kernel,
        batch * tiles_d * tiles_c,
        {"num_warps": 8 if block_d * block_c >= 128 * 64 else 4, "num_stages": 3},
        **u.arguments,
        dy_ptr=dy,
        w1_ptr=w1,
        w2_ptr=w2,
        b1_ptr=b1,
        scale_ptr=scale,
        hidden_ptr=hidden,
        dhidden_ptr=dhidden,
        db1_ptr=db1,
        dscale_ptr=dscale,
        S=s,
        S_OUT=s_out,
        D=d,
        C=c,
        dy_batch=dy.stride(0),
        dy_row=dy.stride(1),
        w1_row=w1.stride(1),
        w1_column=w1.stride(2),
        w2_row=w2.stride(1),
        w2_column=w2.stride(2),
        ACTIVATION=activation,
        PRECISION=tf32,
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
    )
    sums = (None if partial is None else partial.sum(0) for partial in (db1, dscale))
    return hidden, dhidden, *sums
