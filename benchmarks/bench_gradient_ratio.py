"""The ratio of a value and its gradient's norm, of gradient normalisation, against PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmix import per_sample
from fastmix.benchmarks import penalty_peers as gan
from fastmix.benchmarks.grad_norm_models import Setting
from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.benchmarks.peers import compiled
from fastmix.benchmarks.per_sample_peers import on_setting
from fastmix.testing.cases import Case
from fastmix.testing.gradient_ratio import ratio_case

# Of images
SHAPES = ((64, 3, 32, 32), (16, 3, 256, 256))
GPU_SHAPES = ((256, 3, 64, 64), (64, 3, 256, 256))


def cases(device: str) -> list[BenchCase]:
    on_gpu = device == "cuda"
    shapes = GPU_SHAPES if on_gpu else SHAPES
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    gans = [gan.gan_setting(256, 64)] if on_gpu else [gan.gan_setting(32, 32), gan.gan_setting(32, 64)]
    gans.append(gan.gan_setting(32, 32, smooth=True))
    return [*(_ratio(shape, dtype) for shape in shapes for dtype in dtypes), *map(_gan_step, gans)]


def _ratio(shape: tuple[int, ...], dtype: torch.dtype) -> BenchCase:
    elements = math.prod(shape)
    one_way = elements * dtype.itemsize
    return BenchCase(
        ratio_case(f"{'x'.join(map(str, shape))}", shape),
        dtype,
        # Read the gradient; the backward reads it again and writes what it is multiplied by.
        moved_bytes={FORWARD: one_way, BOTH: 3 * one_way},
        # A square and a sum; in the backward a product.
        flops={FORWARD: 2 * elements, BOTH: 3 * elements},
        peers=(Provider("PyTorch", _eager), compiled("PyTorch", _eager)),
        headline=True,
    )


def _eager(value: Tensor, gradient: Tensor, mode: str, eps: float | None) -> Tensor:
    """GN without eps, as its authors write it."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float32)
    return value / (norm + value.abs())


def _gan_step(setting: Setting) -> BenchCase:
    """Both steps of a GAN with GN, from the images to the gradients of all parameters."""
    run, reference = (
        on_setting(setting, gan.gan_step(normalized)) for normalized in (per_sample.gradient_normalize, gan.normalize)
    )
    return BenchCase(
        Case("gradient_ratio", f"GN steps {setting.name}", run, reference, setting.inputs),
        torch.float32,
        moved_bytes={},
        flops={},
        peers=gan.gan_peers(setting),
        headline=True,
    )
