"""Token-mixing MLP and token linear, as MLP-Mixer, ResMLP and gMLP use them, against PyTorch, timm and lucidrains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.benchmarks import mixer_models
from fastmix.benchmarks import token_mixing_peers as peers
from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.benchmarks.models import ModelCase
from fastmix.benchmarks.peers import compiled, missing
from fastmix.ops.token_mixing import token_linear, token_mixing_mlp
from fastmix.reference import token_mixing as reference
from fastmix.testing.cases import Case

# B, S, C, D of the Mixer's S/16 and B/16, of B/32, and of a longer sequence.
MLP_HEADLINES = ((8, 196, 512, 256), (8, 196, 768, 384))
MLP_SHAPES = (*MLP_HEADLINES, (1, 196, 512, 256), (1, 196, 768, 384), (8, 49, 768, 384), (4, 1024, 512, 512))
# B, S, C of ResMLP-12 to 36, of gMLP-B's gating unit, of a linear map alone.
RESMLP, GATING, LINEAR = (8, 196, 384), (8, 196, 768), (8, 196, 512)
# Batches that fill a GPU; the last does not fit on a multiprocessor.
GPU_MLP_SHAPES = ((256, 196, 512, 256), (256, 196, 768, 384), (8, 4096, 512, 2048))
GPU_RESMLP, GPU_GATING, GPU_LINEAR = (256, 196, 384), (256, 196, 768), (256, 196, 512)


def cases(device: str) -> list[BenchCase]:
    if device == "cuda":
        both = (torch.bfloat16, torch.float32)
        linear = ((_resmlp, GPU_RESMLP), (_gating, GPU_GATING), (_linear, GPU_LINEAR))
        return [
            *(_mlp(shape, dtype) for shape in GPU_MLP_SHAPES for dtype in both),
            *(make(shape, dtype) for make, shape in linear for dtype in both),
        ]
    both = (torch.float32, torch.bfloat16)
    linear = ((_resmlp, RESMLP), (_gating, GATING), (_linear, LINEAR))
    return [
        *(_mlp(shape, dtype) for shape in MLP_SHAPES for dtype in both),
        *(make(shape, dtype) for make, shape in linear for dtype in both),
    ]


def models(device: str, full: bool) -> list[ModelCase]:
    return mixer_models.cases(device, full)


# token_mixing_mlp


def _mlp(shape: tuple[int, int, int, int], dtype: torch.dtype) -> BenchCase:
    b, s, c, d = shape
    elements, weights, hidden = b * s * c, 2 * d * s, b * d * c

    def fused(x, **others) -> Tensor:
        return token_mixing_mlp(x, **others, norm="layer", residual=x)

    def specified(x, **others) -> Tensor:
        return reference.token_mixing_mlp(x, **others, norm="layer", residual=x)

    weights_and_biases = {"w1": ((d, s), s**-0.5), "w2": ((s, d), d**-0.5), "b1": ((d,), 0.1), "b2": ((s,), 0.1)}
    # Two products. What a backward computes anew, because it was not kept, is no work of the problem.
    flops = 4 * b * s * c * d
    return _case(
        f"token_mixing_mlp B{b} S{s} C{c} D{d}",
        (fused, specified),
        {"x": ((b, s, c), 1.0), **weights_and_biases, **_norm_arguments(c)},
        dtype,
        elements=elements,
        weights=weights,
        flops=flops,
        # An activation has one exponential, its derivative one.
        exps={FORWARD: hidden, BOTH: 2 * hidden},
        peers=(
            Provider("eager, transposes", peers.mixer_transposed),
            Provider("eager, products", peers.mixer_products),
            Provider("timm", peers.mixer_timm, missing("timm")),
            Provider("mlp-mixer-pytorch", peers.mixer_lucidrains, missing("mlp_mixer_pytorch")),
            compiled("products", peers.mixer_products),
        ),
        headline=shape in MLP_HEADLINES,
    )


# token_linear


def _resmlp(shape: tuple[int, int, int], dtype: torch.dtype) -> BenchCase:
    b, s, c = shape

    def fused(x, **others) -> Tensor:
        return token_linear(x, **others, norm="affine", residual=x)

    def specified(x, **others) -> Tensor:
        return reference.token_linear(x, **others, norm="affine", residual=x)

    return _case(
        f"token_linear ResMLP B{b} S{s} C{c}",
        (fused, specified),
        {"x": ((b, s, c), 1.0), **_linear_arguments(s), **_norm_arguments(c), "scale": ((c,), 1.0)},
        dtype,
        elements=b * s * c,
        weights=s * s,
        flops=2 * b * s * s * c,
        peers=(
            Provider("eager, transposes", peers.resmlp_transposed),
            Provider("eager, products", peers.resmlp_products),
            Provider("timm", peers.resmlp_timm, missing("timm")),
            compiled("products", peers.resmlp_products),
        ),
        headline=shape == RESMLP,
    )


def _gating(shape: tuple[int, int, int], dtype: torch.dtype) -> BenchCase:
    b, s, c = shape

    def fused(z, **others) -> Tensor:
        u, v = z.chunk(2, dim=-1)
        return token_linear(v, **others, norm="layer", eps=1e-5, gate=u)

    def specified(z, **others) -> Tensor:
        u, v = z.chunk(2, dim=-1)
        return reference.token_linear(v, **others, norm="layer", eps=1e-5, gate=u)

    return _case(
        f"token_linear gMLP B{b} S{s} C{c}",
        (fused, specified),
        {"z": ((b, s, 2 * c), 1.0), **_linear_arguments(s), **_norm_arguments(c)},
        dtype,
        elements=b * s * c,
        gates=b * s * c,
        weights=s * s,
        flops=2 * b * s * s * c,
        peers=(
            Provider("eager, transposes", peers.gating_transposed),
            Provider("eager, products", peers.gating_products),
            Provider("timm", peers.gating_timm, missing("timm")),
            Provider("g-mlp-pytorch", peers.gating_lucidrains, missing("g_mlp_pytorch")),
            compiled("products", peers.gating_products),
        ),
        headline=shape == GATING,
    )


def _linear(shape: tuple[int, int, int], dtype: torch.dtype) -> BenchCase:
    b, s, c = shape
    return _case(
        f"token_linear plain B{b} S{s} C{c}",
        (token_linear, reference.token_linear),
        {"x": ((b, s, c), 1.0), **_linear_arguments(s)},
        dtype,
        elements=b * s * c,
        weights=s * s,
        flops=2 * b * s * s * c,
        peers=(
            Provider("eager, transposes", peers.linear_transposed),
            Provider("eager, products", peers.linear_products),
            compiled("products", peers.linear_products),
        ),
    )


# Of both

# Name → shape, and size of the random numbers.
Arguments = dict[str, tuple[tuple[int, ...], float]]


def _linear_arguments(tokens: int) -> Arguments:
    return {"weight": ((tokens, tokens), tokens**-0.5), "bias": ((tokens,), 0.1)}


def _norm_arguments(channels: int) -> Arguments:
    return {"norm_weight": ((channels,), 1.0), "norm_bias": ((channels,), 1.0)}


def _case(
    name: str,
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    arguments: Arguments,
    dtype: torch.dtype,
    *,
    elements: int,
    weights: int,
    flops: int,
    peers: tuple[Provider, ...],
    gates: int = 0,
    exps: dict[str, int] | None = None,
    headline: bool = False,
) -> BenchCase:
    """functions: ours and its reference; elements: of x and of y each; gates: of the gate; flops: of the forward."""

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def draw(shape, size):
            return size * torch.randn(shape, generator=generator, dtype=torch.float64)

        return {argument: draw(*how) for argument, how in arguments.items()}

    # Forward: read x, the gate and the weights, write y. Backward: read dy, x, the gate and the weights, write dx, the
    # gate's gradient and the weights'. The vectors are too small to count.
    forward_bytes = (2 * elements + gates + weights) * dtype.itemsize
    backward_bytes = (3 * elements + 2 * gates + 2 * weights) * dtype.itemsize
    ours, specified = functions
    # The first argument has a batch, whose samples are slices of their own.
    gradients = {argument: int(i == 0) for i, argument in enumerate(arguments)}
    return BenchCase(
        Case("token_mixing", name, ours, specified, make, independent=1, gradients=gradients),
        dtype,
        moved_bytes={FORWARD: forward_bytes, BOTH: forward_bytes + backward_bytes},
        # The backward has a product for each factor of a product of the forward.
        flops={FORWARD: flops, BOTH: 3 * flops},
        exps=exps or {},
        peers=peers,
        headline=headline,
        # PyTorch takes half a second and more for some of these on a CPU without products in bfloat16.
        full_only=dtype == torch.bfloat16 and not headline,
    )
