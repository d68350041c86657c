"""What the benchmark of a whole model says: the replaced parts' share of its time, the bound, the part reached."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastmix.benchmarks import attention_models, models
from fastmix.benchmarks.models import Model, Part


class _Timed(torch.autograd.Function):
    """Takes so many milliseconds of the state's clock, and as many again in the backward."""

    @staticmethod
    def forward(ctx, x, spend):
        ctx.spend = spend
        spend()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.spend()
        return grad, None


class _Layer(torch.nn.Module):
    def __init__(self, spend):
        super().__init__()
        self.spend = spend

    def forward(self, x):
        return _Timed.apply(x, self.spend)


class _Block(torch.nn.Module):
    """Two halves, the first of which is replaced: it ends where the second is called."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = _Layer(first), _Layer(second)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_bound(half, training, monkeypatch):
    """Layers of 20 of 100 ms become twice as fast alone, so at most 1/0.9; in the model they save 5 of the 10 ms."""
    state = SimpleNamespace(fast=False, alone=True, now=0.0)

    def spend_layer():
        state.now += (10.0 if state.alone else 15.0) if state.fast else 20.0

    def spend_rest():
        state.now += 80.0

    def run():
        state.alone = False
        x = torch.ones(3, requires_grad=training)
        y = rest(layer(x))
        if training:
            (y,) = torch.autograd.grad(y.sum(), x)
        state.alone = True
        return y

    layer = _Block(spend_layer, spend_rest) if half else _Layer(spend_layer)
    rest = torch.nn.Identity() if half else _Layer(spend_rest)
    model = Model(
        run=run,
        parts=[Part(layer, torch.ones(3), layer.second if half else None)],
        accelerate=lambda: setattr(state, "fast", True),
        restore=lambda: setattr(state, "fast", False),
        training=training,
    )
    monkeypatch.setattr(models, "clock", lambda device: lambda: state.now)
    figures = models.measure_model(model, "cpu", rounds=5)
    times = 2 if training else 1
    assert figures["before_ms"] == pytest.approx(100 * times)
    assert figures["layers_after_ms"] == pytest.approx(15 * times)
    assert figures["share"] == pytest.approx(0.2)
    assert figures["layer_ratio"] == pytest.approx(2)
    assert figures["bound"] == pytest.approx(1 / 0.9)
    assert figures["speedup"] == pytest.approx(100 / 95)
    assert figures["part_of_bound"] == pytest.approx(0.5)
    assert not layer._forward_pre_hooks
    assert not layer._backward_hooks


def test_a_changed_output_is_no_result():
    state = SimpleNamespace(fast=False)
    model = Model(
        run=lambda: torch.full((3,), 2.0 if state.fast else 1.0),
        parts=[],
        accelerate=lambda: setattr(state, "fast", True),
        restore=lambda: setattr(state, "fast", False),
    )
    with pytest.raises(AssertionError, match=r"output changes by 100\.0%"):
        models.measure_model(model, "cpu", rounds=5)


def test_sentence_encoder():
    """Trained weights on a padded batch; its layers run alone under the model's mask."""
    if missing := attention_models.cases("cpu", full=False)[0].missing:
        pytest.skip(missing)
    model = attention_models.sentence_encoder(3, "cpu")
    assert len(model.parts) == 6
    masks = []
    for change in (model.restore, model.accelerate):
        change()
        masks.append(model.parts[0].arguments()["attention_mask"])
    assert type(masks[0]) is torch.Tensor
    assert torch.equal(masks[1] & True, masks[0])
    assert not masks[0].all()
    figures = models.measure_model(model, "cpu", rounds=1)
    assert 0 < figures["share"] < 1
