"""The normalisations before token mixing, of x [B, S, C]: "layer" along C, "affine" per channel, "token_layer" along S.

Statistics and gradients see x as `outer` rows of `inner` elements, whichever of the two axes is which in memory; a
program owns some rows of a sample. Sums are fp32; the variance comes from a second pass, centred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, power_of_two

# The numbers of the op.
NO_NORM: tl.constexpr = tl.constexpr(0)
LAYER: tl.constexpr = tl.constexpr(1)
AFFINE: tl.constexpr = tl.constexpr(2)
TOKEN_LAYER: tl.constexpr = tl.constexpr(3)
_MANY_ROWS = 256


@triton.jit
def load_rows(pointer, token, row_stride, channel, inside_tokens, inside_channels):
    """[tokens, channels], 0 outside."""
    mask = inside_tokens[:, None] & inside_channels[None, :]
    return tl.load(pointer + token.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_normalised(
    x_ptr,
    mean_ptr,  # [B, S] of "layer", [B, C] of "token_layer"
    rstd_ptr,
    weight_ptr,  # [C], of "token_layer" [S], or None; so the bias
    bias_ptr,
    b,
    token,
    channel,
    inside_channels,
    S,
    C,
    x_batch,
    x_row,
    NORM: tl.constexpr,
):
    """[tokens, channels] of norm(x) for one sample, finite outside x's tokens and channels."""
    inside_tokens = token < S
    x = load_rows(x_ptr + b * x_batch, token, x_row, channel, inside_tokens, inside_channels)
    if NORM != NO_NORM:
        x = x.to(tl.float32)
    if NORM == LAYER:
        mean = tl.load(mean_ptr + b * S + token, mask=inside_tokens, other=0.0)
        rstd = tl.load(rstd_ptr + b * S + token, mask=inside_tokens, other=0.0)
        x = (x - mean[:, None]) * rstd[:, None]
    if NORM == TOKEN_LAYER:
        mean = tl.load(mean_ptr + b * C + channel, mask=inside_channels, other=0.0)
        rstd = tl.load(rstd_ptr + b * C + channel, mask=inside_channels, other=0.0)
        x = (x - mean[None, :]) * rstd[None, :]
    if weight_ptr is not None:
        if NORM == TOKEN_LAYER:
            x *= tl.load(weight_ptr + token, mask=inside_tokens, other=0.0)[:, None]
        else:
            x *= tl.load(weight_ptr + channel, mask=inside_channels, other=0.0)[None, :]
    if bias_ptr is not None:
        if NORM == TOKEN_LAYER:
            x += tl.load(bias_ptr + token, mask=inside_tokens, other=0.0)[:, None]
        else:
            x += tl.load(bias_ptr + channel, mask=inside_channels, other=0.0)[None, :]
    return x


@triton.jit
def _load(pointer, o, o_stride, i, i_stride, mask):
    at = o.to(tl.int64)[:, None] * o_stride + i.to(tl.int64)[None, :] * i_stride
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def token_statistics_kernel(
    x_ptr,
    mean_ptr,  # [B, outer]
    rstd_ptr,
    outer,
    inner,
    x_batch,
    x_outer,
    x_inner,
    eps,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    tiles = tl.cdiv(outer, BLOCK_O)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    x = x_ptr + b * x_batch
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        total += _load(x, o, x_outer, i, x_inner, (o < outer)[:, None] & (i < inner)[None, :])
    mean = tl.sum(total, 1) / inner
    square = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        mask = (o < outer)[:, None] & (i < inner)[None, :]
        centred = tl.where(mask, _load(x, o, x_outer, i, x_inner, mask) - mean[:, None], 0.0)
        square += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(square, 1) / inner + eps)
    tl.store(mean_ptr + b * outer + o, mean, mask=o < outer)
    tl.store(rstd_ptr + b * outer + o, rstd, mask=o < outer)


