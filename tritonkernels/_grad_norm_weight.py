"""dW = Σ_b s_b·dW_b beside the norms ‖dW_b‖² of the samples' own dW_b = Σ_t g_t a_tᵀ.

A program owns a tile of dW and a run of the samples; at the end of each it squares what this one has added. Sums over
tiles and runs are partial, in their order. Where samples are short, that end would take longer than the product: then
dW is one product over the positions of all samples, and the norms are the Gram form's. Accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkernels._grad_norm_direct import direct_blocks
from tritonkernels._grad_norm_gram import norm_sq_by_gram
from tritonkernels._grad_norm_tile import add_product, total
from tritonkernels._launch import launch, tf32
from tritonkernels._token_norm import load_rows

_PROGRAMS = 256  # that fill a GPU
_SHORT = 64  # positions


@triton.jit
def linear_weight_grad_with_norm_kernel(
    a_ptr,  # [B, T, in_features]
    g_ptr,  # [B, T, out_features]
    sample_weight_ptr,  # [B]
    dw_ptr,  # [runs, out_features, in_features]
    norm_sq_ptr,  # [tiles, B]
    B,
    T,
    in_features,
    out_features,
    samples,  # of a run
    a_sample,
    a_row,
    g_sample,
    g_row,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    blocks_o, blocks_i = tl.cdiv(out_features, BLOCK_O), tl.cdiv(in_features, BLOCK_I)
    # The tiles of a run are neighbours: they read the same samples.
    tile, run = tl.program_id(0) % (blocks_o * blocks_i), tl.program_id(0) // (blocks_o * blocks_i)
    o = tile // blocks_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.arange(0, BLOCK_T)
    dw = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    of_sample = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    # One loop over the samples and their positions, so that the loads do not stop between two samples.
    steps = tl.cdiv(T, BLOCK_T)
    for step in range(run * samples * steps, tl.minimum((run + 1) * samples, B) * steps):
        b, t = (step // steps).to(tl.int64), step % steps * BLOCK_T + row
        g = load_rows(g_ptr + b * g_sample, t, g_row, o, t < T, o < out_features)
        a = load_rows(a_ptr + b * a_sample, t, a_row, i, t < T, i < in_features)
        of_sample = add_product(of_sample, tl.trans(g), a, PRECISION)
        if step % steps == steps - 1:
            tl.store(norm_sq_ptr + tl.cast(tile, tl.int64) * B + b, total(of_sample * of_sample))
            if sample_weight_ptr is not None:
                of_sample *= tl.load(sample_weight_ptr + b)
            dw += of_sample
            of_sample = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    to = (tl.cast(run, tl.int64) * out_features + o[:, None]) * in_features + i[None, :]
    tl.store(dw_ptr + to, dw, mask=(o < out_features)[:, None] & (i < in_features)[None, :])


@triton.jit
def linear_weight_grad_kernel(
    a_ptr,  # [B, T, in_features]
    g_ptr,  # [B, T, out_features]
    sample_weight_ptr,  # [B]
    dw_ptr,  # [runs, out_features, in_features]
    T,
    in_features,
    out_features,
    rows,  # B·T
    run_rows,
    a_sample,
    a_row,
    g_sample,
    g_row,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    blocks_o, blocks_i = tl.cdiv(out_features, BLOCK_O), tl.cdiv(in_features, BLOCK_I)
    tile, run = tl.program_id(0) % (blocks_o * blocks_i), tl.program_id(0) // (blocks_o * blocks_i)
    o = tile // blocks_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    dw = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    last = tl.minimum((run + 1) * run_rows, rows)
    for first in range(run * run_rows, last, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        inside = row < last
        b, t = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
        to_g = b * g_sample + t * g_row + o[None, :]
        to_a = b * a_sample + t * a_row + i[None, :]
        g = tl.load(g_ptr + to_g, mask=inside[:, None] & (o < out_features)[None, :], other=0.0)
        a = tl.load(a_ptr + to_a, mask=inside[:, None] & (i < in_features)[None, :], other=0.0)
        if sample_weight_ptr is not None:
            # Not to be rounded to g's dtype.
            weight = tl.load(sample_weight_ptr + row // T, mask=inside, other=0.0)
            g, a = g.to(tl.float32) * weight[:, None], a.to(tl.float32)
        dw = add_product(dw, tl.trans(g), a, PRECISION)
    to = (tl.cast(run, tl.int64) * out_features + o[:, None]) * in_features + i[None, :]
    tl.store(dw_ptr + to, dw, mask=(o < out_features)[:, None] & (i < in_features)[None, :])


def weight_grad_with_norm(a: Tensor, g: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dw, norm_sq) of a and g as `rows` gives them, not empty."""
    (b, t, in_features), out_features = a.shape, g.shape[2]
    short = t < _SHORT
    exact_products = sample_weight is None or not short
    operand = a.dtype if exact_products else torch.float32
    block_o, block_i, block_t = direct_blocks(b * t if short else t, in_features, out_features, operand)
    tiles = triton.cdiv(out_features, block_o) * triton.cdiv(in_features, block_i)
    units = triton.cdiv(b * t, block_t) if short else b
    of_run = triton.cdiv(units, max(1, min(units, _PROGRAMS // tiles)))
    runs = triton.cdiv(units, of_run)
    dw = torch.empty(runs, out_features, in_features, device=a.device, dtype=torch.float32)
    options = {"num_warps": 8 if block_o * block_i >= 128 * 128 else 4, "num_stages": 3}
    shared = {
        "a_ptr": a,
        "g_ptr": g,
        "sample_weight_ptr": sample_weight,
        "dw_ptr": dw,
        "T": t,
        "in_features": in_features,
        "out_features": out_features,
        "a_sample": a.stride(0),
        "a_row": a.stride(1),
        "g_sample": g.stride(0),
        "g_row": g.stride(1),
        "PRECISION": tf32(operand),
        "BLOCK_O": block_o,
        "BLOCK_I": block_i,
        "BLOCK_T": block_t,
    }
    if short:
        launch(linear_weight_grad_kernel, tiles * runs, options, **shared, rows=b * t, run_rows=of_run * block_t)
        norm_sq = norm_sq_by_gram(a, g, None, False)
    else:
        parts = torch.empty(tiles, b, device=a.device, dtype=torch.float32)
        launch(
            linear_weight_grad_with_norm_kernel,
            tiles * runs,
            options,
            **shared,
            norm_sq_ptr=parts,
            B=b,
            samples=of_run,
        )
        norm_sq = parts.sum(0)
    return dw[0] if runs == 1 else dw.sum(0), norm_sq
