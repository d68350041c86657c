"""Per-sample gradient norms of two small models on handwritten digits, and what they are good for.

    python examples/per_sample_digits.py [--model transformer] [--epochs 4]

The data are scikit-learn's 1797 images of 8×8 pixels, a fifth of them for the test. For a transformer and a CNN, the
norm of every training image's gradient, found in the backwards of whole batches, is compared with what a backward for
each image gives. Then the model is trained by importance sampling: every batch is drawn in proportion to the norms at
the epoch's beginning, with the weights that keep its gradient without bias, and the gradient noise scale is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits_data import Digits, load, standardised
from tabulate import tabulate
from torch import Tensor, nn

from fastmix import per_sample

BATCH = 64


@dataclass(frozen=True)
class Run:
    """difference: the largest of a norm from the loop's, relative to it; losses and noise scales: one an epoch."""

    difference: float
    losses: list[float]
    noise_scales: list[float]
    accuracy: float


class Transformer(nn.Module):
    """An encoder of 8 tokens, an image's rows, with positions, and a classifier of their mean."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, dim)
        self.positions = nn.Parameter(0.3 * torch.randn(8, dim))
        layer = nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.flatten(1, 2)) + self.positions).mean(dim=1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"transformer": Transformer, "cnn": cnn}


def norms_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """[N]: every image's norm, batch by batch. Gradients in .grad are the sum over the batches."""
    with per_sample.grad_norms(model, loss_reduction="sum", accumulate=True) as norms:
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            F.cross_entropy(model(x), y, reduction="sum").backward()
    return norms.total


def looped_norms_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The same by a backward for each image."""
    norms = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        norms.append(torch.stack([grad.norm() for grad in grads]).norm())
    return torch.stack(norms)


def train(name: str, data: Digits, epochs: int) -> Run:
    """Trains a model of MODELS on batches drawn by the norms; nothing but the arguments matters."""
    torch.manual_seed(0)
    model = MODELS[name]()
    images, labels = data.train_images, data.train_labels
    found, looped = norms_of(model, images, labels), looped_norms_of(model, images, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses, noise_scales = [], []
    for _ in range(epochs):
        optimizer.zero_grad()
        with per_sample.grad_norms(model) as norms:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        losses.append(loss.item())
        noise_scales.append(per_sample.gradient_noise_scale(norms, model).item())
        weights = per_sample.importance_weights(norms)
        draws = torch.multinomial(norms.total, len(images), replacement=True)
        for batch in draws.split(BATCH):
            optimizer.zero_grad()
            each = F.cross_entropy(model(images[batch]), labels[batch], reduction="none")
            (weights[batch] * each).mean().backward()
            optimizer.step()
    with torch.inference_mode():
        losses.append(F.cross_entropy(model(images), labels).item())
        recognised = model(data.test_images).argmax(dim=1) == data.test_labels
    difference = ((found - looped).abs() / looped).max().item()
    return Run(difference, losses, noise_scales, recognised.float().mean().item())


def main(argv: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description="Per-sample gradient norms on handwritten digits.")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--epochs", type=int, default=4)
    # Models as small as these only wait for a second thread.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    data = standardised(load())
    runs = {name: train(name, data, options.epochs) for name in options.model or MODELS}
    rows = [
        (
            name,
            f"{run.difference:.1e}",
            _numbers(run.losses, ".3f"),
            _numbers(run.noise_scales, ".0f"),
            f"{run.accuracy:.1%}",
        )
        for name, run in runs.items()
    ]
    headers = (
        "model",
        "norms, largest relative difference",
        "loss after 0, 1, … epochs",
        "noise scale",
        "test accuracy",
    )
    print(tabulate(rows, headers=headers, tablefmt="github"))
    return runs


def _numbers(values: list[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


if __name__ == "__main__":
    main()
