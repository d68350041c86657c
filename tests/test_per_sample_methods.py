"""What is made of per-sample gradients: clipped sums, weights, noise scale, Gram matrices; against the loop."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmix import per_sample
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity
from fastmix.testing.per_sample import (
    RELATIVE_ERROR,
    Expected,
    check_tensors,
    clipped_sum,
    gram_of,
    total_of,
    weighted_losses,
)

B, T, V = 4, 5, 7


class Language(nn.Module):
    """Tied tables, attention, norms, a bare parameter, an unused and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.unused = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.out = nn.Linear(8, V)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(self.frozen(self.encoder(self.tokens(ids) * self.scale)))


def _image():
    layers = [nn.Conv2d(1, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))


def _mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


MODELS = {
    "MLP": (_mlp, lambda: torch.randn(B, 6)),
    "tokens": (_mlp, lambda: torch.randn(B, T, 6)),
    "long samples": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), lambda: torch.randn(B, 40, 3)),
    "language": (Language, lambda: torch.randint(0, V, (B, T))),
    "long texts": (Language, lambda: torch.randint(0, V, (B, 8 * T))),
    "image": (_image, lambda: torch.randn(B, 1, 6, 6)),
    "recurrent": (lambda: Last(nn.LSTM(6, 5, batch_first=True)), lambda: torch.randn(B, T, 6)),
}


class Last(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def _draw(name, dtype=torch.float32):
    make, draw = MODELS[name]
    x = draw()
    model = make().to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x


def _losses(model, x, forward):
    """From a forward inside a block or an ordinary one."""
    block = contextlib.nullcontext() if forward == "ordinary" else per_sample.grad_norms(model)
    with block:
        return weighted_losses(model, x)


FORWARD = pytest.mark.parametrize("forward", ["block", "ordinary"])
EACH = pytest.mark.parametrize("name", MODELS)


def _group(name):
    return name.rpartition(".")[0]


def _check_clipped(model, expected, max_norm, group=lambda name: "", sample_weight=None):
    used = [name for name, grad in expected.ordinary.items() if grad is not None]
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    oracle = clipped_sum(expected.oracle, max_norm, group, sample_weight)
    reference = clipped_sum(expected.reference, max_norm, group, sample_weight)
    reference, oracle = ({name: grads[name] for name in used} for grads in (reference, oracle))
    check_tensors("clipped", actual, reference, oracle, expected.dtype)


# Clipping


@FORWARD
@EACH
@pytest.mark.parametrize("mode", ["global", "per_layer"])
def test_clipped_backward(name, mode, forward):
    model, x = _draw(name)
    expected = Expected.of(model, (x,))
    totals = total_of(expected.oracle)
    max_norm = float(totals.median() if mode == "global" else totals.median() / 4)
    assert (totals > max_norm).any()
    norms = per_sample.clipped_backward(_losses(model, x, forward), model, max_norm, mode=mode)
    expected.check_norms(norms)
    _check_clipped(model, expected, max_norm, _group if mode == "per_layer" else lambda name: "")


def test_a_clipped_backward_inside_the_block():
    model, x = _draw("language")
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model):
        norms = per_sample.clipped_backward(weighted_losses(model, x), model, 1.0)
    expected.check_norms(norms)
    _check_clipped(model, expected, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_clipping_in_other_types(dtype):
    model, x = _draw("language", dtype)
    expected = Expected.of(model, (x,))
    max_norm = float(total_of(expected.oracle).median())
    norms = per_sample.clipped_backward(_losses(model, x, "block"), model, max_norm)
    expected.check_norms(norms)
    _check_clipped(model, expected, max_norm)


@FORWARD
def test_sample_weight(forward):
    model, x = _draw("tokens")
    expected = Expected.of(model, (x,))
    weight = torch.tensor([0.5, 0.0, 2.0, -1.0])
    norms = per_sample.clipped_backward(_losses(model, x, forward), model, 1.0, sample_weight=weight)
    expected.check_norms(norms)  # the norms are unweighted
    _check_clipped(model, expected, 1.0, sample_weight=weight)


@pytest.mark.parametrize("mode", ["global", "per_layer"])
def test_the_bound_holds(mode):
    """One sample's gradient of a hundred times the bound is clipped to the bound, altogether or in each module."""
    model, x = _draw("language")
    per_sample.clipped_backward(100 * _losses(model, x[:1], "block"), model, 0.25, mode=mode)
    grads = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    groups = {"": list(grads)} if mode == "global" else {}
    for name in grads if mode == "per_layer" else ():
        groups.setdefault(_group(name), []).append(name)
    for names in groups.values():
        norm = torch.cat([grads[name] for name in names]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.25))


def test_without_clipping_it_is_the_gradient_of_the_sum():
    model, x = _draw("tokens")
    expected = Expected.of(model, (x,))
    per_sample.clipped_backward(_losses(model, x, "block"), model, float("inf"))
    expected.check_grad(model)


def test_clipped_gradients_are_added():
    model, x = _draw("MLP")
    expected = Expected.of(model, (x,))
    for _ in range(2):
        per_sample.clipped_backward(_losses(model, x, "block"), model, 1.0)
    twice = {name: 2 * grad for name, grad in clipped_sum(expected.oracle, 1.0).items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), twice[name], rtol=1e-5, atol=1e-6)


