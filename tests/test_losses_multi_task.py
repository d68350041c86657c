"""MultiTaskLoss: weights against autograd, invariances, state, two processes, errors."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastmix.losses import MultiTaskLoss
from fastmix.losses.multi_task import KINDS

PRIOR = [0.5, 2.0, 1.0]
POSITIVE = ("initial", "realtime", "generalized_mean")


class _Model(nn.Module):
    """Three tasks of different sizes on a shared layer."""

    def __init__(self):
        super().__init__()
        self.shared, self.heads = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.shared(x).tanh()).square().mean(0) * torch.tensor([1.0, 30.0, 0.01]) + 0.2


def _loss(kind: str, model: _Model, **named) -> MultiTaskLoss:
    named |= {"prior": PRIOR} if kind == "prior" else {}
    named |= {"shared_parameters": model.shared.parameters()} if kind == "gradient_norm" else {}
    return MultiTaskLoss(3, kind, **named)


def _setting() -> tuple[_Model, torch.Tensor]:
    return _Model(), torch.randn(6, 4).double()


def _grads(value: torch.Tensor, model: _Model) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


# Weights


def _expected(kind: str, losses: torch.Tensor, model: _Model) -> torch.Tensor:
    """A scalar with the gradient that the weighted sum must have, written without detached weights where it can be."""
    if kind == "initial":
        return (losses / losses.detach()).sum()
    if kind == "prior":
        return (losses / torch.tensor(PRIOR)).sum()
    if kind == "realtime":
        return losses.log().sum()
    if kind == "generalized_mean":
        return losses.log().mean().exp()
    shared = list(model.shared.parameters())
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    norms = [math.sqrt(sum(g.square().sum() for g in of_loss)) for of_loss in grads]
    return sum(loss / norm for loss, norm in zip(losses, norms, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_weights(kind):
    model, x = _setting()
    mtl, losses = _loss(kind, model), model(x)
    value = mtl(losses)
    expected = _grads(_expected(kind, losses, model), model)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if kind == "prior" else {}  # float32 weights
    torch.testing.assert_close(_grads(value, model), expected, **tolerance)
    torch.testing.assert_close(value.detach(), (mtl.weights.double() * losses).sum().detach(), rtol=1e-6, atol=0)
    assert mtl.weights.shape == (3,)
    assert not mtl.weights.requires_grad


@pytest.mark.parametrize("gamma", [-300.0, -2.0, -1.0, -1e-3, 1e-12, 1e-3, 0.5, 1.0, 2.0, 300.0])
def test_generalized_mean(gamma):
    losses = torch.tensor([0.4, 30.0, 2.0, 7.0]).double().requires_grad_()
    value = MultiTaskLoss(4, "generalized_mean", gamma=gamma)(losses)
    if gamma == 1e-12:
        expected = losses.log().mean().exp()
    else:
        expected = ((gamma * losses.log()).logsumexp(0) / gamma - math.log(4) / gamma).exp()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, losses), torch.autograd.grad(expected, losses))


def test_limits_of_the_generalized_mean():
    """Huge powers and losses far apart stay numbers, in float32 too."""
    losses = torch.tensor([1e-20, 1.0, 1e20])
    for gamma, expected in ((1e4, 1e20 * 3**-1e-4), (-1e4, 1e-20 * 3**1e-4), (1.0, 1e20 / 3), (0.0, 1.0), (1e-10, 1.0)):
        mtl = MultiTaskLoss(3, "generalized_mean", gamma=gamma)
        torch.testing.assert_close(mtl(losses), torch.tensor(expected))
        assert mtl.weights.isfinite().all()


@pytest.mark.parametrize("kind", ["initial", "realtime", "gradient_norm"])
def test_a_scale_of_a_loss_changes_no_gradient(kind):
    model, x = _setting()
    losses = model(x)
    scaled = _loss(kind, model)(losses * torch.tensor([1e3, 0.1, 7.0]))
    torch.testing.assert_close(_grads(scaled, model), _grads(_loss(kind, model)(losses), model))


def test_a_constant_changes_no_gradient_under_gradient_norm():
    model, x = _setting()
    losses = model(x)
    moved = _loss("gradient_norm", model)(losses + torch.tensor([5.0, -100.0, 1e-3]))
    torch.testing.assert_close(_grads(moved, model), _grads(_loss("gradient_norm", model)(losses), model))


def test_initial_losses_are_averaged_while_warming_up():
    mtl = MultiTaskLoss(2, "initial", warmup_steps=3)
    steps = torch.tensor([[1.0, 4.0], [3.0, 8.0], [5.0, 0.5], [7.0, 9.0]])
    for i, losses in enumerate(steps):
        mtl(losses)
        torch.testing.assert_close(mtl.weights, 1 / steps[: min(i + 1, 3)].mean(0))


def test_a_loss_without_gradient_has_weight_0():
    model, x = _setting()
    losses = model(x)
    mtl = _loss("gradient_norm", model)
    mtl([losses[0], losses[1], 0 * losses[2]])
    assert (mtl.weights > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("of", [lambda m: m.shared.weight, lambda m: [m.shared.bias], lambda m: m.shared.parameters()])
def test_shared_parameters_are_one_or_several(of):
    model, x = _setting()
    mtl = MultiTaskLoss(3, "gradient_norm", shared_parameters=of(model))
    losses = model(x)
    mtl(losses).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(mtl.parameters()) == []
    wanted = of(model)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    for loss, weight in zip(model(x), mtl.weights, strict=True):
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, retain_graph=True)])
        torch.testing.assert_close(1 / weight, grads.norm().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    model, x = _setting()
    model.to(dtype)
    mtl = _loss(kind, model)
    value = mtl([loss.to(dtype) for loss in model(x.to(dtype))])
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    mtl([torch.ones((), dtype=torch.bfloat16), *model(x.to(dtype))[1:]]) if kind != "gradient_norm" else None


# Modes and state


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_uses_the_last_training_weights(kind):
    model, x = _setting()
    mtl = _loss(kind, model)
    mtl(model(x))
    weights, state = mtl.weights.clone(), copy.deepcopy(mtl.state_dict())
    mtl.eval()
    with torch.no_grad():
        other = model(2 * x)
        torch.testing.assert_close(mtl(other), (weights.double() * other).sum())
    torch.testing.assert_close(dict(mtl.state_dict()), dict(state))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    model, x = _setting()
    mtl = _loss(kind, model, **({"warmup_steps": 2} if kind == "initial" else {}))
    mtl(model(x))
    other = _loss(kind, model, **({"warmup_steps": 2} if kind == "initial" else {}))
    other.load_state_dict(mtl.state_dict())
    torch.testing.assert_close(other.weights, mtl.weights)
    for _ in range(2):
        assert torch.equal(other(model(3 * x)), mtl(model(3 * x)))


def test_no_grad_in_training_mode():
    model, x = _setting()
    with torch.no_grad():
        for kind in KINDS[:-1]:
            assert not _loss(kind, model)(model(x)).requires_grad


# Several processes


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = _setting()
    found = []
    for kind in KINDS:
        mtl = _loss(kind, model)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        if kind == "gradient_norm":
            mtl = MultiTaskLoss(3, kind, shared_parameters=parallel.module.shared.parameters())
        mtl(parallel(x[3 * rank : 3 * rank + 3])).backward()
        found.append([mtl.weights, *(p.grad for p in parallel.parameters())])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_weigh_as_one(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model, x = _setting()
    for i, kind in enumerate(KINDS):
        mtl = _loss(kind, model)
        model.zero_grad()
        mtl(model(x)).backward()
        for found in of_ranks:
            weights, *grads = found[i]
            torch.testing.assert_close(weights, mtl.weights)
            torch.testing.assert_close(grads, [p.grad for p in model.parameters()])


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "kind must be one of 'initial', .* got 'uncertainty'", {"kind": "uncertainty"}),
        (TypeError, "num_tasks must be an int, got float", {"num_tasks": 2.0}),
        (ValueError, "num_tasks must be at least 1, got 0", {"num_tasks": 0}),
        (ValueError, "warmup_steps must be at least 1, got 0", {"warmup_steps": 0}),
        (ValueError, "warmup_steps must be left out unless kind is 'initial', got kind 'realtime'",
         {"kind": "realtime", "warmup_steps": 3}),
        (TypeError, "gamma must be a float, got str", {"gamma": "0"}),
        (ValueError, "gamma must be finite, got inf", {"kind": "generalized_mean", "gamma": math.inf}),
        (ValueError, "gamma must be left out unless kind is 'generalized_mean'", {"gamma": 1.0}),
        (ValueError, "prior must be left out unless kind is 'prior'", {"prior": [1.0, 1.0]}),
        (ValueError, "prior must be given for kind 'prior', got None", {"kind": "prior"}),
        (ValueError, r"prior must be 2 numbers, one a task, got \[3\]", {"kind": "prior", "prior": [1, 1, 1]}),
        (ValueError, r"prior must be finite and positive, got \[1.0, 0.0\]", {"kind": "prior", "prior": [1, 0]}),
        (ValueError, r"prior must be finite and positive, got \[1.0, nan\]", {"kind": "prior", "prior": [1, math.nan]}),
        (ValueError, "shared_parameters must be left out unless", {"shared_parameters": [torch.ones(1)]}),
        (ValueError, "shared_parameters must be given for kind 'gradient_norm', got None", {"kind": "gradient_norm"}),
        (ValueError, "shared_parameters must be one or more parameters, got none",
         {"kind": "gradient_norm", "shared_parameters": []}),
        (TypeError, r"shared_parameters\[0\] must be a Tensor, got str",
         {"kind": "gradient_norm", "shared_parameters": ["weight"]}),
        (ValueError, r"shared_parameters\[0\] must require gradients",
         {"kind": "gradient_norm", "shared_parameters": torch.ones(2)}),
    ],
)  # fmt: skip
def test_errors_of_the_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        MultiTaskLoss(**({"num_tasks": 2} | arguments))


@pytest.mark.parametrize(
    ("error", "match", "losses"),
    [
        (ValueError, "losses must be 2, one a task, got 3", [torch.ones(())] * 3),
        (ValueError, r"losses must be \[n\] = \[2\], got \[3\]", torch.ones(3)),
        (ValueError, r"losses must be \[n\] = \[2\], got \[2, 1\]", torch.ones(2, 1)),
        (ValueError, r"losses\[1\] must be a scalar, got \[4\]", [torch.ones(()), torch.ones(4)]),
        (TypeError, r"losses\[0\] must be a Tensor, got float", [1.0, 2.0]),
        (TypeError, r"losses must be a Tensor or a sequence of them, got dict", {"a": 1, "b": 2}),
        (TypeError, "losses must be float32, .* got int64", torch.ones(2).long()),
        (ValueError, r"losses\[1\] must be on the device of losses\[0\], cpu, got meta",
         [torch.ones(()), torch.ones((), device="meta")]),
    ],
)  # fmt: skip
def test_errors_of_the_losses(error, match, losses):
    with pytest.raises(error, match=match):
        MultiTaskLoss(2, "realtime")(losses)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_make_no_weights(kind, wrong):
    model, x = _setting()
    mtl, losses = _loss(kind, model), model(x)
    losses = torch.cat([losses[:2], losses[2:] * 0 + wrong])
    if kind == "prior" or (kind not in POSITIVE and math.isfinite(wrong)):
        mtl(losses)
        return
    with pytest.raises(ValueError, match=f"losses must be finite.* for kind '{kind}', got"):
        mtl(losses)
    mtl(model(x))  # nothing of the failed step stays
    torch.testing.assert_close(mtl.weights, _fresh_weights(kind, model, x))


def _fresh_weights(kind: str, model: _Model, x: torch.Tensor) -> torch.Tensor:
    mtl = _loss(kind, model)
    mtl(model(x))
    return mtl.weights


def test_losses_that_do_not_depend_on_the_shared_parameters():
    model, x = _setting()
    mtl, losses = _loss("gradient_norm", model), model(x)
    with pytest.raises(ValueError, match=r"losses\[1\] must depend on shared_parameters, got one that does not"):
        mtl([losses[0], model.heads.bias.sum(), losses[2]])
    with pytest.raises(ValueError, match=r"losses\[0\] must depend on shared_parameters in training mode"):
        mtl(losses.detach())


if __name__ == "__main__":  # one of two processes
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
