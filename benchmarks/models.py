"""What replacing layers makes of a whole model, against the bound that the layers' share of its time sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmix.benchmarks.harness import PEER_TOLERANCE
from fastmix.benchmarks.limits import timer


@dataclass(frozen=True)
class Model:
    """A model, and the layers that accelerate() replaces in place and restore() puts back, callable alone."""

    forward: Callable[[], Tensor]
    layers: Callable[[], None]
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
    """Times the model and its layers alone, before and after, in turns; raises AssertionError if its output changes.

    Ratios are medians over the rounds of the ratios within a round. With the layers' share of the model's time and
    their own ratio r, the whole can gain at most bound = 1/(1 − share·(1 − 1/r)). part_of_bound is the time saved
    over the time that the bound saves; null where the rounds differ too much to tell, that is where
    speedup_error = (80th − 20th percentile)/√rounds is more than half of what there is to gain.
    """
    time_once = timer(device)
    _check_outputs(model)
    before, after, layers_before, layers_after = (np.empty(rounds) for _ in range(4))
    for i in range(rounds):
        # Every second round the other way round, so that a drift of the machine's speed cancels.
        for accelerated in (False, True) if i % 2 == 0 else (True, False):
            (model.accelerate if accelerated else model.restore)()
            whole, alone = (after, layers_after) if accelerated else (before, layers_before)
            alone[i], whole[i] = time_once(model.layers), time_once(model.forward)
    speedup = float(np.median(before / after))
    speedup_error = float(np.subtract(*np.percentile(before / after, (80, 20)))) / rounds**0.5
    share = float(np.median(layers_before / before))
    layer_ratio = float(np.median(layers_before / layers_after))
    bound = 1 / (1 - share * (1 - 1 / layer_ratio))
    return {
        "rounds": rounds,
        "before_ms": float(np.median(before)),
        "after_ms": float(np.median(after)),
        "layers_before_ms": float(np.median(layers_before)),
        "layers_after_ms": float(np.median(layers_after)),
        "share": share,
        "layer_ratio": layer_ratio,
        "speedup": speedup,
        "speedup_error": speedup_error,
        "bound": bound,
        "part_of_bound": (1 - 1 / speedup) / (1 - 1 / bound) if 2 * speedup_error <= bound - 1 else None,
    }


def _check_outputs(model: Model) -> None:
    """Also the warm-up."""
    model.restore()
    model.layers()
    expected = model.forward()
    model.accelerate()
    model.layers()
    difference = (model.forward() - expected).square().mean().sqrt()
    size = expected.square().mean().sqrt()
    if not difference <= PEER_TOLERANCE * size:
        raise AssertionError(f"the model's output changes by {float(difference / size):.1%}")