@triton.jit
def token_norm_bwd_kernel(
    du_ptr,  # [B, S, C] contiguous: the gradient of norm(x)
    x_ptr,
    mean_ptr,  # [B, outer], like rstd; None of "affine"
    rstd_ptr,
    weight_ptr,  # [inner] or None
    dy_ptr,  # [B, S, C] to be added to dx, or None
    dx_ptr,  # [B, S, C] contiguous, or None
    dweight_ptr,  # [programs, inner] partial sums, or None
    dbias_ptr,
    outer,
    inner,
    du_outer,
    du_inner,
    x_batch,
    x_outer,
    x_inner,
    dy_batch,
    dy_outer,
    dy_inner,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    tiles = tl.cdiv(outer, BLOCK_O)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    du = du_ptr + b * outer * inner
    x = x_ptr + b * x_batch
    partial = tl.program_id(0).to(tl.int64) * inner

    if mean_ptr is not None:
        mean = tl.load(mean_ptr + b * outer + o, mask=o < outer, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + b * outer + o, mask=o < outer, other=0.0)[:, None]
    # The parts of the gradient of x̂ along 1 and along x̂, which the LayerNorms take out.
    if mean_ptr is not None and dx_ptr is not None:
        along_one = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        along_x = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for start in range(0, inner, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            mask = (o < outer)[:, None] & (i < inner)[None, :]
            g = _load(du, o, du_outer, i, du_inner, mask)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + i, mask=i < inner, other=0.0)[None, :]
            along_one += g
            along_x += g * (_load(x, o, x_outer, i, x_inner, mask) - mean) * rstd
        mean_one = (tl.sum(along_one, 1) / inner)[:, None]
        mean_x = (tl.sum(along_x, 1) / inner)[:, None]

    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        mask = (o < outer)[:, None] & (i < inner)[None, :]
        g = _load(du, o, du_outer, i, du_inner, mask)
        x_hat = _load(x, o, x_outer, i, x_inner, mask)
        if mean_ptr is not None:
            x_hat = (x_hat - mean) * rstd
        if dweight_ptr is not None:
            tl.store(dweight_ptr + partial + i, tl.sum(g * x_hat, 0), mask=i < inner)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + partial + i, tl.sum(g, 0), mask=i < inner)
        if dx_ptr is not None:
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + i, mask=i < inner, other=0.0)[None, :]
            if mean_ptr is not None:
                g = rstd * (g - mean_one - x_hat * mean_x)
            if dy_ptr is not None:
                g += _load(dy_ptr + b * dy_batch, o, dy_outer, i, dy_inner, mask)
            at = o.to(tl.int64)[:, None] * du_outer + i.to(tl.int64)[None, :] * du_inner
            tl.store(dx_ptr + b * outer * inner + at, g.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_norm_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,  # [B, S, C]
    S,
    C,
    x_batch,
    x_row,
    NORM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles_c = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.program_id(0) // tiles_c % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    b = (tl.program_id(0) // (tiles_c * tiles_s)).to(tl.int64)
    inside = channel < C
    u = load_normalised(
        x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, b, token, channel, inside, S, C, x_batch, x_row, NORM
    )
    to = out_ptr + b * S * C + token.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(to, u.to(out_ptr.dtype.element_ty), mask=(token < S)[:, None] & inside[None, :])


@dataclass(frozen=True)
class Normalised:
    """x [B, S, C], as `rows` gives it, and the norm that kernels apply as they load it."""

    x: Tensor
    norm: int = NO_NORM.value
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None  # [B, S] of "layer", [B, C] of "token_layer"
    rstd: Tensor | None = None

    @property
    def arguments(self) -> dict[str, object]:
        """What `load_normalised` takes."""
        return {
            "x_ptr": self.x,
            "mean_ptr": self.mean,
            "rstd_ptr": self.rstd,
            "norm_weight_ptr": self.weight,
            "norm_bias_ptr": self.bias,
            "x_batch": self.x.stride(0),
            "x_row": self.x.stride(1),
            "NORM": self.norm,
        }

    def for_rows(self, rows: int) -> Normalised:
        """For a product with a weight of so many rows: with many, each of whose tiles loads x again, applied once."""
        if self.norm == NO_NORM.value or rows <= _MANY_ROWS:
            return self
        batch, s, c = self.x.shape
        out = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        block_s, block_c = power_of_two(s, 16, 32), power_of_two(c, 16, 128)
        launch(
            token_norm_kernel,
            batch * triton.cdiv(s, block_s) * triton.cdiv(c, block_c),
            {"num_warps": 4},
            **self.arguments,
            out_ptr=out,
            S=s,
            C=c,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
        return Normalised(out)


def normalised(x: Tensor, norm: int, eps: float, weight: Tensor | None, bias: Tensor | None) -> Normalised:
    if norm not in (LAYER.value, TOKEN_LAYER.value):
        return Normalised(x, norm, weight, bias)
    outer, inner, x_outer, x_inner = _view(norm, x)
    block_o, block_i = _blocks(norm, outer, inner)
    mean, rstd = x.new_empty(2, x.shape[0], outer, dtype=torch.float32)
    launch(
        token_statistics_kernel,
        x.shape[0] * triton.cdiv(outer, block_o),
        {"num_warps": 4},
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        outer=outer,
        inner=inner,
        x_batch=x.stride(0),
        x_outer=x_outer,
        x_inner=x_inner,
        eps=eps,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
    )
    return Normalised(x, norm, weight, bias, mean, rstd)


def norm_bwd(
    u: Normalised, du: Tensor, dy: Tensor | None, input_grad: bool, parameter_grads: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx + dy, dweight, dbias) from du [B, S, C], None where there is none or it is not asked for."""
    x = u.x
    outer, inner, x_outer, x_inner = _view(u.norm, x)
    _, _, du_outer, du_inner = _view(u.norm, du)
    block_o, block_i = _blocks(u.norm, outer, inner)
    programs = x.shape[0] * triton.cdiv(outer, block_o)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if input_grad else None
    dweight, dbias = (
        x.new_empty(programs, inner, dtype=torch.float32) if vector is not None and parameter_grads else None
        for vector in (u.weight, u.bias)
    )
    dy_strides = (dy.stride(0), *_view(u.norm, dy)[2:]) if dy is not None else (0, 0, 0)
    if any(result is not None for result in (dx, dweight, dbias)):
        launch(
            token_norm_bwd_kernel,
            programs,
            {"num_warps": 4},
            du_ptr=du,
            x_ptr=x,
            mean_ptr=u.mean,
            rstd_ptr=u.rstd,
            weight_ptr=u.weight,
            dy_ptr=dy,
            dx_ptr=dx,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            outer=outer,
            inner=inner,
            du_outer=du_outer,
            du_inner=du_inner,
            x_batch=x.stride(0),
            x_outer=x_outer,
            x_inner=x_inner,
            dy_batch=dy_strides[0],
            dy_outer=dy_strides[1],
            dy_inner=dy_strides[2],
            BLOCK_O=block_o,
            BLOCK_I=block_i,
        )
    return dx, *(None if partial is None else partial.sum(0) for partial in (dweight, dbias))


def _view(norm: int, x: Tensor) -> tuple[int, int, int, int]:
    """(outer, inner) and their strides."""
    _, s, c = x.shape
    return (c, s, 1, x.stride(1)) if norm == TOKEN_LAYER.value else (s, c, x.stride(1), 1)


def _blocks(norm: int, outer: int, inner: int) -> tuple[int, int]:
    """(BLOCK_O, BLOCK_I), the wider one along the channels."""
    widest = (64, 32) if norm == TOKEN_LAYER.value else (8, 256)
    return power_of_two(outer, min(16, widest[0]), widest[0]), power_of_two(inner, 16, widest[1])
