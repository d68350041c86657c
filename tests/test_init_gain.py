"""Gains against closed forms and Monte-Carlo, and functions that have none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix import init

MANY = 1_000_000
LARGEST_Z = 5.0  # exceeded once in 1.7 million


def _seeded():
    return torch.Generator().manual_seed(0)


def _phi_tail(z):
    return math.erfc(z / math.sqrt(2)) / 2


def _shifted_relu(shift):
    """∫ (z − s)²·φ over z > s."""
    return (1 + shift**2) * _phi_tail(shift) - shift * math.exp(-(shift**2) / 2) / math.sqrt(2 * math.pi)


MOMENTS = {
    "relu": ("relu", 1 / 2),
    "linear": ("linear", 1.0),
    "leaky_relu": ("leaky_relu", (1 + 1e-4) / 2),
    "a module with a parameter": (nn.PReLU(init=0.25), (1 + 1 / 16) / 2),
    "a module in training": (nn.Sequential(nn.ReLU(), nn.Dropout()), 1 / 2),
    "hardtanh": (
        "hardtanh",
        1 - 2 * _shifted_relu(1.0) - 4 * math.exp(-0.5) / math.sqrt(2 * math.pi) + 4 * _phi_tail(1),
    ),
    "erf": (torch.erf, 2 / math.pi * math.asin(2 / 3)),
    "elu": ("elu", 1 / 2 + math.exp(2) * _phi_tail(2) - 2 * math.exp(0.5) * _phi_tail(1) + 1 / 2),
    "a kink": (lambda z: F.relu(z - 0.7123), _shifted_relu(0.7123)),
    "a jump": (lambda z: (z > 0.3137).double(), _phi_tail(0.3137)),
    "far kink": (lambda z: F.relu(z - 4), _shifted_relu(4.0)),
    "polynomial": (lambda z: z**8, 2027025.0),
    "exponential": (torch.exp, math.exp(2)),
    "steep exponential": (lambda z: torch.exp(10 * z), math.exp(200)),
    "nearly diverging": (lambda z: torch.exp(0.2 * z * z), 0.2**-0.5),
    "oscillating": (lambda z: torch.sin(30 * z), (1 - math.exp(-1800)) / 2),
    "infinite slope": (lambda z: z.abs().sqrt(), math.sqrt(2 / math.pi)),
}


@pytest.mark.parametrize(("fn", "moment"), MOMENTS.values(), ids=MOMENTS)
def test_gain_is_the_closed_form(fn, moment):
    assert init.activation_gain(fn) == pytest.approx(moment**-0.5, rel=1e-9)


def test_known_gains():
    assert init.activation_gain("sigmoid") == pytest.approx(0.2933790**-0.5, rel=2e-7)  # its seven digits
    assert init.activation_gain("selu") == pytest.approx(1.0, rel=1e-9)
    assert init.activation_gain("gelu_tanh") == pytest.approx(init.activation_gain(nn.GELU("tanh")), rel=1e-12)


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "softplus", "mish", "hardswish", "sigmoid", "softsign"])
def test_gain_is_monte_carlos(name):
    z = torch.randn(MANY, generator=_seeded())
    squares = (torch.sigmoid(z) if name == "sigmoid" else getattr(F, name)(z)).double().square()
    error = LARGEST_Z * squares.std() / math.sqrt(MANY)
    assert abs(squares.mean() - init.activation_gain(name) ** -2) < error


def test_gain_keeps_the_second_moment():
    """Through 10 sigmoid layers."""
    generator = _seeded()
    x = torch.randn(64, 1000, generator=generator)
    for _ in range(10):
        weight = init.lecun_normal_(torch.empty(1000, 1000), init.activation_gain("sigmoid"), generator=generator)
        x = torch.sigmoid(x) @ weight.t()
    assert 0.8 < x.square().mean() < 1.25


def test_gain_leaves_the_module():
    module = nn.PReLU()
    init.activation_gain(module)
    assert module.training
    assert module.weight.dtype == torch.float32
    with torch.device("meta"):
        assert init.activation_gain("relu") == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        ("swish2", ValueError, "must be a function or one of .*'relu'.*, got 'swish2'"),
        (3, TypeError, "must be a function or a name, got int"),
        (lambda z: torch.exp(z * z / 4), ValueError, "must be finite: it grows like exp"),
        (lambda z: torch.exp(z * z), ValueError, "must be finite for .* is not at .z. = 26"),
        (lambda z: 1 / (z - 0.3), ValueError, "does not converge near z = 0.3"),
        (torch.log, ValueError, "log must be finite"),
        (torch.zeros_like, ValueError, "zeros_like must not be zero almost everywhere"),
        (lambda z: z.float(), TypeError, "must give a float64 tensor for one, got float32"),
        (lambda z: z.sum(), ValueError, "must be elementwise"),
        (torch.rand_like, ValueError, "must be piecewise smooth"),
    ],
)
def test_gain_of_what_has_none(fn, error, message):
    with pytest.raises(error, match=message):
        init.activation_gain(fn)
