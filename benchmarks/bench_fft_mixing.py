"""Fourier mixing (FNet) and the global filter (GFNet) against torch.fft, dense products and ducc0."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.benchmarks.models import ModelCase
from fastmix.benchmarks.peers import compiled, in_float32, missing
from fastmix.testing.fft_mixing import fourier_mixing_case, global_filter_case

TOKENS = (64, 100, 127, 128, 197, 512, 1000, 1024, 4096)
CHANNELS = (64, 384, 768, 1024)
HEADLINE = (4, 512, 768)
IMAGES = ((8, 14, 14, 384), (8, 7, 7, 768), (4, 28, 28, 128), (2, 56, 56, 64))
# Batches that fill a GPU; those above measure little but launches there.
GPU_HEADLINE, GPU_LONG, GPU_IMAGES = (64, 512, 768), (8, 4096, 768), (128, 14, 14, 384)


def cases(device: str) -> list[BenchCase]:
    grid = [(1 if s == 4096 else 4, s, h) for s in TOKENS for h in CHANNELS]
    on_gpu = device == "cuda"
    both = (torch.float32, torch.bfloat16)
    return [
        *(_fourier_mixing(GPU_HEADLINE, dtype, device) for dtype in both if on_gpu),
        *(_fourier_mixing(GPU_LONG, dtype, device) for dtype in both if on_gpu),
        *(_fourier_mixing(HEADLINE, dtype, device) for dtype in both),
        *(_fourier_mixing(shape, torch.float32, device) for shape in grid if shape != HEADLINE),
        *(_global_filter(GPU_IMAGES, dtype) for dtype in both if on_gpu),
        *(_global_filter(shape, torch.float32) for shape in IMAGES),
        _global_filter(IMAGES[0], torch.bfloat16),
    ]


def models(device: str, full: bool) -> list[ModelCase]:
    layers, batch = (12, 8) if full else (4, 1)
    label = f"FNetForMaskedLM, {layers} layers, hidden size 768, batch {batch} × 512 tokens, float32, random weights"
    return [ModelCase("fft_mixing", label, functools.partial(_fnet, layers, batch, device), missing("transformers"))]


# fourier_mixing


def _fourier_mixing(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> BenchCase:
    b, s, h = shape
    elements = b * s * h
    one_way = 2 * elements * dtype.itemsize  # read x, write y
    # A complex FFT of n points takes 5·n·log2(n) operations; real input halves that, the real, even output again.
    flops = round(1.25 * elements * math.log2(s * h))
    # The backward is the same transform of the gradient.
    return BenchCase(
        fourier_mixing_case(f"{b}x{s}x{h}", shape),
        dtype,
        moved_bytes={FORWARD: one_way, BOTH: 2 * one_way},
        flops={FORWARD: flops, BOTH: 2 * flops},
        peers=_fourier_peers(s, h, device),
        headline=shape == HEADLINE,
    )


def _fft2(x: Tensor) -> Tensor:
    return torch.fft.fft2(x).real


def _fftn(x: Tensor) -> Tensor:
    return torch.fft.fftn(x, dim=(-2, -1)).real


def _rfft2_mirrored(x: Tensor) -> Tensor:
    """Only H/2 + 1 columns go through the transform along S; the others are their mirror, y[s, h] = y[−s, −h]."""
    h = x.shape[-1]
    half = torch.fft.rfft2(x).real
    mirror = half[..., 1 : (h + 1) // 2]
    if x.requires_grad:  # autograd is quicker without writes into slices
        mirror = torch.cat([mirror[..., :1, :], mirror[..., 1:, :].flip(-2)], dim=-2).flip(-1)
        return torch.cat([half, mirror], dim=-1)
    y = torch.empty_like(x)
    y[..., : h // 2 + 1] = half
    y[..., 0, h // 2 + 1 :] = mirror[..., 0, :].flip(-1)
    y[..., 1:, h // 2 + 1 :] = mirror[..., 1:, :].flip(-1, -2)
    return y


def _matrix_products(x: Tensor) -> Tensor:
    """C_S x C_H − S_S x S_H with dense matrices, as FNet's code does on TPUs."""
    cos_s, sin_s = _dft_matrices(x.shape[-2], x.device)
    cos_h, sin_h = _dft_matrices(x.shape[-1], x.device)
    return cos_s @ (x @ cos_h) - sin_s @ (x @ sin_h)


