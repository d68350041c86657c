"""Convolution along the tokens, y[b, s, c] = Σ_k w[k]·x[b, s + k − offset, c], in fp32 for every dtype.

A program owns a tile of tokens × channels and walks the taps; neighbouring taps read x from the L1 cache. Softmax
weights are computed from the logits wherever they are needed, never stored. The gradient of shared weights is summed by
parts of the tokens, then over the parts, both in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonkernels._launch import launch, noted_launches, power_of_two, rows
from tritonkernels._token_conv_dynamic import dynamic, dynamic_dkernel
from tritonkernels._token_conv_tile import offset_of, shifted, softmax_parts, tile_of, tokens_of, weight_of

_PROGRAMS = 1024  # enough for any GPU


@triton.jit
def token_conv_shared_kernel(
    x_ptr,  # [B, S, C], strides batch_stride, token_stride, 1
    kernel_ptr,  # [C / channels, K]
    y_ptr,  # [B, S, C]
    S,
    C,
    K,
    channels,  # of a head
    offset,
    batch_stride,
    token_stride,
    SOFTMAX: tl.constexpr,
    FLIP: tl.constexpr,  # the taps the other way round: the gradient of x
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    batch, s = tokens_of(tl.program_id(0) // columns, S, BLOCK_S)
    logits = kernel_ptr + (c // channels) * K
    largest, total = softmax_parts(logits, K, inside, SOFTMAX)
    x = x_ptr + batch * batch_stride
    acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for k in range(K):
        tap = K - 1 - k if FLIP else k
        weight = weight_of(logits + tap, inside, largest, total, SOFTMAX)
        acc += weight[None, :] * shifted(x, s + k - offset, S, token_stride, c, inside)
    y = y_ptr + (batch * S + s)[:, None] * C + c[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(s < S)[:, None] & inside[None, :])


@triton.jit
def token_conv_shared_dkernel_kernel(
    dy_ptr,  # [B, S, C]
    x_ptr,  # [B, S, C]
    partial_ptr,  # [parts, C, K]: sums over a part of the tiles of tokens
    B,
    S,
    C,
    K,
    offset,
    tiles_of_part,
    dy_batch_stride,
    dy_token_stride,
    batch_stride,
    token_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    part = tl.program_id(0) // columns
    column = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        for i in range(tiles_of_part):
            batch, s = tokens_of(part * tiles_of_part + i, S, BLOCK_S)
            s = tl.where(batch < B, s, S)  # a tile past the last one has no token
            dy = shifted(dy_ptr + batch * dy_batch_stride, s, S, dy_token_stride, c, inside)
            for k in range(first, tl.minimum(first + BLOCK_K, K)):
                # A token past the end must not bring 0 · inf.
                token = tl.where(s < S, s + k - offset, -1)
                x = shifted(x_ptr + batch * batch_stride, token, S, token_stride, c, inside)
                acc += tl.where((column == k - first)[None, :], tl.sum(dy * x, 0)[:, None], 0.0)
        k = first + column
        to = partial_ptr + (part.to(tl.int64) * C + c)[:, None] * K + k[None, :]
        tl.store(to, acc, mask=inside[:, None] & (k < K)[None, :])


@triton.jit
def token_conv_shared_sum_kernel(
    partial_ptr,  # [parts, C, K]
    kernel_ptr,  # [H, K]
    dkernel_ptr,  # [H, K]
    rows,  # parts × channels of a head
    C,
    K,
    channels,
    SOFTMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_K)
    logits = kernel_ptr + head * K
    largest, total = softmax_parts(logits, K, head >= 0, SOFTMAX)
    dot = tl.full([], 0.0, tl.float32)
    # Of softmax weights the sum over all taps goes first.
    for sweep in tl.static_range(2 if SOFTMAX else 1):
        for first in range(0, K, BLOCK_K):
            k = first + column
            acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            for start in range(0, rows, BLOCK_R):
                r = start + row
                place = (r // channels).to(tl.int64) * C + head * channels + r % channels
                mask = (r < rows)[:, None] & (k < K)[None, :]
                acc += tl.load(partial_ptr + place[:, None] * K + k[None, :], mask=mask, other=0.0)
            gradient = tl.sum(acc, 0)
            if SOFTMAX:
                weight = weight_of(logits + k, k < K, largest, total, SOFTMAX)
                if sweep == 0:
                    dot += tl.sum(weight * gradient, 0)
                gradient = weight * (gradient - dot)
            if sweep == (1 if SOFTMAX else 0):
                to = dkernel_ptr + head * K + k
                tl.store(to, gradient.to(dkernel_ptr.dtype.element_ty), mask=k < K)


def token_conv(x: torch.Tensor, kernel: torch.Tensor, softmax: bool, causal: bool) -> torch.Tensor:
    """x [B, S, C] convolved with kernel [H, K] or [B, S, H, K], or the softmax of it over K."""
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if x.numel() > 0:
        kernel = kernel.contiguous()
        if kernel.ndim == 2:
            _shared(rows(x), kernel, y, softmax, causal, False)
        else:
            dynamic(rows(x), kernel, y, y, causal, False)  # no parts are read
    return y


def token_conv_bwd(
    grad_output: torch.Tensor, x: torch.Tensor, kernel: torch.Tensor, softmax: bool, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dkernel = torch.empty(kernel.shape, device=x.device, dtype=x.dtype)
    if x.numel() == 0:
        return dx, dkernel.zero_()
    dy, x, kernel = rows(grad_output), rows(x), kernel.contiguous()
    if kernel.ndim == 2:
        _shared_dkernel(dy, x, kernel, dkernel, softmax, causal)
        _shared(dy, kernel, dx, softmax, causal, True)
    else:
        parts = torch.empty(*kernel.shape[:3], 2, device=x.device, dtype=torch.float32)
        dynamic_dkernel(dy, x, kernel, dkernel, parts, causal)
        dynamic(dy, kernel, dx, parts, causal, True)
    return dx, dkernel


def _shared(x, kernel, y, softmax: bool, causal: bool, flip: bool) -> None:
    b, s, c = x.shape
    taps = kernel.shape[1]
    block_s, block_c = tile_of(s, c)
    offset = offset_of(taps, causal)
    launch(
        token_conv_shared_kernel,
        b * triton.cdiv(s, block_s) * triton.cdiv(c, block_c),
        {"num_warps": 4},
        x_ptr=x,
        kernel_ptr=kernel,
        y_ptr=y,
        S=s,
        C=c,
        K=taps,
        channels=c // kernel.shape[0],
        offset=taps - 1 - offset if flip else offset,
        batch_stride=x.stride(0),
        token_stride=x.stride(1),
        SOFTMAX=softmax,
        FLIP=flip,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )


def _shared_dkernel(dy, x, kernel, dkernel, softmax: bool, causal: bool) -> None:
    b, s, c = x.shape
    heads, taps = kernel.shape
    block_s, block_c = power_of_two(s, 1, 64), power_of_two(c, 1, 32)
    block_k = power_of_two(taps, 1, 32)
    tiles, columns = b * triton.cdiv(s, block_s), triton.cdiv(c, block_c)
    # By the shape alone, so that sums are reproducible, in at most 16 MiB.
    parts = min(tiles, triton.cdiv(_PROGRAMS, columns), max(1, (4 << 20) // (c * taps)))
    partial = torch.empty(parts, c, taps, device=x.device, dtype=torch.float32)
    launch(
        token_conv_shared_dkernel_kernel,
        parts * columns,
        {"num_warps": 4},
        dy_ptr=dy,
        x_ptr=x,
        partial_ptr=partial,
        B=b,
        S=s,
        C=c,
        K=taps,
        offset=offset_of(taps, causal),
        tiles_of_part=triton.cdiv(tiles, parts),
        dy_batch_stride=dy.stride(0),
        dy_token_stride=dy.stride(1),
        batch_stride=x.stride(0),
        token_stride=x.stride(1),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
    )
    total = parts * (c // heads)
    launch(
        token_conv_shared_sum_kernel,
        heads,
        {"num_warps": 4},
        partial_ptr=partial,
        kernel_ptr=kernel,
        dkernel_ptr=dkernel,
        rows=total,
        C=c,
        K=taps,
        channels=c // heads,
        SOFTMAX=softmax,
        BLOCK_R=power_of_two(total, 1, 128),
        BLOCK_K=block_k,
    )


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes, for tests/triton_compile.py; `main` are the measured ones."""
    cases = []
    for (b, s, c), shape, dtype, main in (
        ((64, 512, 512), (512, 7), torch.bfloat16, True),
        ((64, 512, 512), (64, 512, 8, 7), torch.bfloat16, True),
        ((8, 512, 512), (8, 31), torch.float16, False),
        ((3, 100, 33), (3, 100, 3, 40), torch.float32, False),
        ((3, 100, 33), (33, 1), torch.float32, False),
    ):
        x, kernel = (torch.empty(size, dtype=dtype, device="meta") for size in ((b, s, c), shape))
        label = f"B{b} S{s} C{c} kernel {list(shape)} {str(dtype).removeprefix('torch.')}"
        options = (shape[0] != c, False)
        cases += noted_launches(label, main, token_conv, x, kernel, *options)
        cases += noted_launches(label, main, token_conv_bwd, x, x, kernel, *options)
    return cases
