"""Gradient normalisation by PyTorch's own double backward, and discriminators to try it on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.per_sample._piecewise_linear import PiecewiseLinear


def plain(discriminator: Callable[[Tensor], Tensor], x: Tensor, mode: str = "gn", eps: float | None = None) -> Tensor:
    """gradient_normalize as in the papers, by PyTorch's double backward."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    value = discriminator(x).reshape(-1)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    if mode == "gn":
        return value / (norm + value.abs() + (eps or 0.0))
    return value * norm / (norm**2 + (0.1 if eps is None else eps))


class Discriminator(nn.Module):
    """Convolution, what is under test on [B, 3, 6, 6], convolution, activation, sum and linear layer."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.first, self.layers = nn.Conv2d(2, 3, 3, padding=1), nn.Sequential(*layers)
        self.last = nn.LazyLinear(5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.first(x))
        return self.head(F.leaky_relu(self.last(h.flatten(1)), 0.2))


def discriminator_of(*layers: nn.Module) -> tuple[Discriminator, Tensor]:
    """In float64 and evaluation, and samples [4, 2, 6, 6] for it."""
    model, x = Discriminator(*layers).double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, x


def values_and_gradients(model: nn.Module, x: Tensor, function: Callable[..., Tensor], mode: str = "gn") -> dict:
    """The ratios, and the gradients of a loss of them by the parameters and x."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    ratio = function(model, x, mode=mode)
    (ratio * torch.linspace(-1, 2, len(x), dtype=x.dtype)).sum().backward()
    return {"ratio": ratio.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def note_claims(monkeypatch) -> list[bool]:
    """Whether each discriminator that is run from now on was found to be piecewise linear."""
    found = []
    method = PiecewiseLinear.homogeneous

    def homogeneous(self, output: Tensor) -> bool:
        found.append(method(self, output))
        return found[-1]

    monkeypatch.setattr(PiecewiseLinear, "homogeneous", homogeneous)
    return found
