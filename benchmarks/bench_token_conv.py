"""Convolutions along the tokens against F.conv1d, F.conv2d with channels last, and unfolded windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.benchmarks.peers import compiled
from fastmix.testing.token_conv import token_conv_case

HEADLINE = (8, 512, 512)
SHORT = (8, 196, 384)
HEADS = 8
# Batches that fill a GPU.
GPU_HEADLINE, GPU_LONG = (64, 512, 512), (8, 4096, 512)


def cases(device: str) -> list[BenchCase]:
    shapes = [GPU_HEADLINE, GPU_LONG] if device == "cuda" else [HEADLINE]
    return [
        *(
            _conv(kind, shape, taps, dtype)
            for shape in shapes
            for kind, sizes in (("depthwise", (3, 7, 31)), ("lightweight", (7,)), ("dynamic", (7, 31)))
            for taps in sizes
            for dtype in (torch.float32, torch.bfloat16)
        ),
        _conv("depthwise", SHORT, 7, torch.float32),
    ]


def _conv(kind: str, shape: tuple[int, int, int], taps: int, dtype: torch.dtype) -> BenchCase:
    b, s, c = shape
    elements = b * s * c
    weights = {"depthwise": c, "lightweight": HEADS, "dynamic": b * s * HEADS}[kind] * taps
    # Forward: read x and the kernel, write y. Backward: read dy, x, the kernel, write dx, dkernel.
    forward_bytes = (2 * elements + weights) * dtype.itemsize
    backward_bytes = (3 * elements + 2 * weights) * dtype.itemsize
    flops = 2 * elements * taps  # and as much for each of dx and dkernel
    return BenchCase(
        token_conv_case(f"{b}x{s}x{c} K={taps}", shape, taps, kind=kind, heads=HEADS),
        dtype,
        moved_bytes={FORWARD: forward_bytes, BOTH: forward_bytes + backward_bytes},
        flops={FORWARD: flops, BOTH: 3 * flops},
        exps={} if kind == "depthwise" else {FORWARD: weights, BOTH: 2 * weights},
        peers=_DYNAMIC_PEERS if kind == "dynamic" else _SHARED_PEERS,
        headline=(kind, shape, taps) in (("depthwise", HEADLINE, 7), ("dynamic", HEADLINE, 7)),
    )


# The peers serve the cases' odd numbers of taps, none of them causal.


def _shared_weights(kernel: Tensor, kind: str, channels: int) -> Tensor:
    """[C, K]"""
    return kernel if kind == "depthwise" else kernel.softmax(-1).repeat_interleave(channels // kernel.shape[0], 0)


def _conv1d(x: Tensor, kernel: Tensor, kind: str, causal: bool) -> Tensor:
    weights = _shared_weights(kernel, kind, x.shape[2])
    return F.conv1d(x.mT, weights[:, None], padding=kernel.shape[-1] // 2, groups=x.shape[2]).mT


def _conv2d(x: Tensor, kernel: Tensor, kind: str, causal: bool) -> Tensor:
    """[B, S, C] is an image of one row with channels last."""
    weights = _shared_weights(kernel, kind, x.shape[2])[:, None, None]
    image = x.mT[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(image, weights, padding=(0, kernel.shape[-1] // 2), groups=x.shape[2])[:, :, 0].mT


def _windows(x: Tensor, taps: int) -> Tensor:
    """[B, S, C, K]"""
    return F.pad(x, (0, 0, taps // 2, taps // 2)).unfold(1, taps, 1)


def _unfolded(x: Tensor, kernel: Tensor, kind: str, causal: bool) -> Tensor:
    weights = _shared_weights(kernel, kind, x.shape[2])
    return torch.einsum("bsck,ck->bsc", _windows(x, kernel.shape[-1]), weights)


def _unfolded_dynamic(x: Tensor, kernel: Tensor, kind: str, causal: bool) -> Tensor:
    windows = _windows(x, kernel.shape[-1]).unflatten(2, (kernel.shape[2], -1))
    return torch.einsum("bshdk,bshk->bshd", windows, kernel.softmax(-1)).flatten(2)


def _tap_by_tap(x: Tensor, kernel: Tensor, kind: str, causal: bool) -> Tensor:
    """A shifted product a tap, without windows in memory."""
    weights, padded = kernel.softmax(-1), F.pad(x, (0, 0, kernel.shape[-1] // 2, kernel.shape[-1] // 2))
    padded = padded.unflatten(2, (kernel.shape[2], -1))
    return sum(weights[..., k, None] * padded[:, k : k + x.shape[1]] for k in range(kernel.shape[-1])).flatten(2)


_SHARED_PEERS = (
    Provider("F.conv1d", _conv1d),
    Provider("F.conv2d, channels last", _conv2d),
    Provider("unfold + einsum", _unfolded),
    compiled("F.conv1d", _conv1d),
)
_DYNAMIC_PEERS = (
    Provider("unfold + einsum", _unfolded_dynamic),
    Provider("tap by tap", _tap_by_tap),
    compiled("tap by tap", _tap_by_tap),
)
