"""What else finds norms, clipped sums and inner products of a model's per-sample gradients: Opacus, BackPACK, TorchJD,
vmap, a backward for each sample.

A way takes a model, which `prepare` has changed to its needs, and a batch. Norms are of L_i where the loss is their
mean, and come with that loss's gradients; clipped sums are Σ_i min(1, MAX_NORM/‖∇L_i‖)·∇L_i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fastmix import per_sample
from fastmix.benchmarks.grad_norm_models import Setting, losses
from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.peers import missing

MAX_NORM = 1.0
Tensors = tuple[Tensor, ...]
Grads = list[Tensor]


def on_setting(
    setting: Setting, run: Callable[..., Tensors], prepare: Callable[[nn.Module], Any] = lambda model: model
) -> Callable[..., Tensors]:
    """A case's function, of x, y and the parameters. A way keeps its model from one call to the next."""

    @functools.lru_cache(maxsize=1)
    def prepared(**parameters: Tensor) -> Any:
        return prepare(setting.model(parameters))

    def call(x: Tensor, y: Tensor, **parameters: Tensor) -> Tensors:
        with torch.enable_grad():
            return run(prepared(**parameters), x, y)

    return call


def norm_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    opacus = missing("opacus")
    return (
        Provider("plain step", at(plain), yardstick=True),
        Provider("opacus, ghost norms", at(opacus_ghost_norms, opacus_ghost), opacus),
        Provider("opacus, grad_sample", at(opacus_norms, opacus_samples), opacus),
        Provider("backpack, BatchL2Grad", at(backpack_norms, backpack_extended), missing("backpack")),
        Provider("vmap(grad)", at(vmap_norms)),
        Provider("batch-1 loop", at(loop_norms)),
    )


def clip_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    opacus = missing("opacus")
    return (
        Provider("plain step", at(plain), yardstick=True),
        Provider("opacus, ghost clipping", at(opacus_ghost_clip, opacus_ghost), opacus),
        Provider("opacus, grad_sample", at(opacus_clip, opacus_samples), opacus),
        Provider("vmap(grad)", at(vmap_clip)),
        Provider("batch-1 loop", at(loop_clip)),
    )


def gram_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    return (
        Provider("plain step", at(plain), yardstick=True),
        Provider("torchjd", at(torchjd_gram, torchjd_engine), missing("torchjd")),
        Provider("opacus, grad_sample", at(opacus_gram, opacus_samples), missing("opacus")),
        Provider("vmap(grad)", at(vmap_gram)),
        Provider("batch-1 loop", at(loop_gram)),
    )


# Ours, and an ordinary step


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    losses(model(x), y).mean().backward()
    return taken(model)


def our_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    with per_sample.grad_norms(model) as norms:
        losses(model(x), y).mean().backward()
    return norms.total, *taken(model)


def our_clip(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    with per_sample.grad_norms(model):
        per_sample.clipped_backward(losses(model(x), y), model, MAX_NORM)
    return taken(model)


def our_gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    with per_sample.grad_norms(model):
        return (per_sample.gram(model, losses(model(x), y)),)


# A backward for each sample: also the specification


def specified_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    """The gradients are an ordinary step's, with its roundings."""
    return loop_norms(model, x, y)[0], *plain(model, x, y)


def loop_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return norms_and_mean(*loop_grads(model, x, y))


def loop_clip(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return clipped_sum(*loop_grads(model, x, y))


def loop_gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return gram(*loop_grads(model, x, y))


def loop_grads(model: nn.Module, x: Tensor, y: Tensor) -> Grads:
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(losses(model(x[b : b + 1]), y[b : b + 1]), parameters) for b in range(len(x))]
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


# vmap


def vmap_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return norms_and_mean(*vmap_grads(model, x, y))


def vmap_clip(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return clipped_sum(*vmap_grads(model, x, y))


def vmap_gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return gram(*vmap_grads(model, x, y))


def vmap_grads(model: nn.Module, x: Tensor, y: Tensor) -> Grads:
    def loss(parameters, x, y):
        return losses(functional_call(model, parameters, (x[None],)), y[None])[0]

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y).values())


# Opacus


def opacus_ghost(model: nn.Module) -> nn.Module:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_NORM, loss_reduction="mean")


def opacus_ghost_norms(model, x: Tensor, y: Tensor) -> Tensors:
    losses(model(x), y).mean().backward()
    return model.get_norm_sample(), *taken(model)


def opacus_ghost_clip(model, x: Tensor, y: Tensor) -> Tensors:
    """As its DPLossFastGradientClipping: a backward for the norms, another for the weighted sum."""
    each = losses(model(x), y)
    each.mean().backward(retain_graph=True)
    weight = model.get_clipping_coef()
    taken(model)
    model.disable_hooks()
    (weight * each).sum().backward()
    model.enable_hooks()
    return taken(model)


def opacus_samples(model: nn.Module) -> nn.Module:
    from opacus import GradSampleModule

    return GradSampleModule(model, loss_reduction="mean")


def opacus_norms(model, x: Tensor, y: Tensor) -> Tensors:
    losses(model(x), y).mean().backward()
    return total_norms(*(parameter.grad_sample for parameter in model.parameters())), *taken(model)


def opacus_clip(model, x: Tensor, y: Tensor) -> Tensors:
    losses(model(x), y).mean().backward()
    return clipped_sum(*opacus_grads(model))


def opacus_gram(model, x: Tensor, y: Tensor) -> Tensors:
    losses(model(x), y).mean().backward()
    return gram(*opacus_grads(model))


def opacus_grads(model) -> Grads:
    grads = [parameter.grad_sample for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)  # resets grad_sample too
    return grads


# BackPACK and TorchJD


def backpack_extended(model: nn.Module) -> nn.Module:
    from backpack import extend

    return extend(model)


def backpack_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    from backpack import backpack, extensions

    with backpack(extensions.BatchL2Grad()):
        losses(model(x), y).mean().backward()
    squared = sum(parameter.batch_l2 for parameter in model.parameters())  # of the samples' parts of the mean
    return len(x) * squared.sqrt(), *taken(model)


def torchjd_engine(model: nn.Module) -> tuple[nn.Module, Any]:
    from torchjd.autogram import Engine

    return model, Engine(model, batch_dim=0)


def torchjd_gram(prepared: tuple[nn.Module, Any], x: Tensor, y: Tensor) -> Tensors:
    model, engine = prepared
    return (engine.compute_gramian(losses(model(x), y)),)


# Of per-sample gradients, one tensor [B, …] a parameter


def total_norms(*grads: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=_at_least_float32(g)) for g in grads]).norm(
        dim=0
    )


def norms_and_mean(*grads: Tensor) -> Tensors:
    return total_norms(*grads), *(g.mean(0) for g in grads)


def clipped_sum(*grads: Tensor) -> Tensors:
    weight = (MAX_NORM / total_norms(*grads)).clamp(max=1.0)
    return tuple(torch.tensordot(weight.to(g.dtype), g, 1) for g in grads)


def gram(*grads: Tensor) -> Tensors:
    return (sum(rows @ rows.t() for rows in (g.flatten(1).to(_at_least_float32(g)) for g in grads)),)


def taken(model: nn.Module) -> Tensors:
    """The gradients out of .grad."""
    grads = tuple(parameter.grad for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    return grads


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
