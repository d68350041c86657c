"""Where per-sample norms are silently wrong elsewhere, one test each, and what must raise instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix import per_sample
from fastmix.testing.per_sample import (
    RELATIVE_ERROR,
    Expected,
    ModelCase,
    check_case,
    check_norms,
    per_sample_grads,
    total_of,
    weighted_losses,
)

B, T, C = 3, 5, 4


# Cancellation


def _constant_activations(dtype, positions, channels, outputs):
    """x near 100, and factors k of the output that sum to 0 over the positions: dW_b = Σ k_t (x_t − 100)ᵀ."""
    x = 100 + torch.randint(-1, 2, (B, positions, channels)) / 2  # what bfloat16 holds there
    k = torch.randint(1, 8, (B, positions // 2, outputs)).to(torch.float32)
    k = torch.cat([k, -k], dim=1)

    def losses(model, x, k):
        return (model(x).to(k.dtype) * k).flatten(1).sum(1)

    return nn.Linear(channels, outputs).to(dtype), (x.to(dtype), k), losses


SIZES = pytest.mark.parametrize("sizes", [(4, 16, 16), (64, 3, 2)], ids=["short", "long"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@SIZES
@DTYPES
def test_no_norm_is_lost_to_cancellation(dtype, sizes):
    model, inputs, losses = _constant_activations(dtype, *sizes)
    double = (inputs[0].double(), inputs[1].double())
    oracle = total_of(per_sample_grads(nn.Linear(*sizes[1:]).double(), double, losses))
    assert (oracle < 0.05 * (inputs[1].norm(dim=(1, 2)) * inputs[0].double().norm(dim=(1, 2)))).all()
    with per_sample.grad_norms(model, "sum") as norms:
        losses(model, *inputs).sum().backward()
    torch.testing.assert_close(norms.total.double(), oracle, rtol=RELATIVE_ERROR, atol=0.0)


@SIZES
@DTYPES
def test_no_clipped_norm_is_lost_to_cancellation(dtype, sizes):
    model, inputs, losses = _constant_activations(dtype, *sizes)
    double = (inputs[0].double(), inputs[1].double())
    oracle = total_of(per_sample_grads(nn.Linear(*sizes[1:]).double(), double, losses))
    norms = per_sample.clipped_backward(losses(model, *inputs), model, 1.0)
    torch.testing.assert_close(norms.total.double(), oracle, rtol=RELATIVE_ERROR, atol=0.0)


def test_uses_that_cancel():
    """A tied table whose two uses have nearly opposite gradients."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(C, 6)

        def forward(self, x):
            return self.a(x) - self.a(x + 0.01 * x.sin())

    check_norms(Model(), (torch.randn(B, T, C),))


# The batch and its size


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_and_the_real_batch_size(batch, reduction):
    model = nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, 2))
    check_norms(model, (torch.randn(batch, C),), reduction=reduction)


def test_reduction_names_the_loss():
    """With the wrong name, every norm is off by the batch size."""
    model, x = nn.Linear(C, 2), torch.randn(B, C)
    totals = []
    for reduction in ("mean", "sum"):
        with per_sample.grad_norms(model, reduction) as norms:
            weighted_losses(model, x).sum().backward()
        totals.append(norms.total)
    torch.testing.assert_close(totals[0], B * totals[1])


def _refusal(check):
    """None if the check passes, or why it is refused; wrong norms are an AssertionError."""
    try:
        check()
    except ValueError as error:
        text = str(error)
    else:
        return None
    assert "batch" in text
    return text


class Mixing(nn.Module):
    """function(model, x) with two layers of four channels."""

    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.function(self, x)


EQUAL_SIZES = {  # [4, 4, 4]: nothing can be told by its size
    "plain": lambda m, x: m.b(m.a(x)),
    "positions first and back": lambda m, x: m.b(m.a(x.transpose(0, 1)).transpose(0, 1)),
    "norm with positions first": lambda m, x: m.a(m.b(x.transpose(0, 1)).transpose(0, 1)),
    "rows of [T, B]": lambda m, x: m.a(x.transpose(0, 1).reshape(-1, 4)).unflatten(0, (4, len(x))).transpose(0, 1),
    "unbound": lambda m, x: torch.stack([m.a(step) for step in x.unbind(1)]).transpose(0, 1),
    "stacked positions": lambda m, x: m.a(torch.stack(list(x.unbind(1)))).transpose(0, 1),
    "einsum": lambda m, x: m.a(torch.einsum("btc->tbc", x)).transpose(0, 1),
    "matrix of the samples": lambda m, x: m.a(x.mT).mT,
}


@pytest.mark.parametrize("name", EQUAL_SIZES)
def test_samples_are_not_guessed_from_sizes(name):
    """Exact, or refused, but not wrong."""
    model, inputs = ModelCase(name, lambda: Mixing(EQUAL_SIZES[name]), lambda: (torch.randn(4, 4, 4),)).draw()
    refused = _refusal(lambda: check_norms(model, inputs))
    if name in ("plain", "unbound", "matrix of the samples"):
        assert not refused


