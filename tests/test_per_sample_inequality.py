"""per_sample.gradient_inequality against autograd, on random and on trained networks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.utils import parametrizations

from fastmix import per_sample

B, C = 5, 4
ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, lambda: nn.Threshold(0.1, -1.0),
]  # fmt: skip


def _choose(n: int) -> int:
    return int(torch.randint(n, ()))


def _random_mlp() -> tuple[nn.Sequential, Tensor]:
    """Random widths, depth, scale, biases and activations, also in front and behind; and samples for it."""

    def activations() -> list[nn.Module]:
        return [ACTIVATIONS[_choose(len(ACTIVATIONS))]() for _ in range(_choose(3))]

    widths = [1 + _choose(6) for _ in range(1 + _choose(4))] + [1]
    layers = activations()
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias=_choose(2) == 0), *activations()]
    mlp = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter *= 1 + 2 * torch.rand(())
    return mlp, 2 * torch.randn(B, widths[0], dtype=torch.float64)


def _sides_of_sample(mlp: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition for x [in_features]."""
    factors = []
    for t, layer in enumerate(mlp):
        if isinstance(layer, nn.Linear):
            h = mlp[:t](x)
            norm = torch.linalg.matrix_norm(layer.weight, 2) * torch.linalg.matrix_norm(jacobian(mlp[:t], x), 2)
            factors.append(((layer.bias is not None) + h.square().sum()) / norm.square())
    per_layer = torch.stack(factors)
    input_gradient_sq = jacobian(mlp, x).square().sum()
    lhs = input_gradient_sq * per_layer.sum() if input_gradient_sq else input_gradient_sq
    grads = torch.autograd.grad(mlp(x).squeeze(), list(mlp.parameters()))
    return lhs.detach(), sum(grad.square().sum() for grad in grads), per_layer.detach()


def _check_definition(mlp: nn.Sequential, x: Tensor) -> None:
    lhs, rhs, per_layer = zip(*(_sides_of_sample(mlp, sample) for sample in x), strict=True)
    expected = torch.stack(lhs), torch.stack(rhs), torch.stack(per_layer, 1)
    for actual, side in zip(per_sample.gradient_inequality(mlp, x), expected, strict=True):
        torch.testing.assert_close(actual, side)


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))


# Values


def test_on_200_random_networks():
    """With room for the rounding of the sums where equality holds."""
    tight = 0
    for _ in range(200):
        mlp, x = _random_mlp()
        lhs, rhs, per_layer = per_sample.gradient_inequality(mlp, x)
        assert per_layer.shape == (sum(isinstance(layer, nn.Linear) for layer in mlp), B)
        assert (lhs <= rhs * (1 + 1e-12)).all()
        assert lhs.isfinite().all()
        assert (rhs > 0).any() or not lhs.any()
        tight += int((lhs > rhs / 2).any())
    assert tight > 50  # of a left side that is near 0 everywhere nothing would have been learned


@pytest.mark.parametrize("seed", range(6))
def test_the_definition_on_random_networks(seed):
    torch.manual_seed(seed)
    _check_definition(*_random_mlp())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    mlp = nn.Sequential(nn.Linear(C, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 1)).double()
    _check_definition(mlp, 2 * torch.randn(B, C, dtype=torch.float64))


def test_on_a_trained_network():
    mlp = nn.Sequential(nn.Linear(C, 16), nn.LeakyReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, C)
    target = (x[:, :1] * x[:, 1:2]).sin()
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01)
    first = nn.functional.mse_loss(mlp(x), target)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(mlp(x), target)
        loss.backward()
        optimizer.step()
    assert loss < first / 2
    lhs, rhs, _ = per_sample.gradient_inequality(mlp, x)
    assert (lhs <= rhs).all()
    assert (lhs > 0).all()


def test_the_right_side_is_the_squared_norm_of_grad_norms():
    mlp, x = _small().double(), torch.randn(B, C, dtype=torch.float64)
    _, rhs, _ = per_sample.gradient_inequality(mlp, x)
    with per_sample.grad_norms(mlp, "sum") as norms:
        mlp(x).sum().backward()
    torch.testing.assert_close(rhs, norms.squared)


