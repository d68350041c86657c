"""What fastmix.per_sample refuses, and that it says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmix import per_sample
from fastmix.testing.per_sample import Expected, weighted_losses

B, C = 3, 4


def _model():
    return nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, 2))


def _x(batch=B):
    return torch.randn(batch, C)


# The block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_reduction": "none"}, "loss_reduction must be one of 'mean', 'sum', got 'none'"),
        ({"loss_scale": 0.0}, "loss_scale must be positive, got 0.0"),
        ({"loss_scale": -1.0}, "loss_scale must be positive, got -1.0"),
        ({"loss_scale": float("nan")}, "loss_scale must be positive, got nan"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message), per_sample.grad_norms(_model(), **options):
        pass


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        per_sample.grad_norms(lambda x: x).__enter__()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(C, 2).requires_grad_(False)], ids=["none", "frozen"])
def test_no_trainable_parameter(model):
    with pytest.raises(ValueError, match="parameter that requires a gradient"), per_sample.grad_norms(model):
        pass


def test_nested_blocks_of_one_model():
    model = _model()
    x = _x()
    with per_sample.grad_norms(model) as norms:
        with pytest.raises(RuntimeError, match="nest"), per_sample.grad_norms(model):
            pass
        with pytest.raises(RuntimeError, match="nest"), per_sample.grad_norms(model[0]):
            pass
        norms.backward(weighted_losses(model, x))  # the outer one goes on
    Expected.of(model, (x,)).check_norms(norms)


@pytest.mark.parametrize("name", ["total", "squared", "per_parameter", "methods"])
def test_norms_before_a_backward(name):
    model = _model()
    with per_sample.grad_norms(model) as norms:
        weighted_losses(model, _x())
        with pytest.raises(RuntimeError, match="backward"):
            getattr(norms, name)
    with pytest.raises(RuntimeError, match="backward"):
        getattr(norms, name)


def test_a_second_backward():
    model, x = _model(), _x()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(model, x).sum().backward()
        losses = weighted_losses(model, x)
        with pytest.raises(RuntimeError, match=r"second backward.*accumulate=True"):
            losses.sum().backward()
        with pytest.raises(RuntimeError, match=r"second backward.*accumulate=True"):
            norms.backward(losses)
    expected.check_norms(norms)
    expected.check_grad(model)  # nothing was added


def test_a_backward_after_the_block():
    model = _model()
    with per_sample.grad_norms(model) as norms:
        losses = weighted_losses(model, _x())
    with pytest.raises(RuntimeError, match="block"):
        norms.backward(losses)
    with pytest.raises(RuntimeError, match="block"):
        losses.mean().backward()


def test_a_forward_before_the_block():
    model = _model()
    loss = weighted_losses(model, _x()).mean()
    with per_sample.grad_norms(model), pytest.raises(RuntimeError, match="block"):
        loss.backward()


def test_create_graph():
    model = _model()
    with per_sample.grad_norms(model), pytest.raises(RuntimeError, match="create_graph"):
        weighted_losses(model, _x()).mean().backward(create_graph=True)
    with per_sample.grad_norms(model), pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(weighted_losses(model, _x()).mean(), list(model.parameters()), create_graph=True)


def test_retain_graph_is_needed_for_a_second_backward():
    model = _model()
    with per_sample.grad_norms(model, accumulate=True):
        loss = weighted_losses(model, _x()).mean()
        loss.backward()
        with pytest.raises(RuntimeError, match="retain_graph"):
            loss.backward()


# The batch


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.function, self.a, self.b = forward, nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)[:2]),
        lambda m, x: m.b(torch.cat([m.a(x), x])),
        lambda m, x: m.b(m.a(x).sum(0)),
        lambda m, x: m.b(m.a(x).mean(0, keepdim=True)),
        lambda m, x: m.b(m.a(x)[0]),
    ],
    ids=["half", "double", "summed", "mean", "one"],
)
def test_a_layer_with_another_batch(forward):
    model = Model(forward)
    with per_sample.grad_norms(model), pytest.raises(ValueError, match=r"'b\.(weight|bias)'.*3 samples"):
        model(_x())


def test_no_batch_dimension():
    model = _model()
    with per_sample.grad_norms(model), pytest.raises(ValueError, match="batch"):  # noqa: PT012
        output = model(torch.randn(C))
        output.sum().backward()


@pytest.mark.parametrize("sizes", [(B, 5), (5, 5)], ids=["3 of 5 positions", "5 of 5"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(8, 6),
        lambda: nn.GRU(8, 6),
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0),
        lambda: Attention(8, 2),
    ],
    ids=["LSTM", "GRU", "encoder layer", "attention"],
)
def test_a_layer_that_takes_positions_first(make, sizes):
    """Given [B, T, C], a layer without batch_first=True mixes the samples."""
    model, x = make(), torch.randn(*sizes, 8)
    with per_sample.grad_norms(model), pytest.raises(ValueError, match="batch"):
        model(x)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


# The losses


LOSSES = [
    (lambda losses: losses[:2], r"\[B\] = \[3\].*got \[2\]"),
    (lambda losses: torch.cat([losses, losses]), r"\[B\] = \[3\].*got \[6\]"),
    (lambda losses: losses[:, None], r"\[B\] = \[3\].*got \[3, 1\]"),
    (lambda losses: losses.mean(), r"\[B\] = \[3\].*got \[\]"),
    (lambda losses: losses.detach(), "without a graph"),
]
LOSSES = pytest.mark.parametrize(("change", "message"), LOSSES, ids=["short", "long", "column", "scalar", "detached"])


@LOSSES
def test_losses_of_a_block(change, message):
    model = _model()
    with per_sample.grad_norms(model) as norms:
        losses = change(weighted_losses(model, _x()))
        with pytest.raises(ValueError, match=message):
            norms.backward(losses)


@LOSSES
def test_losses_to_clip(change, message):
    model = _model()
    with per_sample.grad_norms(model):
        losses = change(weighted_losses(model, _x()))
    if message == "without a graph":
        with pytest.raises(ValueError, match=message):
            per_sample.clipped_backward(losses, model, 1.0)
    else:
        with pytest.raises(ValueError, match=message):
            per_sample.clipped_backward(losses, model, 1.0)
        with pytest.raises(ValueError, match=message):
            per_sample.gram(model, losses)


@pytest.mark.parametrize("losses", [1.0, [1.0, 2.0], None])
def test_losses_that_are_no_tensor(losses):
    model = _model()
    with per_sample.grad_norms(model) as norms:
        model(_x())
        with pytest.raises(TypeError, match="per_sample_losses must be a Tensor"):
            norms.backward(losses)
    with pytest.raises(TypeError, match="per_sample_losses must be a Tensor"):
        per_sample.clipped_backward(losses, model, 1.0)
    with pytest.raises(TypeError, match="per_sample_losses must be a Tensor"):
        per_sample.gram(model, losses)


def test_losses_of_another_model():
    model, other = _model(), _model()
    with per_sample.grad_norms(other):
        losses = weighted_losses(other, _x())
    with pytest.raises((ValueError, RuntimeError), match=r"model|parameter|block"):
        per_sample.clipped_backward(losses, model, 1.0)


# Clipping, Gram matrices, statistics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, "max_norm must be positive, got 0.0"),
        ({"max_norm": float("nan")}, "max_norm must be positive, got nan"),
        ({"mode": "layer"}, "mode must be one of 'global', 'per_layer', got 'layer'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be .*, got -1.0"),
        ({"noise_multiplier": 1.0, "max_norm": float("inf")}, "max_norm must be finite"),
        ({"sample_weight": torch.ones(2)}, r"sample_weight must be \[B\] = \[3\], got \[2\]"),
    ],
)
def test_arguments_of_clipping(options, message):
    model = _model()
    with per_sample.grad_norms(model):
        losses = weighted_losses(model, _x())
    with pytest.raises(ValueError, match=message):
        per_sample.clipped_backward(losses, model, **{"max_norm": 1.0} | options)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clipping_a_frozen_model():
    model = _model()
    losses = weighted_losses(model, _x())
    with pytest.raises(ValueError, match="parameter that requires a gradient"):
        per_sample.clipped_backward(losses, model.requires_grad_(False), 1.0)


def test_gram_of_an_ordinary_forward():
    model = _model()
    with pytest.raises(ValueError, match="grad_norms block"):
        per_sample.gram(model, weighted_losses(model, _x()))


def test_statistics_of_other_things():
    model = _model()
    with pytest.raises(TypeError, match="norms must be GradNorms, got Tensor"):
        per_sample.importance_weights(torch.ones(3))
    with pytest.raises(TypeError, match="norms must be RecordedNorms, got Tensor"):
        per_sample.gradient_noise_scale(torch.ones(3), model)


def test_noise_scale_of_what_has_none():
    model = _model()
    with per_sample.grad_norms(model) as norms:
        norms.backward(weighted_losses(model, _x(1)))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        per_sample.gradient_noise_scale(norms, model)
    with per_sample.grad_norms(model) as norms:
        norms.backward(weighted_losses(model, _x()))
    model.zero_grad()
    with pytest.raises(ValueError, match="got none"):
        per_sample.gradient_noise_scale(norms, model)
    with per_sample.grad_norms(model, accumulate=True) as norms:
        for _ in range(2):
            norms.backward(weighted_losses(model, _x()))
    with pytest.raises(ValueError, match="one backward, got 2"):
        per_sample.gradient_noise_scale(norms, model)
