"""log Σ_k w_k − log K of B samples, log w_k = l_k + ½ Σ_d (logvar_d + e² − z²), e = (z − μ)/σ, and its backward.

A program has BLOCK_K latents of one sample, all of D, BLOCK_D at a time; it leaves the largest log-weight and the sum
of the weights relative to it, which another kernel merges. The backward's programs compute their weights again, read
z a second time (from the cache), and leave their shares of the gradients of mu and logvar. Accumulates in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._launch import launch, noted_launches, power_of_two

_ELEMENTS = 8192  # of a tile
_MAX_BLOCK_D = 256


@triton.jit
def _base(log_ptr):
    """What a sample's log-weights are relative to: small numbers have small errors."""
    base = tl.load(log_ptr)
    return tl.where(tl.abs(base) < float("inf"), base, 0.0)


@triton.jit
def _log_weights(log_ptr, z_ptr, mu_ptr, logvar_ptr, k, inside, log_k, z_k, D, BLOCK_K: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_K], less what _base gives; the pointers are those of the sample."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = inside[:, None] & (d < D)[None, :]
        mu = tl.load(mu_ptr + d, mask=d < D, other=0.0)
        logvar = tl.load(logvar_ptr + d, mask=d < D, other=0.0)
        z = tl.load(z_ptr + k[:, None] * z_k + d[None, :], mask=tile, other=0.0).to(tl.float32)
        noise = (z - mu[None, :]) * tl.exp(-0.5 * logvar)[None, :]
        total += tl.sum(logvar[None, :] + (noise - z) * (noise + z), 1)
    log_px_z = tl.load(log_ptr + k * log_k, mask=inside, other=float("-inf"))
    return (log_px_z - _base(log_ptr)) + 0.5 * total


