"""What replacing layers makes of a whole model, against the bound that the layers' share of its time sets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmix.benchmarks.harness import difference_of_others


@dataclass(frozen=True)
class Part:
    """What accelerate() replaces: a module, or what it does up to its call of `until`, a module inside.

    x: an input; arguments: makes what else it is called with, which may depend on whether the model is accelerated.
    """

    module: nn.Module
    x: Tensor
    until: nn.Module | None = None
    arguments: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Model:
    """A model whose parts accelerate() replaces in place and restore() puts back.

    run is a forward, or with training a whole step, which must leave the model as it was (a learning rate of 0). It
    returns what has to be the same before and after.
    """

    run: Callable[[], Tensor]
    parts: Sequence[Part]
    accelerate: Callable[[], object]
    restore: Callable[[], object]
    training: bool = False


@dataclass(frozen=True)
class ModelCase:
    """label says exactly what is run."""

    op: str
    label: str
    make: Callable[[], Model]
    missing: str | None = None


def measure_model(model: Model, device: str, rounds: int) -> dict[str, Any]:
    """Times the model before and after, in turns; raises AssertionError if its output changes.

    The parts are timed in the model by hooks (layers_…_ms), in training also in its backward: from the gradient's
    arrival at a part's output to its leaving at the input. And they are timed alone, one after another, in training
    with the gradients of their input and parameters. What the rest of the model takes
    differs more from round to round than the parts take at all, and is the same code before and after, so the
    speed-up is that of the medians: (rest + parts before)/(rest + parts after). With the parts' share of the
    model's time and their ratio r alone, the whole can gain at most bound = 1/(1 − share·(1 − 1/r)); part_of_bound is
    the time saved over the time that the bound saves. before_ms and after_ms are medians of whole runs.
    """
    now = clock(device)
    with torch.set_grad_enabled(model.training):
        _check_outputs(model)
        whole, inside, alone = (np.empty((2, rounds)) for _ in range(3))
        for i in range(rounds):
            # Every second round the other way round, so that a drift of the machine's speed cancels.
            for accelerated in (0, 1) if i % 2 == 0 else (1, 0):
                (model.accelerate if accelerated else model.restore)()
                start = now()
                for part in model.parts:
                    _run_alone(part, model.training)
                alone[accelerated, i] = now() - start
                whole[accelerated, i], inside[accelerated, i] = _time_run(model, now)
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


class _Reached(Exception):
    """A part ends where another module begins."""


def _run_alone(part: Part, training: bool) -> None:
    x = part.x.detach().requires_grad_(training)
    y = _forward(part, x)
    if training:
        leaves = [x, *(parameter for parameter in part.module.parameters() if parameter.requires_grad)]
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)


def _forward(part: Part, x: Tensor) -> Tensor:
    if part.until is None:
        return part.module(x, **part.arguments())
    reached = []

    def stop(module, inputs):
        reached.append(inputs[0])
        raise _Reached

    with _attached([part.until.register_forward_pre_hook(stop)]), contextlib.suppress(_Reached):
        part.module(x, **part.arguments())
    return reached[0]


def _time_run(model: Model, now: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds of one run, and of the parts in it."""
    inside = 0.0

    def enter(*_):
        nonlocal inside
        inside -= now()

    def leave(*_):
        nonlocal inside
        inside += now()

    with _attached(hook for part in model.parts for hook in _hooks(part, enter, leave, model.training)):
        start = now()
        model.run()
        whole = now() - start
    return whole, inside


def _hooks(part: Part, enter: Callable, leave: Callable, training: bool) -> Iterator[Any]:
    module, until = part.module, part.until
    yield module.register_forward_pre_hook(enter)
    yield until.register_forward_pre_hook(leave) if until else module.register_forward_hook(leave)
    if training:
        yield until.register_full_backward_hook(enter) if until else module.register_full_backward_pre_hook(enter)
        yield module.register_full_backward_hook(leave)


@contextlib.contextmanager
def _attached(hooks) -> Iterator[None]:
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_outputs(model: Model) -> None:
    """Also the warm-up."""
    model.restore()
    expected = model.run()
    model.accelerate()
    if difference := difference_of_others(model.run(), expected):
        raise AssertionError(f"the model's output changes by {difference:.1%}")
