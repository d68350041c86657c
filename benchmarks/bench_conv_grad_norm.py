"""Weight gradients of convolutions with the norms of the samples' parts, against PyTorch and Opacus's way."""

from __future__ import annotations

import math

import torch

from fastmix.benchmarks import grad_norm_peers as peers
from fastmix.benchmarks.harness import FORWARD, BenchCase, Provider
from fastmix.testing.conv_grad_norm import conv_case

# Shape of the input, channels of the output: of a small CNN, and of a ResNet's stages.
SMALL = (((64, 1, 28, 28), 32), ((64, 32, 14, 14), 64))
RESNET = (((8, 64, 56, 56), 64), ((8, 256, 14, 14), 256))


def cases(device: str) -> list[BenchCase]:
    if device == "cuda":
        return [_conv((256, *shape[1:]), channels, torch.float32) for shape, channels in (*SMALL, *RESNET)]
    return [
        *(_conv(shape, channels, torch.float32) for shape, channels in (*SMALL, *RESNET)),
        _conv((8, 128, 28, 28), 128, torch.float32, groups=128),
    ]


def _conv(shape: tuple[int, ...], channels: int, dtype: torch.dtype, groups: int = 1) -> BenchCase:
    """3×3, padded so that the output has the input's height and width."""
    b, i, h, w = shape
    pixels, weights = b * h * w, 9 * channels * i // groups
    name = f"B{b} {i}→{channels} {h}x{w}" + (f" groups {groups}" if groups > 1 else "")
    return BenchCase(
        conv_case(f"3x3 {name}", shape, channels, (3, 3), padding=1, groups=groups),
        dtype,
        # Read the input and the gradient of the output, write dw in float32.
        moved_bytes={FORWARD: pixels * (i + channels) * dtype.itemsize + 4 * weights},
        flops={FORWARD: 2 * math.prod((pixels, weights))},
        peers=(
            Provider("convolution_backward, without norms", peers.conv_weight_grad, yardstick=True),
            Provider("convolution_backward a sample", peers.looped_conv),
            Provider("unfold, einsum", peers.unfolded_conv),
            Provider("samples as groups", peers.grouped_conv),
        ),
        headline=(shape, channels) in SMALL,
    )
