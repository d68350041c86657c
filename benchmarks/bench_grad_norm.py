"""Norms of per-sample gradients: of linear layers, and of whole models beside an ordinary step.

The limit of a whole model is the ordinary step, which the tables show as a yardstick: its time over ours is how much of
a step norms leave of it.
"""

from __future__ import annotations

import torch

from fastmix.benchmarks import grad_norm_peers as peers
from fastmix.benchmarks import penalty_peers as penalties
from fastmix.benchmarks import per_sample_peers as ways
from fastmix.benchmarks import private_peers as private
from fastmix.benchmarks.grad_norm_models import Setting, cnn_setting, lm_setting, mlp_setting
from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase, Provider
from fastmix.ops.grad_norm import choose
from fastmix.testing.cases import Case
from fastmix.testing.grad_norm import linear_case

# B, T, I, O
Shape = tuple[int, int, int, int]
SHAPES = ((8, 128, 512, 2048), (4, 512, 512, 2048), (2, 1024, 256, 1024), (64, 1, 1024, 1024))
GPU_SHAPES = ((8, 4096, 1024, 4096), (16, 1024, 1024, 4096), (64, 256, 1024, 4096), (512, 1, 4096, 4096))
GRAMS = ((32, 16, 512, 512), (16, 64, 256, 256), (64, 1, 1024, 1024))
GPU_GRAMS = ((64, 128, 1024, 4096), (256, 1, 4096, 4096))


def cases(device: str) -> list[BenchCase]:
    if device == "cuda":
        half = torch.bfloat16
        return [
            *(make(shape, half) for make in (_norm_sq, _weight_grad, _weight_grad_with_norm) for shape in GPU_SHAPES),
            *(_gram(shape, half) for shape in GPU_GRAMS),
            *(make(setting) for setting in _gpu_models() for make in (_norms, _clip, _private_step)),
        ]
    single = torch.float32
    return [
        *(make(shape, single) for make in (_norm_sq, _weight_grad, _weight_grad_with_norm) for shape in SHAPES),
        *(_gram(shape, single) for shape in GRAMS),
        *(_norms(setting) for setting in _models()),
        *(_clip(setting) for setting in _models()),
        *(_model_gram(setting) for setting in _gram_models()),
        *(_private_step(setting) for setting in _models()),
        *(_parameter_penalty(setting) for setting in (*_gram_models(), cnn_setting(64))),
        *(_input_norms(setting) for setting in (penalties.critic_setting(32, 32), penalties.critic_setting(32, 64))),
    ]


def _models() -> tuple[Setting, ...]:
    texts = (lm_setting(8, 128, 512), lm_setting(4, 512, 512), lm_setting(2, 1024, 256))
    return (*texts, mlp_setting(64, 1024), cnn_setting(64))


def _gpu_models() -> tuple[Setting, ...]:
    texts = (lm_setting(32, 256, 1024), lm_setting(4, 2048, 1024))
    return (*texts, mlp_setting(512, 4096), cnn_setting(512))


def _gram_models() -> tuple[Setting, ...]:
    return mlp_setting(64, 1024), mlp_setting(32, 512, 16), mlp_setting(16, 256, 64)


# Linear layers


def _norm_sq(shape: Shape, dtype: torch.dtype) -> BenchCase:
    b, t, i, o = shape
    # Gram form: half of the symmetric a aᵀ and g gᵀ of each sample; direct form: g aᵀ. The backward takes the fewer
    # operations of (g gᵀ) a, (a aᵀ) g with both squares whole, and of the gradient with a product each.
    gram = choose(t, i, o) == "gram"
    forward = b * t * t * (i + o) if gram else 2 * b * t * i * o
    backward = min(4 * b * t * t * (i + o), 6 * b * t * i * o)
    read = b * t * (i + o) * dtype.itemsize
    return BenchCase(
        linear_case("linear_grad_norm_sq", _name(shape), shape),
        dtype,
        moved_bytes={FORWARD: read, BOTH: 3 * read},
        flops={FORWARD: forward, BOTH: forward + backward},
        peers=(
            Provider("einsum, Gram form", peers.ghost_norm_sq),
            Provider("einsum, gradients", peers.materialised_norm_sq),
        ),
        headline=shape == SHAPES[0],
    )


