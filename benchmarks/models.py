"""What replacing layers makes of a whole model, against the bound that the layers' share of its time sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmix.benchmarks.harness import PEER_TOLERANCE


@dataclass(frozen=True)
class Model:
    """A model, its layers that accelerate() replaces in place and restore() puts back, and inputs like theirs."""

    forward: Callable[[], Tensor]
    layers: Sequence[nn.Module]
    inputs: Sequence[Tensor]
    accelerate: Callable[[], object]
    restore: Callable[[], object]


@dataclass(frozen=True)
class ModelCase:
    """label says exactly what is run."""

    op: str
    label: str
    make: Callable[[], Model]
    missing: str | None = None


@torch.no_grad()
def measure_model(model: Model, device: str, rounds: int) -> dict[str, Any]:
    """Times the model before and after, in turns; raises AssertionError if its output changes.

    The layers are timed in the model (layers_…_ms) and alone, one after another. What the rest of the model takes
    differs more from round to round than the layers take at all, and is the same code before and after, so the
    speed-up is that of the medians: (rest + layers before)/(rest + layers after). With the layers' share of the
    model's time and their ratio r alone, the whole can gain at most bound = 1/(1 − share·(1 − 1/r)); part_of_bound is
    the time saved over the time that the bound saves. before_ms and after_ms are medians of whole forwards.
    """
    now = clock(device)
    _check_outputs(model)
    whole, inside, alone = (np.empty((2, rounds)) for _ in range(3))
    for i in range(rounds):
        # Every second round the other way round, so that a drift of the machine's speed cancels.
        for accelerated in (0, 1) if i % 2 == 0 else (1, 0):
            (model.accelerate if accelerated else model.restore)()
            start = now()
            for layer, x in zip(model.layers, model.inputs, strict=True):
                layer(x)
            alone[accelerated, i] = now() - start
            whole[accelerated, i], inside[accelerated, i] = _time_forward(model, now)
    rest = float(np.median(whole - inside))
    before, after = (float(value) for value in np.median(inside, axis=1))
    alone_before, alone_after = (float(value) for value in np.median(alone, axis=1))
    share, layer_ratio = before / (rest + before), alone_before / alone_after
    saved = share * (1 - 1 / layer_ratio)
    return {
        "rounds": rounds,
        "before_ms": float(np.median(whole[0])),
        "after_ms": float(np.median(whole[1])),
        "layers_before_ms": before,
        "layers_after_ms": after,
        "share": share,
        "layer_ratio": layer_ratio,
        "speedup": (rest + before) / (rest + after),
        "bound": 1 / (1 - saved),
        "part_of_bound": (before - after) / (rest + before) / saved,
    }


def clock(device: str) -> Callable[[], float]:
    """A function that returns milliseconds, once the device has done what it was given."""
    if device == "cuda":
        return lambda: torch.cuda.synchronize() or 1e3 * time.perf_counter()
    return lambda: 1e3 * time.perf_counter()


def _time_forward(model: Model, now: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds of one forward, and of the layers in it."""
    inside = 0.0

    def enter(layer, inputs):
        nonlocal inside
        inside -= now()

    def leave(layer, inputs, output):
        nonlocal inside
        inside += now()

    hooks = [layer.register_forward_pre_hook(enter) for layer in model.layers]
    hooks += [layer.register_forward_hook(leave) for layer in model.layers]
    start = now()
    model.forward()
    whole = now() - start
    for hook in hooks:
        hook.remove()
    return whole, inside


def _check_outputs(model: Model) -> None:
    """Also the warm-up."""
    model.restore()
    expected = model.forward()
    model.accelerate()
    difference = (model.forward() - expected).square().mean().sqrt()
    size = expected.square().mean().sqrt()
    if not difference <= PEER_TOLERANCE * size:
        raise AssertionError(f"the model's output changes by {float(difference / size):.1%}")
