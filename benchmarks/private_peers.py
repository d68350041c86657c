"""A step of differentially private training as Opacus' users write it: forward, clipped gradients, optimizer.

Without noise, which costs all of them the same, and with a learning rate of 0, so that a step can be repeated. A way
returns the gradient that the optimizer took: Σ_i min(1, MAX_NORM/(‖∇L_i‖ + 1e-6))·∇L_i, which is Opacus' formula.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastmix.benchmarks.grad_norm_models import Setting, losses
from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.peers import missing
from fastmix.benchmarks.per_sample_peers import MAX_NORM, Tensors, loop_grads, on_setting, taken, total_norms


def private_step_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    opacus = missing("opacus")
    return (
        Provider("plain step", at(plain_step, with_optimizer), yardstick=True),
        Provider("opacus, ghost clipping", at(private_step, ghost), opacus),
        Provider("opacus, grad_sample", at(private_step, hooks), opacus),
    )


def loop_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    """The specification."""
    grads = loop_grads(model, x, y)
    weight = (MAX_NORM / (total_norms(*grads) + 1e-6)).clamp(max=1.0)
    return tuple(torch.tensordot(weight, g, 1) for g in grads)


def with_optimizer(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def plain_step(prepared: tuple[nn.Module, torch.optim.Optimizer], x: Tensor, y: Tensor) -> Tensors:
    model, optimizer = prepared
    optimizer.zero_grad()
    losses(model(x), y).mean().backward()
    optimizer.step()
    return taken(model)


class Losses:
    """The losses of the settings' models, as Opacus takes a criterion."""

    reduction = "sum"

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        each = losses(output, y)
        return each.sum() if self.reduction == "sum" else each


_OPTIONS = {"max_grad_norm": MAX_NORM, "loss_reduction": "sum"}
_NOISE = {"noise_multiplier": 0.0, "expected_batch_size": None}


def ghost(model: nn.Module) -> tuple[nn.Module, Any, Any]:
    """What make_private returns for grad_sample_mode="ghost": model, optimizer, criterion."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    module = GradSampleModuleFastGradientClipping(model, **_OPTIONS)
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(module.parameters(), lr=0.0), **_OPTIONS, **_NOISE)
    return module, optimizer, DPLossFastGradientClipping(module, optimizer, Losses(), "sum")


def hooks(model: nn.Module) -> tuple[nn.Module, Any, Any]:
    """What make_private returns for grad_sample_mode="hooks", and a criterion."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(torch.optim.SGD(module.parameters(), lr=0.0), **_OPTIONS, **_NOISE)
    return module, optimizer, Losses()


def ours(model: nn.Module) -> tuple[nn.Module, Any, Any]:
    from fastmix.integrations.opacus import accelerate

    prepared = ghost(model)
    accelerate(prepared[1])
    return prepared


def private_step(prepared: tuple[nn.Module, Any, Any], x: Tensor, y: Tensor) -> Tensors:
    model, optimizer, criterion = prepared
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return taken(model)
