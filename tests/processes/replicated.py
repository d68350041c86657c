"""Checks of models in DistributedDataParallel, of noise, and of what is summed over the processes."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.distributed as dist
from common import (
    DDP_OPTIONS,
    MAX_NORM,
    SIZE,
    SPLITS,
    check,
    check_clipped,
    check_grads,
    check_norms,
    clip,
    draw,
    one_process,
    replicate,
    shard,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmix import per_sample
from fastmix.testing.per_sample import clipped_sum, per_sample_grads, total_of, weighted_losses


@check(*DDP_OPTIONS)
def ddp_norms(options: str) -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain, options)
    for _ in range(2):
        check_norms(model, plain, x, own)
    check_norms(model, plain, x, own, "sum")


@check()
def ddp_norms_of_the_inner_module() -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain)
    with per_sample.grad_norms(model.module, "sum") as norms:
        weighted_losses(model, x[own]).sum().backward()
    oracle = per_sample_grads(plain, (x,))
    torch.testing.assert_close(norms.total, total_of(oracle)[own])
    check_grads(model, {name: grad.sum(0) / SIZE for name, grad in oracle.items()})


@check(*DDP_OPTIONS)
def ddp_clipped(options: str) -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain, options)
    for _ in range(3):
        check_clipped(model, plain, x, own)
    check_clipped(model, plain, x, own, mode="per_layer")


@check(*DDP_OPTIONS)
def ddp_clipped_by_the_inner_module(options: str) -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain, options)
    expected = {name: grad / SIZE for name, grad in one_process(plain, x).items()}
    for block in (model, model.module):
        model.zero_grad()
        with per_sample.grad_norms(block):
            per_sample.clipped_backward(weighted_losses(model, x[own]), model.module, MAX_NORM)
        check_grads(model, expected)


@check(*DDP_OPTIONS)
def ddp_clipped_after_an_ordinary_forward(options: str) -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain, options)
    for _ in range(2):
        check_clipped(model, plain, x, own, block=False)


@check(*DDP_OPTIONS)
def ddp_an_empty_batch(options: str) -> None:
    for split in ("empty", "all"):
        plain, x, own = draw(split)
        model = replicate(plain, options)
        for block in (True, False):
            check_clipped(model, plain, x, own, block=block)


@check("plain", "views")
def ddp_accumulation(options: str) -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain, options)
    with model.no_sync():
        clip(model, x[own])
    clip(model, x[own].flip(1))
    both = [clipped_sum(per_sample_grads(plain, (each,)), MAX_NORM) for each in (x, x.flip(1))]
    check_grads(model, {name: (both[0][name] + both[1][name]) / SIZE for name in both[0]})


@check()
def ddp_a_communication_hook() -> None:
    plain, x, own = draw("unequal")
    model = replicate(plain)
    calls = []

    def hook(group, bucket):
        calls.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(SIZE), group=group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(dist.group.WORLD, hook)
    check_clipped(model, plain, x, own)
    assert calls


@check("unused", "static")
def ddp_outputs_of_many_kinds(options: str) -> None:
    """A tuple with constants and tensors without gradients, which DistributedDataParallel hands through its node."""

    class Many(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple:
            y = self.model(x)
            return 3, x.detach(), None, y, {"unused": y.exp()}

    plain, x, own = draw("unequal")
    model = replicate(Many(plain), options)
    oracle = per_sample_grads(plain, (x,))
    for _ in range(2):
        model.zero_grad()
        with per_sample.grad_norms(model):
            losses = weighted_losses(lambda x: model(x)[3], x[own])
            per_sample.clipped_backward(losses, model, MAX_NORM)
        expected = clipped_sum(oracle, MAX_NORM)
        check_grads(model, {f"model.{name}": grad / SIZE for name, grad in expected.items()})


class Branches(nn.Module):
    """Only one of two layers is used."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)])
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.out(self.branches[branch](x))


@check()
def ddp_other_parameters_on_each_process() -> None:
    """The gradient of a layer that one process alone uses is that process's; that of one that none uses stays None."""
    plain, x, own = draw("unequal", Branches())
    model = replicate(plain, "unused")
    for block in (True, False):
        model.zero_grad()
        with per_sample.grad_norms(model) if block else contextlib.nullcontext():
            losses = weighted_losses(lambda x: model(x, dist.get_rank()), x[own])
            per_sample.clipped_backward(losses, model, MAX_NORM)
        expected = _branches(plain, x)
        assert model.module.branches[2].weight.grad is None
        grads = {name: p.grad for name, p in model.module.named_parameters() if "branches.2" not in name}
        torch.testing.assert_close(grads, {name: expected[name] / SIZE for name in grads})


