"""per_sample.grad_norms with what changes how a model runs: checkpoints, autocast, loss scales, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmix import per_sample
from fastmix.testing.per_sample import (
    RELATIVE_ERROR,
    Expected,
    SmallModel,
    check_norms,
    run_block,
    total_of,
    weighted_losses,
)

B, T, C = 3, 5, 4


def _input(batch=B):
    return torch.randn(batch, T, C)


# Checkpoints


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(C, C), SmallModel(), nn.Linear(2, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=self.use_reentrant)
        return self.last(x)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_checkpoint(use_reentrant, reduction):
    check_norms(Checkpointed(use_reentrant), (_input(),), reduction=reduction)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpointed_layer_that_is_used_twice(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(C, C)

        def forward(self, x):
            x = checkpoint(self.layer, self.layer(x).tanh(), use_reentrant=use_reentrant)
            return checkpoint(lambda x: self.layer(x).sin(), x, use_reentrant=use_reentrant)

    check_norms(Model(), (_input(),))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_autocast(dtype, scale):
    model, x = SmallModel(), _input()

    def losses(model, x):
        with torch.autocast("cpu", dtype=dtype, enabled=x.dtype != torch.float64):
            return weighted_losses(model, x)

    expected = Expected.of(model, (x,), losses, dtype=dtype)
    with per_sample.grad_norms(model, "sum", loss_scale=scale) as norms:
        (losses(model, x).sum() * scale).backward()
    expected.check_norms(norms)
    expected.check_grad(model, factor=scale)


def test_backward_inside_autocast():
    model, x = SmallModel(), _input()

    def losses(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return weighted_losses(model, x)

    expected = Expected.of(model, (x,), losses, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), per_sample.grad_norms(model) as norms:
        norms.backward(weighted_losses(model, x))
    expected.check_norms(norms)


def test_gradient_scaler():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with per_sample.grad_norms(model, loss_scale=512.0) as norms:
        scaler.scale(weighted_losses(model, x).mean()).backward()
    expected.check_norms(norms)
    scaler.unscale_(optimizer)
    expected.check_grad(model, "mean")


# Compiled models


def test_a_compiled_model():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    compiled = torch.compile(model, backend=backend)
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(compiled, x).sum().backward()
    expected.check_norms(norms)
    expected.check_grad(model)
    compiled(x)
    count = len(graphs)
    assert count > 0
    model.zero_grad()
    expected.check_norms(run_block(model, (x,)))
    compiled(x)
    assert len(graphs) == count  # the block discards nothing that was compiled


def test_a_block_of_the_compiled_model():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    norms = run_block(compiled, (x,))
    assert set(norms.per_parameter) == {f"_orig_mod.{name}" for name in expected.oracle}
    torch.testing.assert_close(norms.total.double(), total_of(expected.oracle), rtol=RELATIVE_ERROR, atol=0.0)
