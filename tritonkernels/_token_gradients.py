"""Gradients that both ops share: through gate, scale and bias, and of a weight, dW = Σ_b dz_b·norm(x_b)ᵀ.

Every sum over samples or channel blocks is a partial sum per program in fp32, which PyTorch adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, power_of_two, wide
from tritonkernels._token_norm import NO_NORM, Normalised, load_normalised, load_rows, norm_bwd
from tritonkernels._token_product import token_product

_PROGRAMS = 264  # two a multiprocessor of an H200; a constant, so that sums do not depend on the device


@triton.jit
def token_factor_bwd_kernel(
    dy_ptr,  # [B, S, C]
    z_ptr,  # [B, S, C] what gate and scale multiplied, or None
    gate_ptr,  # [B, S, C] or None
    scale_ptr,  # [C] or None
    dz_ptr,  # [B, S, C] contiguous: scale ⊙ gate ⊙ dy, or None
    dgate_ptr,  # [B, S, C] contiguous: scale ⊙ z ⊙ dy, or None
    dscale_ptr,  # [B · tiles of S, C]: Σ_s gate ⊙ z ⊙ dy of the tile, or None
    dbias_ptr,  # [B, heads, tiles of channels, S]: Σ_c dz of the tile, or None
    S,
    C,
    head_channels,
    dy_batch,
    dy_row,
    z_batch,
    z_row,
    z_channel,
    gate_batch,
    gate_row,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles_c = tl.cdiv(head_channels, BLOCK_C)
    heads = C // head_channels
    tile_c = tl.program_id(0) % tiles_c
    head = tl.program_id(0) // tiles_c % heads
    row = tl.program_id(0) // (tiles_c * heads)
    b = (row // tiles_s).to(tl.int64)
    token = row % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    in_head = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = head * head_channels + in_head
    inside_tokens, inside_channels = token < S, in_head < head_channels
    mask = inside_tokens[:, None] & inside_channels[None, :]
    to = b * S * C + token.to(tl.int64)[:, None] * C + channel[None, :]

    dy = load_rows(dy_ptr + b * dy_batch, token, dy_row, channel, inside_tokens, inside_channels).to(tl.float32)
    dz = dy
    if scale_ptr is not None:
        dz *= tl.load(scale_ptr + channel, mask=inside_channels, other=0.0)[None, :]
    if z_ptr is not None:
        at = token.to(tl.int64)[:, None] * z_row + channel[None, :] * z_channel
        z = tl.load(z_ptr + b * z_batch + at, mask=mask, other=0.0).to(tl.float32)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + to, (dz * z).to(dgate_ptr.dtype.element_ty), mask=mask)
    if gate_ptr is not None:
        gate = load_rows(gate_ptr + b * gate_batch, token, gate_row, channel, inside_tokens, inside_channels)
        gate = gate.to(tl.float32)
        dz *= gate
        dy *= gate
    if dz_ptr is not None:
        tl.store(dz_ptr + to, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + row.to(tl.int64) * C + channel, tl.sum(dy * z, 0), mask=inside_channels)
    if dbias_ptr is not None:
        partial = ((b * heads + head) * tiles_c + tile_c) * S
        tl.store(dbias_ptr + partial + token, tl.sum(dz, 1), mask=inside_tokens)


def factor_bwd(
    dy: Tensor,
    *,
    heads: int = 1,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    dz: torch.dtype | None = None,
    dgate: bool = False,
    dscale: bool = False,
    dbias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dz, dgate, dscale [C], dbias [heads, S]), those that are asked for; dz says in which dtype.

    dy and gate as `rows` gives them, z of any strides.
    """
    batch, s, c = dy.shape
    channels = c // heads
    block_s, block_c = power_of_two(s, 16, 32), power_of_two(channels, 16, 128)
    tiles_s, tiles_c = triton.cdiv(s, block_s), triton.cdiv(channels, block_c)
    outputs = {
        "dz_ptr": dy.new_empty(batch, s, c, dtype=dz) if dz else None,
        "dgate_ptr": dy.new_empty(batch, s, c, dtype=gate.dtype) if dgate else None,
        "dscale_ptr": dy.new_empty(batch * tiles_s, c, dtype=torch.float32) if dscale else None,
        "dbias_ptr": dy.new_empty(batch, heads, tiles_c, s, dtype=torch.float32) if dbias else None,
    }
    if any(output is not None for output in outputs.values()):
        launch(
            token_factor_bwd_kernel,
            batch * tiles_s * heads * tiles_c,
            {"num_warps": 4},
            dy_ptr=dy,
            z_ptr=z if dgate or dscale else None,
            gate_ptr=gate,
            scale_ptr=scale,
            **outputs,
            S=s,
            C=c,
            head_channels=channels,
            dy_batch=dy.stride(0),
            dy_row=dy.stride(1),
            z_batch=z.stride(0) if z is not None else 0,
            z_row=z.stride(1) if z is not None else 0,
            z_channel=z.stride(2) if z is not None else 0,
            gate_batch=gate.stride(0) if gate is not None else 0,
            gate_row=gate.stride(1) if gate is not None else 0,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
    dz_out, dgate_out, scales, biases = outputs.values()
    return (
        dz_out,
        dgate_out,
        None if scales is None else scales.sum(0),
        None if biases is None else biases.sum((0, 2)),
    )


@triton.jit
def token_weight_grad_kernel(
    dz_ptr,  # [B, M, C]
    x_ptr,  # [B, N, C]
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    partial_ptr,  # [splits, heads, M, N]
    M,
    N,
    C,
    head_channels,
    batch,
    steps_per_split,
    dz_batch,
    dz_row,
    x_batch,
    x_row,
    OPERAND: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tiles of one split are neighbours: they read the same samples.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    heads = C // head_channels
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.program_id(0) // (tiles_m * tiles_n)
    head = slot % heads
    split = slot // heads
    # A step is BLOCK_K channels of the head in one sample.
    steps_per_sample = tl.cdiv(head_channels, BLOCK_K)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, batch * steps_per_sample)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first, last):
        b = (step // steps_per_sample).to(tl.int64)
        in_head = step % steps_per_sample * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_channels = in_head < head_channels
        channel = head * head_channels + in_head
        dz = load_rows(dz_ptr + b * dz_batch, m, dz_row, channel, m < M, inside_channels)
        u = load_normalised(
            x_ptr,
            mean_ptr,
            rstd_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            b,
            n,
            channel,
            inside_channels,
            N,
            C,
            x_batch,
            x_row,
            NORM,
        )
        acc = tl.dot(dz.to(OPERAND), tl.trans(u.to(OPERAND)), acc, input_precision=PRECISION)
    to = partial_ptr + (slot.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(to, acc, mask=(m < M)[:, None] & (n < N)[None, :])


_TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def gradient_blocks(rows: int, columns: int, channels: int, operand: torch.dtype, norm: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K) for dW [rows, columns], summed over the channels; a norm takes registers."""
    largest, deepest = (64, 32) if operand == torch.float32 else (128, 64)
    widest = largest if norm == NO_NORM.value else 64
    return power_of_two(rows, 16, largest), power_of_two(columns, 16, widest), power_of_two(channels, 16, deepest)


def weight_grad(dz: Tensor, u: Normalised, *, heads: int = 1, operand: torch.dtype, tf32: str) -> Tensor:
    """dW [heads, M, N] in fp32 from dz [B, M, C], as `rows` gives it, and u; operands as in `token_product`."""
    batch, m, c = dz.shape
    n = u.x.shape[1]
    channels = c // heads
    u = u.for_rows(m)
    block_m, block_n, block_k = gradient_blocks(m, n, channels, operand, u.norm)
    tiles = heads * triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    steps = batch * triton.cdiv(channels, block_k)
    steps_per_split = max(1, triton.cdiv(steps, max(1, _PROGRAMS // tiles)))
    splits = triton.cdiv(steps, steps_per_split)
    partial = dz.new_empty(splits, heads, m, n, dtype=torch.float32)
    launch(
        token_weight_grad_kernel,
        splits * tiles,
        {"num_warps": 8 if block_m * block_n >= 128 * 64 else 4, "num_stages": 3},
        **u.arguments,
        dz_ptr=dz,
        partial_ptr=partial,
        M=m,
        N=n,
        C=c,
        head_channels=channels,
        batch=batch,
        steps_per_split=steps_per_split,
        dz_batch=dz.stride(0),
        dz_row=dz.stride(1),
        OPERAND=_TL_DTYPES[operand],
        PRECISION=tf32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return partial.sum(0)


def input_gradient(
    weight: Tensor,
    dz: Tensor,
    u: Normalised,
    dy: Tensor | None,
    input_grad: bool,
    parameter_grads: bool,
    **operands: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx + dy, dnorm_weight, dnorm_bias) from dz [B, M, C], the gradient of weight·u; None as `norm_bwd`.

    weight [heads, M, S]; operands as `token_product` takes them.
    """
    x = u.x
    if not input_grad and not (parameter_grads and (u.weight is not None or u.bias is not None)):
        return None, None, None
    if u.norm == NO_NORM.value:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        return token_product(weight.mT, Normalised(dz), dx, residual=dy, **operands), None, None
    du = token_product(weight.mT, Normalised(dz), x.new_empty(x.shape, dtype=wide(x.dtype)), **operands)
    return norm_bwd(u, du, dy if input_grad else None, input_grad, parameter_grads)
