"""A sample's value over its gradient's norm n, y/(n + |y| + eps) or y·n/(n² + eps), and its backward.

A program sums the squares of a run of one sample's gradient [N]; another kernel adds the runs, in their order, and
makes the ratio; the backward scales a run by one number for the sample. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, noted_launches, power_of_two

_PROGRAMS = 1024  # that fill a GPU
_BLOCK = 4096
_BLOCK_B = 64


@triton.jit
def gradient_ratio_norm_kernel(gradient_ptr, sum_ptr, B, N, runs, run_blocks, gradient_sample, BLOCK: tl.constexpr):
    """gradient [B, N]; sum [runs, B]."""
    b, run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    sums = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(N, BLOCK)
    for block in range(run * run_blocks, tl.minimum((run + 1) * run_blocks, blocks)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(gradient_ptr + b * gradient_sample + n, mask=n < N, other=0.0).to(tl.float32)
        sums += values * values
    tl.store(sum_ptr + run * B + b, tl.sum(sums, 0))


@triton.jit
def gradient_ratio_kernel(
    value_ptr, sum_ptr, ratio_ptr, norm_ptr, B, runs, value_sample, eps, GRAN: tl.constexpr, BLOCK_B: tl.constexpr
):
    """sum [runs, B]; the others [B]."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = b < B
    norm_sq = tl.zeros([BLOCK_B], tl.float32)
    for run in range(runs):
        norm_sq += tl.load(sum_ptr + run * B + b, mask=inside, other=0.0)
    value = tl.load(value_ptr + b * value_sample, mask=inside, other=0.0)
    norm = tl.sqrt(norm_sq)
    if GRAN:
        above, below = value * norm, norm_sq + eps
    else:
        above, below = value, norm + tl.abs(value) + eps
    zero = below == 0
    tl.store(ratio_ptr + b, tl.where(zero, 0.0, above) / tl.where(zero, 1.0, below), mask=inside)
    tl.store(norm_ptr + b, norm, mask=inside)


@triton.jit
def gradient_ratio_bwd_kernel(
    grad_ptr,  # [B]
    value_ptr,  # [B]
    gradient_ptr,  # [B, N]
    norm_ptr,  # [B]
    d_value_ptr,  # [B]
    d_gradient_ptr,  # [B, N]
    N,
    blocks,
    grad_sample,
    value_sample,
    gradient_sample,
    eps,
    GRAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    grad, value = tl.load(grad_ptr + b * grad_sample), tl.load(value_ptr + b * value_sample)
    norm = tl.load(norm_ptr + b)
    # Quotients are formed one after the other: the square of `below` may underflow.
    if GRAN:
        below = norm * norm + eps
        scale = tl.where(below == 0, 0.0, grad) / tl.where(below == 0, 1.0, below)
        by_value = scale * norm
        by_norm = scale * value * ((eps - norm * norm) / tl.where(below == 0, 1.0, below))
    else:
        below = norm + tl.abs(value) + eps
        scale = tl.where(below == 0, 0.0, grad) / tl.where(below == 0, 1.0, below)
        by_value = scale * ((norm + eps) / tl.where(below == 0, 1.0, below))
        by_norm = -scale * (value / tl.where(below == 0, 1.0, below))
    if block == 0:
        tl.store(d_value_ptr + b, by_value)
    factor = tl.where(norm == 0, 0.0, by_norm) / tl.where(norm == 0, 1.0, norm)
    n = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(gradient_ptr + b * gradient_sample + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(d_gradient_ptr + b * N + n, (values * factor).to(d_gradient_ptr.dtype.element_ty), mask=n < N)


def gradient_ratio(value: Tensor, gradient: Tensor, gran: bool, eps: float) -> tuple[Tensor, Tensor]:
    """The ratios and the norms, [B] in fp32, of value [B] in fp32 and gradient [B, N]."""
    b, n = gradient.shape
    gradient = gradient if n <= 1 or gradient.stride(1) == 1 else gradient.contiguous()
    block = power_of_two(n, 16, _BLOCK)
    blocks = triton.cdiv(n, block)
    run_blocks = max(1, triton.cdiv(blocks, triton.cdiv(_PROGRAMS, max(b, 1))))
    runs = triton.cdiv(blocks, run_blocks)
    sums = torch.empty(runs, b, device=gradient.device, dtype=torch.float32)
    launch(
        gradient_ratio_norm_kernel,
        b * runs,
        {"num_warps": 8, "num_stages": 2},
        gradient_ptr=gradient,
        sum_ptr=sums,
        B=b,
        N=n,
        runs=runs,
        run_blocks=run_blocks,
        gradient_sample=gradient.stride(0),
        BLOCK=block,
    )
    ratio, norm = torch.empty(2, b, device=gradient.device, dtype=torch.float32)
    launch(
        gradient_ratio_kernel,
        triton.cdiv(b, _BLOCK_B),
        {"num_warps": 2, "num_stages": 1},
        value_ptr=value,
        sum_ptr=sums,
        ratio_ptr=ratio,
        norm_ptr=norm,
        B=b,
        runs=runs,
        value_sample=value.stride(0),
        eps=float(eps),
        GRAN=gran,
        BLOCK_B=_BLOCK_B,
    )
    return ratio, norm


def gradient_ratio_bwd(
    grad_output: Tensor, value: Tensor, gradient: Tensor, norm: Tensor, gran: bool, eps: float
) -> tuple[Tensor, Tensor]:
    b, n = gradient.shape
    gradient = gradient if n <= 1 or gradient.stride(1) == 1 else gradient.contiguous()
    block = power_of_two(n, 16, _BLOCK)
    blocks = max(1, triton.cdiv(n, block))
    d_value = torch.empty(b, device=gradient.device, dtype=torch.float32)
    d_gradient = torch.empty(b, n, device=gradient.device, dtype=gradient.dtype)
    launch(
        gradient_ratio_bwd_kernel,
        b * blocks,
        {"num_warps": 8, "num_stages": 2},
        grad_ptr=grad_output,
        value_ptr=value,
        gradient_ptr=gradient,
        norm_ptr=norm.contiguous(),
        d_value_ptr=d_value,
        d_gradient_ptr=d_gradient,
        N=n,
        blocks=blocks,
        grad_sample=grad_output.stride(0),
        value_sample=value.stride(0),
        gradient_sample=gradient.stride(0),
        eps=float(eps),
        GRAN=gran,
        BLOCK=block,
    )
    return d_value, d_gradient


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes, for tests/triton_compile.py; `main` are the measured ones."""
    value = torch.empty(64, device="meta")
    found = []
    for dtype, gran, main in ((torch.float32, False, True), (torch.bfloat16, True, False)):
        gradient = torch.empty(64, 3 * 256 * 256, device="meta", dtype=dtype)
        mode = "gran" if gran else "gn"
        found += noted_launches(mode, main, gradient_ratio, value, gradient, gran, 0.1)
        found += noted_launches(f"{mode} backward", main, gradient_ratio_bwd, value, value, gradient, value, gran, 0.1)
    return found