def _orthogonal(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight)
    return layer


@pytest.mark.parametrize(
    "mlp",
    [
        nn.Sequential(nn.Linear(C, 1)),
        nn.Sequential(nn.Linear(C, 1, bias=False), nn.Sigmoid()),
        nn.Sequential(nn.Linear(C, 1), nn.Tanh(), nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1, bias=False)),
        nn.Sequential(_orthogonal(C), _orthogonal(C), nn.Identity(), nn.Linear(C, 1)),
    ],
    ids=["one layer", "without bias", "one unit", "orthogonal"],
)
def test_equality(mlp):
    lhs, rhs, _ = per_sample.gradient_inequality(copy.deepcopy(mlp).double(), torch.randn(B, C, dtype=torch.float64))
    torch.testing.assert_close(lhs, rhs)
    assert (rhs > 0).all()


def test_no_equality_in_general():
    lhs, rhs, _ = per_sample.gradient_inequality(_small(), torch.randn(B, C))
    assert (lhs < 0.99 * rhs).all()


def test_where_the_jacobian_is_zero():
    mlp = nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        mlp[0].weight.fill_(1.0)
        mlp[0].bias.zero_()
    x = torch.ones(2, C)
    x[0] = -1.0  # all units are off
    lhs, rhs, per_layer = per_sample.gradient_inequality(mlp, x)
    assert per_layer[1, 0] == torch.inf
    assert lhs[0] == 0
    assert rhs[0] == 1  # of the last bias
    assert per_layer[:, 1].isfinite().all()
    assert 0 < lhs[1] <= rhs[1]


def test_where_a_weight_is_zero():
    mlp = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, 1))
    nn.init.zeros_(mlp[2].weight)
    lhs, rhs, per_layer = per_sample.gradient_inequality(mlp, torch.randn(B, C))
    assert (per_layer[1] == torch.inf).all()
    assert torch.equal(lhs, torch.zeros(B))
    assert (rhs > 1).all()


def test_a_sample_that_is_not_finite_spoils_no_other():
    mlp, x = _small(), torch.randn(B, C)
    expected = per_sample.gradient_inequality(mlp, x)
    x[1] = torch.nan
    for side, other in zip(per_sample.gradient_inequality(mlp, x), expected, strict=True):
        rest = torch.arange(B) != 1
        torch.testing.assert_close(side[..., rest], other[..., rest])
    assert per_sample.gradient_inequality(mlp, x)[0][1].isnan()


# Forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """The sides are those of float64, rounded."""
    mlp, x = _small().to(dtype), torch.randn(B, C, dtype=dtype)
    exact = per_sample.gradient_inequality(copy.deepcopy(mlp).double(), x.double())
    rounded = torch.promote_types(dtype, torch.float32)
    for side, other in zip(per_sample.gradient_inequality(mlp, x), exact, strict=True):
        assert side.dtype == rounded
        assert torch.equal(side, other.to(rounded))


def test_an_empty_batch():
    lhs, rhs, per_layer = per_sample.gradient_inequality(_small(), torch.randn(0, C))
    assert (lhs.shape, rhs.shape, per_layer.shape) == ((0,), (0,), (3, 0))


def test_nested_and_inplace_and_evaluated():
    mlp, x = _small().eval(), torch.randn(B, C)
    expected = per_sample.gradient_inequality(mlp, x)
    other = nn.Sequential(
        mlp[0], nn.Dropout(), nn.Sequential(mlp[1], mlp[2], nn.Sequential(nn.ReLU(inplace=True))), mlp[4]
    ).eval()
    for side, same in zip(per_sample.gradient_inequality(other, x), expected, strict=True):
        assert torch.equal(side, same)