def _weight_grad(shape: Shape, dtype: torch.dtype) -> BenchCase:
    """Of samples with weights, as clipping takes it."""
    weights = torch.linspace(0.1, 1.0, shape[0]).tolist()
    return BenchCase(
        linear_case("linear_weight_grad", _name(shape), shape, sample_weight=weights),
        dtype,
        **_weight_grad_limit(shape, dtype),
        peers=(Provider("mm of weighted gradients", peers.weight_grad),),
    )


def _weight_grad_with_norm(shape: Shape, dtype: torch.dtype) -> BenchCase:
    return BenchCase(
        linear_case("linear_weight_grad_with_norm", _name(shape), shape),
        dtype,
        **_weight_grad_limit(shape, dtype),
        peers=(
            Provider("mm, without norms", peers.weight_grad, yardstick=True),
            Provider("mm a sample", peers.looped_weight_grad),
            Provider("einsum, gradients", peers.materialised_weight_grad),
            Provider("mm; einsum, Gram form", peers.ghost_weight_grad),
        ),
        headline=shape in SHAPES,
    )


def _weight_grad_limit(shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    b, t, i, o = shape
    # Read the input and the gradient of the output, write dw in float32.
    moved_bytes = b * t * (i + o) * dtype.itemsize + 4 * i * o
    return {"moved_bytes": {FORWARD: moved_bytes}, "flops": {FORWARD: 2 * b * t * i * o}}


def _gram(shape: Shape, dtype: torch.dtype) -> BenchCase:
    b, t, i, o = shape
    # Half of a aᵀ and of g gᵀ over all samples' positions; or each sample's gradient, and half of their products.
    flops = min((b * t) ** 2 * (i + o), b * (2 * t + b) * i * o)
    return BenchCase(
        linear_case("linear_grad_gram", _name(shape), shape),
        dtype,
        moved_bytes={FORWARD: b * t * (i + o) * dtype.itemsize},
        flops={FORWARD: flops},
        peers=(
            Provider("einsum, gradients", peers.materialised_gram),
            Provider("mm, pairs of positions", peers.pairwise_gram),
        ),
    )


def _name(shape: Shape) -> str:
    return " ".join(f"{letter}{size}" for letter, size in zip("BTIO", shape, strict=True))


# Whole models


def _norms(setting: Setting) -> BenchCase:
    return _model_case("grad_norms", setting, ways.our_norms, ways.specified_norms, ways.norm_peers(setting))


def _clip(setting: Setting) -> BenchCase:
    return _model_case("clipped_backward", setting, ways.our_clip, ways.loop_clip, ways.clip_peers(setting))


def _model_gram(setting: Setting) -> BenchCase:
    return _model_case("gram", setting, ways.our_gram, ways.loop_gram, ways.gram_peers(setting))


def _private_step(setting: Setting) -> BenchCase:
    run = private.private_step, private.ours
    return _model_case("private step", setting, run, private.loop_step, private.private_step_peers(setting))


def _parameter_penalty(setting: Setting) -> BenchCase:
    run, reference = penalties.our_parameter_penalty, penalties.loop_parameter_penalty
    return _model_case(
        "parameter_gradient_penalty", setting, run, reference, penalties.parameter_penalty_peers(setting)
    )


def _input_norms(setting: Setting) -> BenchCase:
    run, reference = penalties.our_input_norms, penalties.loop_input_norms
    return _model_case("input_gradient_norms", setting, run, reference, penalties.input_norm_peers(setting))


def _model_case(function: str, setting: Setting, ours, specified, peers: tuple[Provider, ...]) -> BenchCase:
    """A step of the model from its input to all results; no number of operations is the problem's, so no limit.

    `ours` may be a pair, with what prepares the model.
    """
    run = ways.on_setting(setting, *(ours if isinstance(ours, tuple) else (ours,)))
    reference = ways.on_setting(setting, specified)
    return BenchCase(
        Case("grad_norm", f"{function} {setting.name}", run, reference, setting.inputs),
        torch.float32,
        moved_bytes={},
        flops={},
        peers=peers,
        headline=True,
    )