@functools.lru_cache(maxsize=4)
def _dft_matrices(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    j = torch.arange(n, device=device)
    angle = (j[:, None] * j % n).double() * (2 * math.pi / n)
    return angle.cos().float(), angle.sin().float()


def _ducc0_r2c(x: Tensor) -> Tensor:
    """As _rfft2_mirrored, with ducc0's transform and NumPy."""
    import ducc0
    import numpy as np

    h = x.shape[-1]
    half = ducc0.fft.r2c(x.numpy(), axes=(-2, -1), nthreads=torch.get_num_threads()).real
    y = np.empty(x.shape, dtype=np.float32)
    y[..., : h // 2 + 1] = half
    mirror = y[..., 1 : (h + 1) // 2]
    y[..., 0, h // 2 + 1 :] = mirror[..., 0, ::-1]
    y[..., 1:, h // 2 + 1 :] = mirror[..., :0:-1, ::-1]
    return torch.from_numpy(y)


def _ducc0_hartley(x: Tensor) -> Tensor:
    """The Hartley transform is Re + Im; its even part under (s, h) → (−s, −h) is Re."""
    import ducc0

    hartley = torch.from_numpy(ducc0.fft.genuine_hartley(x.numpy(), axes=(-2, -1), nthreads=torch.get_num_threads()))
    return hartley.add_(hartley.flip(-2, -1).roll((1, 1), (-2, -1))).mul_(0.5)


def _fourier_peers(s: int, h: int, device: str) -> tuple[Provider, ...]:
    no_ducc0 = missing("ducc0") if device == "cpu" else "ducc0 runs on CPUs only"
    # Dense products take 4·B·S·H·(S + H) operations: beyond this size they are far from the best peer.
    large = s + h > 512
    return (
        Provider("torch.fft.fft2", in_float32(_fft2)),
        Provider("torch.fft.fftn", in_float32(_fftn)),
        Provider("rfft2 + mirror", in_float32(_rfft2_mirrored)),
        Provider("matrix products", in_float32(_matrix_products), full_only=large),
        Provider("ducc0 r2c + mirror", in_float32(_ducc0_r2c), no_ducc0, backward=False),
        Provider("ducc0 Hartley", in_float32(_ducc0_hartley), no_ducc0, backward=False, full_only=True),
        compiled("fft2", in_float32(_fft2)),
    )


# global_filter


def _global_filter(shape: tuple[int, int, int, int], dtype: torch.dtype) -> BenchCase:
    b, h, w, c = shape
    pixels, weights = b * h * w * c, h * (w // 2 + 1) * c

    # Forward: read x and the complex64 weight, write y. Backward: read dy, x, weight, write dx, dweight.
    forward_bytes = 2 * pixels * dtype.itemsize + weights * 8
    backward_bytes = 3 * pixels * dtype.itemsize + 2 * weights * 8
    # A real FFT of n = h·w points takes 2.5·n·log2(n) operations, a complex product 6 per half-spectrum point.
    # Forward: two FFTs, one product. Backward: dy's and dx's FFT, two products (x's spectrum could be kept).
    transform, product = 2.5 * pixels * math.log2(h * w), 6 * b * weights
    forward_flops, backward_flops = round(2 * transform + product), round(2 * transform + 2 * product)
    return BenchCase(
        global_filter_case(f"{b}x{h}x{w}x{c}", shape),
        dtype,
        moved_bytes={FORWARD: forward_bytes, BOTH: forward_bytes + backward_bytes},
        flops={FORWARD: forward_flops, BOTH: forward_flops + backward_flops},
        peers=_FILTER_PEERS,
        headline=shape == IMAGES[0],
    )


def _rfft2_filter(x: Tensor, weight: Tensor) -> Tensor:
    """irfft2(rfft2(x)·weight), as GFNet's code computes it."""
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * weight
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


_FILTER_PEERS = (
    Provider("rfft2 · w, irfft2", in_float32(_rfft2_filter)),
    compiled("rfft2 · w, irfft2", in_float32(_rfft2_filter)),
)


# FNet


def _fnet(layers: int, batch: int, device: str):
    from transformers import FNetConfig, FNetForMaskedLM
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    from fastmix.benchmarks.models import Model, Part
    from fastmix.integrations.transformers import accelerate, restore

    torch.manual_seed(0)
    config = FNetConfig(num_hidden_layers=layers)
    model = FNetForMaskedLM(config).eval().to(device)
    tokens = torch.randint(0, config.vocab_size, (batch, 512), device=device)
    mixing = [module for module in model.modules() if isinstance(module, FNetBasicFourierTransform)]
    return Model(
        run=lambda: model(input_ids=tokens).logits,
        parts=[Part(module, torch.randn(batch, 512, config.hidden_size, device=device)) for module in mixing],
        accelerate=lambda: accelerate(model),
        restore=lambda: restore(model),
    )
