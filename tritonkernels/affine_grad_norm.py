"""Every sample's gradients of a normalisation's scale and shift: Σ g·(x − mean)·rstd and Σ g over its positions.

A program owns some channels and a run of a sample's positions; runs are summed in their order. Positions and channels
have any strides: those that lie side by side in memory are read so. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, noted_launches, power_of_two

_PROGRAMS = 1024  # that fill a GPU


@triton.jit
def _statistic(row, p, c, inside_p, inside_c, position, channel, BY_POSITION: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """[positions, channels], with size 1 where a statistic is the same along them."""
    if BY_POSITION and BY_CHANNEL:
        at = p.to(tl.int64)[:, None] * position + c.to(tl.int64)[None, :] * channel
        value = tl.load(row + at, mask=inside_p[:, None] & inside_c[None, :], other=0.0)
    elif BY_POSITION:
        value = tl.load(row + p.to(tl.int64) * position, mask=inside_p, other=0.0)[:, None]
    elif BY_CHANNEL:
        value = tl.load(row + c.to(tl.int64) * channel, mask=inside_c, other=0.0)[None, :]
    else:
        value = tl.load(row)
    return value


@triton.jit
def affine_grad_sample_kernel(
    x_ptr,  # [B, groups, P, C]
    g_ptr,  # [B, groups, P, C]
    mean_ptr,  # [B, groups, P, C], or None
    rstd_ptr,  # [B, groups, P, C]
    scale_ptr,  # [runs, B, C]
    shift_ptr,  # [runs, B, C]
    B,
    P,
    C,
    steps,  # blocks of positions of all groups
    run_steps,
    runs,
    x_sample,
    x_group,
    x_position,
    x_channel,
    g_sample,
    g_group,
    g_position,
    g_channel,
    mean_sample,
    mean_group,
    mean_position,
    mean_channel,
    rstd_sample,
    rstd_group,
    rstd_position,
    rstd_channel,
    MEAN_BY_POSITION: tl.constexpr,
    MEAN_BY_CHANNEL: tl.constexpr,
    RSTD_BY_POSITION: tl.constexpr,
    RSTD_BY_CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_p, blocks_c = tl.cdiv(P, BLOCK_P), tl.cdiv(C, BLOCK_C)
    run = tl.program_id(0) // blocks_c % runs
    b = (tl.program_id(0) // (blocks_c * runs)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    channel = c.to(tl.int64)[None, :]
    scale = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    shift = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(run * run_steps, tl.minimum((run + 1) * run_steps, steps)):
        group = (step // blocks_p).to(tl.int64)
        p = step % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        inside_p = p < P
        position, inside = p.to(tl.int64)[:, None], inside_p[:, None] & inside_c[None, :]
        to_x = b * x_sample + group * x_group + position * x_position + channel * x_channel
        to_g = b * g_sample + group * g_group + position * g_position + channel * g_channel
        x = tl.load(x_ptr + to_x, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + to_g, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            mean = mean_ptr + b * mean_sample + group * mean_group
            x -= _statistic(
                mean, p, c, inside_p, inside_c, mean_position, mean_channel, MEAN_BY_POSITION, MEAN_BY_CHANNEL
            )
        rstd = rstd_ptr + b * rstd_sample + group * rstd_group
        x *= _statistic(rstd, p, c, inside_p, inside_c, rstd_position, rstd_channel, RSTD_BY_POSITION, RSTD_BY_CHANNEL)
        scale += g * x
        shift += g
    to = (run * B + b) * C + c
    tl.store(scale_ptr + to, tl.sum(scale, 0), mask=inside_c)
    tl.store(shift_ptr + to, tl.sum(shift, 0), mask=inside_c)


def affine_blocks(positions: int, channels: int, by_channel: bool) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C), of 4096 elements at most; by_channel: channels lie closer together than positions."""
    block_c = power_of_two(channels, 1, 128 if by_channel else 16)
    return power_of_two(positions, 1, 4096 // block_c), block_c


def affine_grad_sample(input: Tensor, grad_output: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of scale and shift, [B, C] each, in fp32; mean (None: 0) and rstd are [B, R, C]."""
    b, r, c, length = input.shape
    if input.numel() == 0:
        return torch.zeros(b, c, device=input.device), torch.zeros(b, c, device=input.device)
    # Blocks lie along the longer of R and L.
    group, position = (3, 1) if r > length else (1, 3)
    groups, positions = input.shape[group], input.shape[position]
    block_p, block_c = affine_blocks(positions, c, input.stride(2) <= input.stride(position))
    blocks_c = triton.cdiv(c, block_c)
    steps = groups * triton.cdiv(positions, block_p)
    run_steps = triton.cdiv(steps, min(steps, triton.cdiv(_PROGRAMS, b * blocks_c)))
    runs = triton.cdiv(steps, run_steps)
    scale = torch.empty(runs, b, c, device=input.device, dtype=torch.float32)
    shift = torch.empty(runs, b, c, device=input.device, dtype=torch.float32)
    tensors, flags = {}, {}
    for name, tensor in (("x", input), ("g", grad_output), ("mean", mean), ("rstd", rstd)):
        strides = (0, 0, 0, 0) if tensor is None else (*tensor.stride(), 0)[:4]  # statistics have no L
        tensors |= {
            f"{name}_ptr": tensor,
            f"{name}_sample": strides[0],
            f"{name}_group": strides[group],
            f"{name}_position": strides[position],
            f"{name}_channel": strides[2],
        }
        if name in ("mean", "rstd"):
            upper = name.upper()
            flags |= {f"{upper}_BY_POSITION": strides[position] != 0, f"{upper}_BY_CHANNEL": strides[2] != 0}
    launch(
        affine_grad_sample_kernel,
        b * runs * blocks_c,
        {"num_warps": 8, "num_stages": 2},
        **tensors,
        **flags,
        scale_ptr=scale,
        shift_ptr=shift,
        B=b,
        P=positions,
        C=c,
        steps=steps,
        run_steps=run_steps,
        runs=runs,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return (scale[0], shift[0]) if runs == 1 else (scale.sum(0), shift.sum(0))


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes, for tests/triton_compile.py; `main` are the measured ones."""
    tokens = torch.empty(8, 2048, 1024, 1, device="meta", dtype=torch.bfloat16)
    by_token = torch.empty(8, 2048, 1, device="meta").expand(8, 2048, 1024)
    image = torch.empty(64, 1, 256, 3136, device="meta", dtype=torch.float16)
    by_channel = torch.empty(64, 1, 256, device="meta")
    return [
        *noted_launches("LayerNorm", True, affine_grad_sample, tokens, tokens, by_token, by_token),
        *noted_launches("GroupNorm", True, affine_grad_sample, image, image, by_channel, by_channel),
        *noted_launches(
            "normalised", False, affine_grad_sample, image, image, None, by_channel[:1, :1, :1].expand(64, 1, 256)
        ),
    ]
