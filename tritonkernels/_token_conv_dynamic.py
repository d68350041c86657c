"""The dynamic convolution of token_conv.py: every token has weights of its own, softmax(kernel[b, s, h]).

A program owns some tokens of a head. The gradient of the kernel leaves what the softmax of a row needs, its largest
logit and its sum of exponentials, to the gradient of x, where a token meets the weights of all tokens that reach it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels._launch import launch, power_of_two
from tritonkernels._token_conv_tile import offset_of, shifted, softmax_parts, tile_of, tokens_of, weight_of


@triton.jit
def token_conv_dynamic_kernel(
    x_ptr,  # [B, S, C], strides batch_stride, token_stride, 1
    kernel_ptr,  # [B, S, H, K]
    y_ptr,  # [B, S, C]
    parts_ptr,  # [B, S, H, 2]: largest logit and sum of exponentials, for TRANSPOSED
    S,
    C,
    H,
    K,
    channels,
    offset,
    batch_stride,
    token_stride,
    TRANSPOSED: tl.constexpr,  # the gradient of x: the weights are those of the tokens that x reaches
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    head = tl.program_id(0) // tiles % H
    local = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    batch, s = tokens_of(tl.program_id(0) // (tiles * H), S, BLOCK_S)
    inside_c = local < channels
    c = head * channels + local
    x = x_ptr + batch * batch_stride
    row = (batch * S + s) * H + head
    if not TRANSPOSED:
        largest, total = softmax_parts(kernel_ptr + row * K, K, s < S, True)
    acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for k in range(K):
        if TRANSPOSED:
            token = s - k + offset
            inside = (token >= 0) & (token < S)
            row = (batch * S + token) * H + head
            largest = tl.load(parts_ptr + 2 * row, mask=inside, other=0.0)
            total = tl.load(parts_ptr + 2 * row + 1, mask=inside, other=1.0)
        else:
            token = s + k - offset
            inside = s < S
        weight = weight_of(kernel_ptr + row * K + k, inside, largest, total, True)
        acc += weight[:, None] * shifted(x, token, S, token_stride, c, inside_c)
    y = y_ptr + (batch * S + s)[:, None] * C + c[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(s < S)[:, None] & inside_c[None, :])


@triton.jit
def _tap_gradients(dy, x, s, k, S, head, channels, offset, dy_stride, stride, BLOCK_C: tl.constexpr):
    """Σ_c dy[s, c]·x[s + k − offset, c] over a head's channels."""
    total = tl.zeros(s.shape, tl.float32)
    token = tl.where(s < S, s + k - offset, -1)
    for start in range(0, channels, BLOCK_C):
        local = start + tl.arange(0, BLOCK_C)
        inside = local < channels
        c = head * channels + local
        total += tl.sum(shifted(dy, s, S, dy_stride, c, inside) * shifted(x, token, S, stride, c, inside), 1)
    return total


@triton.jit
def token_conv_dynamic_dkernel_kernel(
    dy_ptr,  # [B, S, C]
    x_ptr,  # [B, S, C]
    kernel_ptr,  # [B, S, H, K]
    dkernel_ptr,  # [B, S, H, K]
    parts_ptr,  # [B, S, H, 2], written
    S,
    H,
    K,
    channels,
    offset,
    dy_batch_stride,
    dy_token_stride,
    batch_stride,
    token_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(0) % H
    batch, s = tokens_of(tl.program_id(0) // H, S, BLOCK_S)
    dy = dy_ptr + batch * dy_batch_stride
    x = x_ptr + batch * batch_stride
    row = (batch * S + s) * H + head
    largest, total = softmax_parts(kernel_ptr + row * K, K, s < S, True)
    tl.store(parts_ptr + 2 * row, largest, mask=s < S)
    tl.store(parts_ptr + 2 * row + 1, total, mask=s < S)
    dot = tl.zeros([BLOCK_S], tl.float32)
    if K > BLOCK_K:  # Σ_k w·dw before the first gradient can be written
        for k in range(K):
            gradient = _tap_gradients(dy, x, s, k, S, head, channels, offset, dy_token_stride, token_stride, BLOCK_C)
            dot += gradient * weight_of(kernel_ptr + row * K + k, s < S, largest, total, True)
    column = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        acc = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        for k in range(first, tl.minimum(first + BLOCK_K, K)):
            gradient = _tap_gradients(dy, x, s, k, S, head, channels, offset, dy_token_stride, token_stride, BLOCK_C)
            acc += tl.where((column == k - first)[None, :], gradient[:, None], 0.0)
        place = row[:, None] * K + (first + column)[None, :]
        mask = (s < S)[:, None] & (first + column < K)[None, :]
        weight = weight_of(kernel_ptr + place, mask, largest[:, None], total[:, None], True)
        if K <= BLOCK_K:
            dot = tl.sum(weight * acc, 1)
        tl.store(dkernel_ptr + place, (weight * (acc - dot[:, None])).to(dkernel_ptr.dtype.element_ty), mask=mask)


def dynamic(x, kernel, y, parts, causal: bool, transposed: bool) -> None:
    b, s, c = x.shape
    heads, taps = kernel.shape[2:]
    block_s, block_c = tile_of(s, c // heads)
    launch(
        token_conv_dynamic_kernel,
        b * triton.cdiv(s, block_s) * heads * triton.cdiv(c // heads, block_c),
        {"num_warps": 4},
        x_ptr=x,
        kernel_ptr=kernel,
        y_ptr=y,
        parts_ptr=parts,
        S=s,
        C=c,
        H=heads,
        K=taps,
        channels=c // heads,
        offset=offset_of(taps, causal),
        batch_stride=x.stride(0),
        token_stride=x.stride(1),
        TRANSPOSED=transposed,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )


def dynamic_dkernel(dy, x, kernel, dkernel, parts, causal: bool) -> None:
    b, s, c = x.shape
    heads, taps = kernel.shape[2:]
    block_s, block_c = tile_of(s, c // heads)
    launch(
        token_conv_dynamic_dkernel_kernel,
        b * triton.cdiv(s, block_s) * heads,
        {"num_warps": 4},
        dy_ptr=dy,
        x_ptr=x,
        kernel_ptr=kernel,
        dkernel_ptr=dkernel,
        parts_ptr=parts,
        S=s,
        H=heads,
        K=taps,
        channels=c // heads,
        offset=offset_of(taps, causal),
        dy_batch_stride=dy.stride(0),
        dy_token_stride=dy.stride(1),
        batch_stride=x.stride(0),
        token_stride=x.stride(1),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        BLOCK_K=power_of_two(taps, 1, 32),
    )