def test_one_activation_module_used_twice():
    torch.manual_seed(1)
    act = nn.Tanh()
    mlp = nn.Sequential(nn.Linear(C, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 1)).double()
    _check_definition(mlp, torch.randn(B, C, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_modes_change_nothing(mode):
    mlp, x = _small(), torch.randn(B, C, requires_grad=True)
    expected = per_sample.gradient_inequality(mlp, x)
    with mode():
        found = per_sample.gradient_inequality(mlp, x * 1)
    for side, other in zip(found, expected, strict=True):
        assert torch.equal(side, other)
        assert not side.requires_grad
    assert x.grad is None
    assert mlp[0].weight.grad is None


# Wrong input


class _Subclass(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class _OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _shared() -> nn.Sequential:
    first, second = nn.Linear(C, C), nn.Linear(C, C)
    second.weight = first.weight
    return nn.Sequential(first, second, nn.Linear(C, 1))


_LINEAR = nn.Linear(C, C)


@pytest.mark.parametrize(
    ("mlp", "kind", "message"),
    [
        (nn.Linear(C, 1), TypeError, "mlp must be a torch.nn.Sequential, got Linear"),
        (_Subclass(nn.Linear(C, 1)), ValueError, "must run as nn.Sequential does, got _Subclass"),
        (nn.Sequential(nn.Conv1d(C, 1, 1)), ValueError, "got '0', a Conv1d"),
        (nn.Sequential(nn.Linear(C, C), nn.Softmax(1), nn.Linear(C, 1)), ValueError, "got '1', a Softmax"),
        (nn.Sequential(nn.Linear(C, C), nn.GLU(), nn.Linear(2, 1)), ValueError, "got '1', a GLU"),
        (
            nn.Sequential(nn.Linear(C, C), nn.PReLU(), nn.Linear(C, 1)),
            ValueError,
            "without parameters, got '1', a PReL",
        ),
        (nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 1)), ValueError, "got '1', a LayerNorm"),
        (nn.Sequential(nn.Linear(C, C), nn.Dropout(), nn.Linear(C, 1)), ValueError, "'1', a Dropout in training"),
        (nn.Sequential(nn.Linear(C, C), nn.RReLU(), nn.Linear(C, 1)), ValueError, "'1', a RReLU in training"),
        (nn.Sequential(nn.Linear(C, 2)), ValueError, r"one output, \[B, 1\], got 2 of '0'"),
        (nn.Sequential(nn.Tanh()), ValueError, "must have a linear layer, got none"),
        (nn.Sequential(), ValueError, "must have a linear layer, got none"),
        (nn.Sequential(_OwnLinear(C, 1)), ValueError, "plain linear layers, got '0', a _OwnLinear"),
        (nn.Sequential(nn.LazyLinear(1)), ValueError, "must be initialised, got '0'"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(C, 1))), ValueError, "as parameters, got '0'"),
        (_shared(), ValueError, "must use each parameter once, got '1'"),
        (nn.Sequential(_LINEAR, _LINEAR, nn.Linear(C, 1)), ValueError, "must use each parameter once, got '1'"),
        (nn.Sequential(nn.Sequential(nn.Linear(C, C), nn.GLU()), nn.Linear(2, 1)), ValueError, "got '0.1', a GLU"),
    ],
)
def test_other_networks_are_refused(mlp, kind, message):
    with pytest.raises(kind, match=message):
        per_sample.gradient_inequality(mlp, torch.randn(B, C))


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (None, TypeError, "x must be a Tensor"),
        (torch.zeros(B, C, dtype=torch.long), TypeError, "x must be float32"),
        (torch.zeros(B, C, dtype=torch.float64), TypeError, "x must have the weights' dtype float32, got float64"),
        (torch.zeros(B, C + 1), ValueError, r"in_features = 4, got \[5, 5\]"),
        (torch.zeros(C), ValueError, r"x must be \[B, in_features\] with in_features = 4, got \[4\]"),
        (torch.zeros(B, C, device="meta"), ValueError, "x must be on the device of mlp"),
    ],
)
def test_other_inputs_are_refused(x, kind, message):
    with pytest.raises(kind, match=message):
        per_sample.gradient_inequality(_small(), x)
