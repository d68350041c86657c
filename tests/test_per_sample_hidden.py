"""Parameters that are used where per_sample.grad_norms sees no PyTorch function: exact, or refused, never left out."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastmix import per_sample
from fastmix.testing.per_sample import Expected, check_norms, weighted_losses

B, T, C = 3, 5, 4


def _refusal(model, x):
    """None if the norms are right, or the name in the refusal; wrong norms are an AssertionError."""
    try:
        check_norms(model, (x,))
    except (ValueError, RuntimeError) as error:
        return re.search(r"'([\w.]+)'", str(error)).group(1)
    return None


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 1))


class Hidden(nn.Module):
    """A linear layer, and a function of its weight of which the block is not told."""

    def __init__(self, function, shared):
        super().__init__()
        self.a, self.function, self.p = nn.Linear(C, C), function, nn.Parameter(torch.randn(C))
        self.shared = shared

    def forward(self, x):
        return self.function(self.a(x), self.a.weight[0] if self.shared else self.p)


def _scripted():
    @torch.jit.script
    def scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * weight

    return lambda x, weight: scale(x, weight)  # which can be copied


FUNCTIONS = {"autograd function": lambda: Scale.apply, "scripted function": _scripted}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("shared", [False, True], ids=["only use", "another use"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_use_that_is_not_seen(name, shared):
    """Exact, or refused with the parameter's name, in the forward or in the backward."""
    model, x = Hidden(FUNCTIONS[name](), shared), torch.randn(B, T, C)
    assert _refusal(model, x) in (None, "a.weight" if shared else "p")


def test_vmap_inside_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, C, C))
            self.a = nn.Linear(C, C)

        def forward(self, x):
            heads = torch.vmap(lambda weight, x: torch.tanh(x @ weight), in_dims=(0, None), out_dims=1)
            return heads(self.weight, self.a(x)).flatten(1)

    assert _refusal(Model(), torch.randn(B, T, C)) in (None, "weight")


def test_functional_call():
    model, x = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(B, T, C)
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum") as norms:
        parameters = dict(model.named_parameters())
        weighted_losses(lambda x: torch.func.functional_call(model, parameters, (x,)), x).sum().backward()
    expected.check_norms(norms)