def test_a_sample_without_gradient_is_not_clipped():
    model, x = _draw("MLP")
    losses = _losses(model, x, "block") * torch.tensor([1.0, 0.0, 1.0, 1.0])
    norms = per_sample.clipped_backward(losses, model, 1.0)
    assert norms.total[1] == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_clipping_through_a_checkpoint(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(6, 6), _mlp()

        def forward(self, x):
            return checkpoint(self.rest, self.first(x), use_reentrant=use_reentrant)

    model, x = Model(), torch.randn(B, T, 6)
    expected = Expected.of(model, (x,))
    losses = _losses(model, x, "block")
    try:
        norms = per_sample.clipped_backward(losses, model, 1.0)
    except RuntimeError as error:  # a clear refusal is right too
        assert use_reentrant
        assert "checkpoint" in str(error)  # noqa: PT017
        return
    expected.check_norms(norms)
    _check_clipped(model, expected, 1.0)


def test_clipping_under_autocast():
    model, x = _draw("tokens")

    def losses(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return weighted_losses(model, x)

    expected = Expected.of(model, (x,), losses, dtype=torch.bfloat16)
    max_norm = float(total_of(expected.oracle).median())
    with per_sample.grad_norms(model):
        norms = per_sample.clipped_backward(losses(model, x), model, max_norm)
    expected.check_norms(norms)
    _check_clipped(model, expected, max_norm)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("method", ["clipped_backward", "gram"])
def test_results_of_our_own_know_no_autocast(method):
    """A backward's products are cast where it runs under autocast; here it has none."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), torch.randn(B, 20, 6)

    def result(enabled):
        model.zero_grad()
        with per_sample.grad_norms(model):
            losses = weighted_losses(model, x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                if method == "gram":
                    return [per_sample.gram(model, losses)]
                per_sample.clipped_backward(losses, model, 0.1)
        return [parameter.grad for parameter in model.parameters()]

    for actual, expected in zip(result(True), result(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "kept"), [("long samples", True), ("tokens", False)])
def test_gradients_smaller_than_what_they_are_made_of_are_kept(name, kept):
    model, x = _draw(name)
    methods = per_sample.clipped_backward(_losses(model, x, "block"), model, 1.0).methods
    assert (methods["0.weight"] == "per-sample gradients") == kept


# Noise


def test_noise_has_the_given_size():
    torch.manual_seed(0)
    model, x = nn.Linear(200, 100), torch.randn(B, 200)
    expected = Expected.of(model, (x,))
    generator = torch.Generator().manual_seed(1)
    per_sample.clipped_backward(_losses(model, x, "block"), model, 0.5, noise_multiplier=3.0, generator=generator)
    clipped = clipped_sum(expected.oracle, 0.5)
    noise = torch.cat([(p.grad - clipped[name]).flatten() for name, p in model.named_parameters()])
    deviation = 3.0 * 0.5
    count = noise.numel()
    assert abs(noise.mean()) < 5 * deviation / count**0.5
    assert abs(noise.std() / deviation - 1) < 5 / (2 * count) ** 0.5


def test_noise_comes_from_the_generator():
    model, x = _draw("MLP")
    grads = []
    for seed in (1, 1, 2):
        model.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        losses = _losses(model, x, "block")
        per_sample.clipped_backward(losses, model, 1.0, noise_multiplier=1.0, generator=generator)
        grads.append(model[0].weight.grad.clone())
        torch.manual_seed(len(grads))  # which must not matter
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


def test_unused_parameters_get_noise():
    """Whether a batch uses a parameter must not show."""
    model, x = _draw("language")
    per_sample.clipped_backward(_losses(model, x, "block"), model, 1.0, noise_multiplier=1.0)
    assert model.unused.weight.grad.abs().max() > 0
    assert model.frozen.weight.grad is None


# Weights and noise scale


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_importance_weights(reduction):
    model, x = _draw("tokens")
    totals = total_of(Expected.of(model, (x,)).oracle)
    with per_sample.grad_norms(model, reduction) as norms:
        norms.backward(weighted_losses(model, x))
    weights = per_sample.importance_weights(norms)
    p = totals / totals.sum()
    torch.testing.assert_close(weights.double(), 1 / (B * p), rtol=2 * RELATIVE_ERROR, atol=0.0)
    torch.testing.assert_close((p * weights).sum(), torch.tensor(1.0).double())  # without bias


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_noise_scale(reduction, scale):
    model, x = _draw("MLP")
    rows = torch.cat([g.flatten(1) for g in Expected.of(model, (x,)).oracle.values()], dim=1)
    covariance_trace = rows.var(dim=0, correction=1).sum()
    mean_sq = rows.mean(0).square().sum() - covariance_trace / B
    with per_sample.grad_norms(model, reduction, loss_scale=scale) as norms:
        losses = weighted_losses(model, x) * scale
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
    actual = per_sample.gradient_noise_scale(norms, model)
    assert actual.shape == ()
    torch.testing.assert_close(actual.double(), covariance_trace / mean_sq, rtol=1e-4, atol=0.0)


# Gram matrices


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram(name, dtype):
    model, x = _draw(name, dtype)
    expected = Expected.of(model, (x,))
    actual = per_sample.gram(model, _losses(model, x, "block"))
    assert actual.dtype == dtype
    assert not actual.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    oracle = gram_of(expected.oracle)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, oracle)
    else:
        check_parity("gram", actual, gram_of(expected.reference).to(dtype), oracle, factor=GRADIENT_FACTOR)


def test_gram_inside_the_block():
    model, x = _draw("tokens")
    with per_sample.grad_norms(model):
        inside = per_sample.gram(model, weighted_losses(model, x))
    torch.testing.assert_close(inside, per_sample.gram(model, _losses(model, x, "block")))


def test_norms_are_the_grams_diagonal():
    model, x = _draw("language")
    with per_sample.grad_norms(model) as norms:
        norms.backward(weighted_losses(model, x))
    gram = per_sample.gram(model, _losses(model, x, "block"))
    torch.testing.assert_close(gram.diagonal(), norms.squared, rtol=RELATIVE_ERROR, atol=0.0)