def _branches(plain: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The clipped sum where each process uses the branch of its own number."""
    total: dict[str, Tensor] = {}
    for branch, part in enumerate(x.split(SPLITS["unequal"])):
        grads = per_sample_grads(plain, (part,), lambda model, x, branch=branch: weighted_losses(model, x, branch))
        for name, grad in clipped_sum(grads, MAX_NORM).items():
            total[name] = total.get(name, 0) + grad
    return total


# Noise


def _generator() -> torch.Generator:
    """Another on each process."""
    return torch.Generator(torch.get_default_device()).manual_seed(dist.get_rank())


def _noise(model: nn.Module) -> dict[str, Tensor]:
    """What one process with the first one's generator adds, at a multiplier of 2."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * 2 * MAX_NORM
        for name, p in model.named_parameters()
    }


@check("plain", "static", "sharded")
def noise_once(kind: str) -> None:
    plain, x, own = draw("unequal")
    model = shard(plain) if kind == "sharded" else replicate(plain, kind)
    for _ in range(2):
        model.zero_grad()
        clip(model, x[own], noise_multiplier=2.0, generator=_generator())
        clipped = clipped_sum(per_sample_grads(plain, (x,)), MAX_NORM)
        noise = _noise(plain)
        check_grads(model, {name: (clipped[name] + noise[name]) / SIZE for name in clipped})


@check()
def noise_of_unused_parameters() -> None:
    plain, x, own = draw("unequal", Branches())
    model = replicate(plain, "unused")
    noise, expected = _noise(plain), _branches(plain, x)
    for times in (1, 2):  # into no gradient, then into those that are there
        with per_sample.grad_norms(model):
            losses = weighted_losses(lambda x: model(x, dist.get_rank()), x[own])
            options = {"noise_multiplier": 2.0, "generator": _generator()}
            per_sample.clipped_backward(losses, model, MAX_NORM, **options)
        check_grads(model, {name: times * (expected[name] + noise[name]) / SIZE for name in noise})


@check()
def noise_of_parameters_that_are_not_reduced() -> None:
    """Every process adds its own where a gradient stays its own."""
    plain, x, own = draw("unequal")
    inner = copy.deepcopy(plain)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["twice.bias"])
    model = DistributedDataParallel(inner)
    clip(model, x[own], noise_multiplier=2.0, generator=_generator())
    clipped = clipped_sum({name: grad[own] for name, grad in per_sample_grads(plain, (x,)).items()}, MAX_NORM)
    noise = _noise(plain)["twice.bias"]
    if dist.get_rank() == 1:  # whose only noise this is
        noise = torch.randn(noise.shape, generator=_generator(), dtype=noise.dtype) * 2 * MAX_NORM
    torch.testing.assert_close(inner.twice.bias.grad, clipped["twice.bias"] + noise)


# Statistics


@check("ddp", "sharded")
def noise_scale(kind: str) -> None:
    """That of the joined batch; of batches of unequal sizes, from its parts."""
    for split, reduction in (("equal", "mean"), ("equal", "sum"), ("unequal", "mean"), ("unequal", "sum")):
        plain, x, own = draw(split)
        model = replicate(plain) if kind == "ddp" else shard(plain)
        with per_sample.grad_norms(model, reduction, loss_scale=4.0) as norms:
            losses = weighted_losses(model, x[own])
            (4 * (losses.mean() if reduction == "mean" else losses.sum())).backward()
        actual = per_sample.gradient_noise_scale(norms, model)
        grads = torch.cat([grad.flatten(1) for grad in per_sample_grads(plain, (x,)).values()], dim=1)
        sizes = torch.tensor(SPLITS[split])
        weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        if reduction == "mean":
            weight = (1 / (SIZE * sizes.double())).repeat_interleave(sizes)
        mean_sq, norm_sq = grads.square().sum(1).mean(), (weight @ grads).square().sum()
        part = weight.square().sum()
        trace, signal = (mean_sq - norm_sq) / (1 - part), (norm_sq - part * mean_sq) / (1 - part)
        torch.testing.assert_close(actual, trace / signal)
        if split == "equal":
            with per_sample.grad_norms(plain) as norms:
                weighted_losses(plain, x).mean().backward()
            torch.testing.assert_close(actual, per_sample.gradient_noise_scale(norms, plain))