@triton.jit
def importance_weight_kernel(
    log_ptr,  # [B, K]
    z_ptr,  # [B, K, D]
    mu_ptr,  # [B, D]
    logvar_ptr,  # [B, D]
    part_ptr,  # [B, blocks, 2]
    K,
    D,
    blocks,
    log_sample,
    log_k,
    z_sample,
    z_k,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    k = block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    value = _log_weights(log_ptr + b * log_sample, z_ptr + b * z_sample, mu_ptr + b * D, logvar_ptr + b * D, k, k < K,
                         log_k, z_k, D, BLOCK_K, BLOCK_D)  # fmt: skip
    largest = tl.max(value, 0)
    finite = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    part_ptr += 2 * tl.program_id(0).to(tl.int64)
    tl.store(part_ptr, finite)
    tl.store(part_ptr + 1, tl.sum(tl.exp(value - finite), 0))


@triton.jit
def importance_weight_merge_kernel(
    part_ptr, log_ptr, value_ptr, normalizer_ptr, blocks, log_sample, log_size, BLOCK: tl.constexpr
):
    """part [B, blocks, 2]; log [B, K]; value [B]; normalizer [B, 2]: what the sum is relative to, and the sum."""
    b = tl.program_id(0).to(tl.int64)
    part_ptr += 2 * b * blocks
    i = tl.arange(0, BLOCK)
    # A part of sum 0 has no weight to be relative to.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, blocks, BLOCK):
        inside = first + i < blocks
        value = tl.load(part_ptr + 2 * (first + i), mask=inside, other=0.0)
        part = tl.load(part_ptr + 2 * (first + i) + 1, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.where(part == 0, float("-inf"), value))
    base = tl.max(largest, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks, BLOCK):
        inside = first + i < blocks
        value = tl.load(part_ptr + 2 * (first + i), mask=inside, other=0.0)
        part = tl.load(part_ptr + 2 * (first + i) + 1, mask=inside, other=0.0)
        sums += tl.where(part == 0, 0.0, part * tl.exp(value - base))
    total = tl.sum(sums, 0)
    relative = base + tl.log(tl.where(total == 0, 1.0, total)) - log_size
    tl.store(value_ptr + b, tl.where(total == 0, float("-inf"), relative + _base(log_ptr + b * log_sample)))
    tl.store(normalizer_ptr + 2 * b, base)
    tl.store(normalizer_ptr + 2 * b + 1, total)


@triton.jit
def importance_weight_bwd_kernel(
    grad_ptr,  # [B]
    log_ptr,  # [B, K]
    z_ptr,  # [B, K, D]
    mu_ptr,  # [B, D]
    logvar_ptr,  # [B, D]
    normalizer_ptr,  # [B, 2]
    d_log_ptr,  # [B, K]
    d_z_ptr,  # [B, K, D]
    share_ptr,  # [blocks, 2, B, D]
    B,
    K,
    D,
    blocks,
    grad_sample,
    log_sample,
    log_k,
    z_sample,
    z_k,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    z_ptr += b * z_sample
    mu_ptr += b * D
    logvar_ptr += b * D
    value = _log_weights(log_ptr + b * log_sample, z_ptr, mu_ptr, logvar_ptr, k, inside, log_k, z_k, D, BLOCK_K,
                         BLOCK_D)  # fmt: skip
    base, total = tl.load(normalizer_ptr + 2 * b), tl.load(normalizer_ptr + 2 * b + 1)
    scale = tl.where(total == 0, 0.0, tl.load(grad_ptr + b * grad_sample)) / tl.where(total == 0, 1.0, total)
    weight = tl.exp(value - base) * scale
    tl.store(d_log_ptr + b * K + k, weight, mask=inside)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = inside[:, None] & (d < D)[None, :]
        mu = tl.load(mu_ptr + d, mask=d < D, other=0.0)
        inverse_std = tl.exp(-0.5 * tl.load(logvar_ptr + d, mask=d < D, other=0.0))
        z = tl.load(z_ptr + k[:, None] * z_k + d[None, :], mask=tile, other=0.0).to(tl.float32)
        noise = (z - mu[None, :]) * inverse_std[None, :]
        d_noise = weight[:, None] * noise
        d_z = d_noise * inverse_std[None, :] - weight[:, None] * z
        d_z_ptrs = d_z_ptr + (b * K + k)[:, None] * D + d[None, :]
        tl.store(d_z_ptrs, d_z.to(d_z_ptr.dtype.element_ty), mask=tile)
        shares = share_ptr + (block * 2 * B + b) * D + d
        tl.store(shares, -inverse_std * tl.sum(d_noise, 0), mask=d < D)
        tl.store(shares + B.to(tl.int64) * D, 0.5 * tl.sum(weight[:, None] - d_noise * noise, 0), mask=d < D)


def importance_weighted_log_prob(log_px_z: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The values [B], and what a sample's weights are relative to and their sum, [B, 2]; all but z in fp32."""
    arguments = _arguments(log_px_z, z, mu, logvar)
    b, blocks = z.shape[0], arguments["blocks"]
    parts = torch.empty(b, blocks, 2, device=z.device, dtype=torch.float32)
    launch(importance_weight_kernel, b * blocks, {"num_warps": 8, "num_stages": 2}, part_ptr=parts, **arguments)
    value = torch.empty(b, device=z.device, dtype=torch.float32)
    normalizer = torch.empty(b, 2, device=z.device, dtype=torch.float32)
    launch(
        importance_weight_merge_kernel,
        b,
        {"num_warps": 1, "num_stages": 1},
        part_ptr=parts,
        log_ptr=log_px_z,
        value_ptr=value,
        normalizer_ptr=normalizer,
        blocks=blocks,
        log_sample=log_px_z.stride(0),
        log_size=math.log(z.shape[1]),
        BLOCK=power_of_two(blocks, 16, 256),
    )
    return value, normalizer


def importance_weighted_log_prob_bwd(
    grad_output: Tensor, log_px_z: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, normalizer: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = _arguments(log_px_z, z, mu, logvar)
    b, k, d = z.shape
    blocks = arguments["blocks"]
    d_log_px_z = torch.empty(b, k, device=z.device, dtype=torch.float32)
    d_z = torch.empty(b, k, d, device=z.device, dtype=z.dtype)
    shares = torch.empty(blocks, 2, b, d, device=z.device, dtype=torch.float32)
    launch(
        importance_weight_bwd_kernel,
        b * blocks,
        {"num_warps": 8, "num_stages": 2},
        grad_ptr=grad_output,
        normalizer_ptr=normalizer.contiguous(),
        d_log_ptr=d_log_px_z,
        d_z_ptr=d_z,
        share_ptr=shares,
        B=b,
        grad_sample=grad_output.stride(0),
        **arguments,
    )
    d_mu, d_logvar = shares.sum(0)
    return d_log_px_z, d_z, d_mu, d_logvar


def _arguments(log_px_z: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, object]:
    """What both kernels are called with."""
    _, k, d = z.shape
    z = z if d <= 1 or z.stride(2) == 1 else z.contiguous()
    block_d = power_of_two(d, 16, _MAX_BLOCK_D)
    block_k = power_of_two(k, 16, _ELEMENTS // block_d)
    return {
        "log_ptr": log_px_z,
        "z_ptr": z,
        "mu_ptr": mu.contiguous(),
        "logvar_ptr": logvar.contiguous(),
        "K": k,
        "D": d,
        "blocks": triton.cdiv(k, block_k),
        "log_sample": log_px_z.stride(0),
        "log_k": log_px_z.stride(1),
        "z_sample": z.stride(0),
        "z_k": z.stride(1),
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
    }


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes, for tests/triton_compile.py; `main` are the measured ones."""
    found = []
    for (b, k, d), dtype, main in (
        ((64, 5000, 64), torch.float32, True),
        ((16, 512, 128), torch.bfloat16, False),
        ((8, 7, 1000), torch.float16, False),
    ):
        z = torch.empty(b, k, d, device="meta", dtype=dtype)
        log_px_z, mu, normalizer, grad = (torch.empty(size, device="meta") for size in ((b, k), (b, d), (b, 2), (b,)))
        found += noted_launches("value", main, importance_weighted_log_prob, log_px_z, z, mu, mu)
        backward = importance_weighted_log_prob_bwd
        found += noted_launches("gradients", main, backward, grad, log_px_z, z, mu, mu, normalizer)
    return found
