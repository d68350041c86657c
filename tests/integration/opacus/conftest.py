"""Private training by Opacus, accelerated or not, of the same model each time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastmix.integrations.opacus import accelerate


class Run(NamedTuple):
    """What make_private returns, and what it was given."""

    module: Any
    optimizer: torch.optim.Optimizer
    criterion: Any
    loader: DataLoader
    model: nn.Module
    engine: Any

    def step(self, *inputs: Tensor, y: Tensor) -> list[Tensor]:
        """The clipped gradients of one step."""
        return self.step_of(lambda: self.criterion(self.module(*inputs), y))

    def step_of(self, loss) -> list[Tensor]:
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()
        return self.grads()

    def grads(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.optimizer.params]


@pytest.fixture(autouse=True)
def _opacus_flags(global_flags):
    """For all tests here."""


@pytest.fixture
def private():
    """private(model, x=…, way=…, engine=…, mode=…, **options of make_private): a `Run` without noise.

    way is None for Opacus as it is, "engine" or "optimizer" for what is accelerated; x are the inputs of the loader.
    """
    opacus = pytest.importorskip("opacus")

    def make(model, x=None, *, way=None, engine=None, mode="hooks", dtype=torch.float64, **options) -> Run:
        x = torch.zeros(12, 1) if x is None else x
        engine = opacus.PrivacyEngine(accountant="rdp") if engine is None else engine
        if way == "engine":
            accelerate(engine)
        model.to(dtype)
        drawn = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5, generator=drawn)
        data = TensorDataset(x.to(dtype) if x.is_floating_point() else x, torch.arange(12) % 4)
        criterion = nn.CrossEntropyLoss(reduction=options.get("loss_reduction", "mean"))
        arguments = {"noise_multiplier": 0.0, "max_grad_norm": 0.4, "poisson_sampling": False} | options
        module, optimizer, *ghost, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            criterion=criterion,
            data_loader=DataLoader(data, batch_size=4),
            grad_sample_mode=mode,
            **arguments,
        )
        if way == "optimizer":
            accelerate(optimizer)
        return Run(module, optimizer, ghost[0] if ghost else criterion, loader, model, engine)

    return make


@pytest.fixture
def fast(private):
    """An accelerated run."""
    return functools.partial(private, way="optimizer")


class TwoLayers(nn.Module):
    """Calls body(self, …)."""

    def __init__(self, body=lambda self, x: self.second(self.first(x).tanh())):
        super().__init__()
        self.first, self.second, self.body = nn.Linear(6, 8), nn.Linear(8, 4), body

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


@pytest.fixture
def model():
    """model() or model(body): two layers, first and second."""
    return TwoLayers


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y() -> Tensor:
    return torch.tensor([0, 3, 1, 1])