def test_sequence_first_layers_with_as_many_positions_as_samples():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model, x = Model(), torch.randn(4, 4, 4)
    _refusal(lambda: check_norms(model, (x,)))


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, x: m.a(x.flip(0)).flip(0),
        lambda m, x: m.a(x[torch.tensor([2, 0, 1])])[torch.tensor([1, 2, 0])],
        lambda m, x: m.a(x[np.array([2, 0, 1])])[np.array([1, 2, 0])],
        lambda m, x: m.a(x[range(2, -1, -1)])[range(2, -1, -1)],
        lambda m, x: m.a(x.roll(1, 0)).roll(-1, 0),
    ],
    ids=["flip", "index", "array", "range", "roll"],
)
def test_samples_in_another_order(mix):
    """Exact, or refused: the layer's rows are not in the order of the losses."""
    model, x = Mixing(mix), torch.randn(B, T, 4)
    plain = Mixing(lambda m, x: m.a(x))  # of which the mixed one is a detour
    plain.load_state_dict(model.state_dict())
    expected = Expected.of(plain, (x,))

    def check():
        with per_sample.grad_norms(model, "sum") as norms:
            weighted_losses(model, x).sum().backward()
        expected.check_norms(norms)

    _refusal(check)


def test_rows_in_another_order():
    def forward(m, x):
        return m.a(x.transpose(0, 1).reshape(-1, 4)).unflatten(0, (T, len(x))).transpose(0, 1)

    model, x = Mixing(forward), torch.randn(B, T, 4)
    _refusal(lambda: check_norms(model, (x,)))


# Batch-coupled layers


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (5, 6)), (nn.BatchNorm3d, (2, 3, 2))]
)
def test_batch_norm_in_training_is_refused(norm, shape, affine):
    conv = {0: nn.Linear(C, 6), 2: nn.Conv2d(C, 6, 1), 3: nn.Conv3d(C, 6, 1)}[len(shape)]
    model = nn.Sequential(conv, norm(6, affine=affine))
    with per_sample.grad_norms(model), pytest.raises(ValueError, match=r"'1\b.*training|training.*'1\b"):
        model(torch.randn(B, C, *shape))


def test_batch_norm_by_hand_in_training_is_refused():
    model, x = nn.Linear(C, 6), torch.randn(B, C)
    with per_sample.grad_norms(model), pytest.raises(ValueError, match="batch_norm"):
        F.batch_norm(model(x), None, None, training=True)


def test_batch_norm_without_running_statistics_is_refused_in_eval():
    model = nn.Sequential(nn.Linear(C, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval()
    with per_sample.grad_norms(model), pytest.raises(ValueError, match=r"'1\b"):
        model(torch.randn(B, C))


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_scaling_by_frequency_is_refused(make):
    model = nn.Sequential(make(7, C, scale_grad_by_freq=True), nn.Linear(C, 2))
    with per_sample.grad_norms(model), pytest.raises(ValueError, match=r"'0\.weight'.*scale_grad_by_freq"):
        model(torch.randint(0, 7, (B, T)))


# A sum over samples that is no loss of one sample


def test_a_penalty_on_the_weights():
    """Added to every sample's loss it is exact; added to the mean it has no samples, and is refused."""
    model, x = nn.Linear(C, 2), torch.randn(B, C)

    def losses(model, x):
        return weighted_losses(model, x) + 0.1 * model.weight.square().sum()

    check_norms(model, (x,), losses=losses, reduction="mean")
    with per_sample.grad_norms(model), pytest.raises((ValueError, RuntimeError)):  # noqa: PT012
        loss = weighted_losses(model, x).mean() + 0.1 * model.weight.square().sum()
        loss.backward()


# Gradients that are not there, or not finite


def test_samples_without_a_gradient_have_norm_zero():
    def losses(model, x):
        return weighted_losses(model, x) * torch.tensor([1.0, 0.0, 1.0])[: len(x)]

    model, x = nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(B, T, C)
    with per_sample.grad_norms(model, "sum") as norms:
        losses(model, x).sum().backward()
    assert norms.total[1] == 0
    assert (norms.total[[0, 2]] > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_spoils_no_other(bad):
    model = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    x = torch.randn(B, T, C)
    expected = Expected.of(model, (x,))
    x[1, 2, 3] = bad
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(model, x).sum().backward()
    assert not norms.total[1].isfinite()
    oracle = total_of(expected.oracle)
    torch.testing.assert_close(norms.total[[0, 2]].double(), oracle[[0, 2]], rtol=RELATIVE_ERROR, atol=0.0)


def test_float16_norms_beyond_its_range():
    """A norm beyond 256 has a square beyond 65504."""
    model, x = nn.Sequential(nn.Linear(C, 6), nn.Linear(6, 2)).half(), torch.randn(B, T, C).half()

    def losses(model, x):
        return 200 * weighted_losses(model, x)

    norms = check_norms(model, (x,), losses=losses)
    assert (norms.total > 256).all()
    assert norms.squared.isfinite().all()


# Functions that change what they are given


def test_activations_in_place():
    layers = [nn.Linear(C, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.LeakyReLU(inplace=True)]
    check_norms(nn.Sequential(*layers, nn.Dropout(0.0, inplace=True), nn.Linear(6, 2)), (torch.randn(B, T, C),))


def test_output_written_over():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.p = nn.Linear(C, 6), nn.Embedding(6, 6), nn.Parameter(torch.randn(6))

        def forward(self, x):
            y = self.a(x)
            y[:, 0] = self.p  # a parameter in part of what has samples
            y *= self.b(torch.arange(6))[:, 0]
            y += self.p
            return y.sigmoid_()

    check_case(ModelCase("", Model, lambda: (torch.randn(B, T, C),)))


def test_written_into_a_buffer_of_zeros():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(C, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = x.new_zeros(len(x), T + 1, 6)
            y[:, 1:] = self.a(x)
            return self.b(y)

    check_case(ModelCase("", Model, lambda: (torch.randn(B, T, C),)))
