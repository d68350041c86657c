"""What every process of test_per_sample_distributed.py runs: checks against one process that has all samples."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastmix import per_sample
from fastmix.testing.per_sample import SmallModel, clipped_sum, per_sample_grads, total_of, weighted_losses

SIZE = 2  # processes
MAX_NORM = 3.0
SPLITS = {"unequal": (2, 3), "equal": (2, 2), "empty": (0, 3), "all": (3, 0)}  # samples of each process
DDP_OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}
CHECKS: dict[str, Callable[[], None]] = {}


def check(*args):
    """Lists the function, with each of these arguments."""

    def add(function: Callable) -> Callable:
        name = function.__name__
        CHECKS.update({f"{name}-{arg}": functools.partial(function, arg) for arg in args} or {name: function})
        return function

    return add


def run_checks(rank: int, folder: Path, device: str) -> None:
    """Every check until one fails, after which the processes are not at the same place; the outcome is in `folder`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new tensors with NaN
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(device)
    options = {"rank": rank, "world_size": SIZE, "timeout": timedelta(seconds=20)}
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=(folder / "rendezvous").as_uri(), **options)
    outcome = dict.fromkeys(CHECKS, "it was not run")
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
        except BaseException:
            outcome[name] = traceback.format_exc()
            break
        outcome[name] = ""
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


# Models, batches, and what one process computes from all samples


class Model(nn.Module):
    """[B, T, 4] to [B, T, 2], with a computed weight, a layer that is used twice, and sizes that 2 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.small = SmallModel()
        self.down, self.up = nn.Parameter(torch.randn(1, 2)), nn.Parameter(torch.randn(3, 1))
        self.twice = nn.Linear(3, 3)
        self.block = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        x = self.small(x) @ (self.up @ self.down).t()
        return self.block(self.twice(self.twice(x).tanh()).tanh())


def mesh(*shape: int):
    names = ("replicas", "shards")[-len(shape or (SIZE,)) :]
    return init_device_mesh(torch.get_default_device().type, shape or (SIZE,), mesh_dim_names=names)


def draw(split: str, model: nn.Module | None = None) -> tuple[nn.Module, Tensor, slice]:
    """A float64 model, all samples, and which are this process's."""
    model = Model() if model is None else model
    sizes = SPLITS[split]
    start = sum(sizes[: dist.get_rank()])
    x = torch.randn(sum(sizes), 5, 4, dtype=torch.float64)
    return model.double(), x, slice(start, start + sizes[dist.get_rank()])


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """Those of all trainable parameters, whole, and named as in the model without DistributedDataParallel."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            found[name.removeprefix("module.")] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


def check_grads(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = grads_of(model)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def check_norms(model: nn.Module, plain: nn.Module, x: Tensor, own: slice, reduction: str = "mean") -> None:
    """Norms of this process's samples, and the gradients that PyTorch makes of the processes' losses."""
    oracle = per_sample_grads(plain, (x,))
    model.zero_grad()
    with per_sample.grad_norms(model, reduction) as norms:
        losses = weighted_losses(model, x[own])
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
    torch.testing.assert_close(norms.total, total_of(oracle)[own])
    for name, norm in norms.per_parameter.items():
        torch.testing.assert_close(norm, oracle[name.removeprefix("module.")].flatten(1).norm(dim=1)[own])
    sizes = torch.tensor([float(own.stop - own.start)], dtype=torch.float64)
    scales = [torch.zeros_like(sizes) for _ in range(SIZE)]
    dist.all_gather(scales, sizes)
    weight = torch.cat([scale.expand(int(scale)) for scale in scales])
    weight = 1 / weight if reduction == "mean" else torch.ones_like(weight)
    check_grads(model, {name: torch.tensordot(weight, grad, 1) / SIZE for name, grad in oracle.items()})


def check_clipped(
    model: nn.Module, plain: nn.Module, x: Tensor, own: slice, *, block: bool = True, mode: str = "global", times=1
) -> None:
    oracle = per_sample_grads(plain, (x,))
    weight = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    model.zero_grad()
    for _ in range(times):
        with per_sample.grad_norms(model) if block else contextlib.nullcontext():
            losses = weighted_losses(model, x[own])
            norms = per_sample.clipped_backward(losses, model, MAX_NORM, mode=mode, sample_weight=weight[own])
    torch.testing.assert_close(norms.total, total_of(oracle)[own])
    group = (lambda name: "") if mode == "global" else lambda name: name.rpartition(".")[0]
    expected = clipped_sum(oracle, MAX_NORM, group, weight)
    check_grads(model, {name: grad * times / SIZE for name, grad in expected.items()})


def replicate(model: nn.Module, options: str = "plain", **more) -> DistributedDataParallel:
    return DistributedDataParallel(copy.deepcopy(model), **DDP_OPTIONS[options], **more)


def one_process(plain: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return clipped_sum(per_sample_grads(plain, (x,)), MAX_NORM)


def clip(model: nn.Module, *args, **options) -> per_sample.GradNorms:
    with per_sample.grad_norms(model):
        return per_sample.clipped_backward(weighted_losses(model, *args), model, MAX_NORM, **options)


def shard(model: nn.Module, modules: tuple[str, ...] = ("small", "block"), **options) -> nn.Module:
    model = copy.deepcopy(model)
    options.setdefault("mesh", mesh())
    for name in modules:
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)
