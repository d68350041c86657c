"""Trains small models of `fastmix.nn` on handwritten digits, once with fastmix's kernels, once without.

    python examples/train_mixer.py [--model mixer] [--epochs 12] [--out digits.png]

The data are scikit-learn's 1797 images of 8×8 pixels, a fifth of them for the test. The second run of each model starts
from the same weights and sees the same batches, but every op is answered by its plain PyTorch reference. In the plot
the two loss curves lie on each other: they differ by rounding errors.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from digits_data import Digits, load, standardised
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastmix import nn as mixing
from fastmix.ops import _route

IMAGE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "num_blocks": 2}
BATCH = 64


class PatchClassifier(nn.Module):
    """Embedding of the 16 patches, positions, norm, an encoder of token sequences, mean token, classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 64, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.3 * torch.randn(16, 64))
        self.norm = nn.LayerNorm(64)
        self.encoder = encoder
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.positions
        return self.head(self.encoder(self.norm(tokens)).mean(dim=1))


def image_model(kind: Callable[..., nn.Module], **options) -> nn.Module:
    return kind(**IMAGE | {"mlp_ratio": 2.0} | options)


def with_token_mixer(mixer: Callable[..., nn.Module], *args, **options) -> nn.Module:
    """Pre-norm blocks with any module [B, S, C] → [B, S, C] in the place of self-attention."""
    block = partial(mixing.PreNormBlock, 64, partial(mixer, 64, *args, **options), mlp_ratio=2.0)
    return PatchClassifier(mixing.Encoder(block, num_blocks=2, norm=nn.LayerNorm(64)))


def fnet() -> nn.Module:
    return PatchClassifier(mixing.FNet(embed_dim=64, num_blocks=2, mlp_ratio=2.0, dropout=0.0))


# Name → (the model, the largest learning rate).
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "mixer": (partial(image_model, mixing.MLPMixer, mlp_ratio=(0.5, 2.0)), 0.01),
    "resmlp": (partial(image_model, mixing.ResMLP, init_values=1.0), 0.03),
    "feed_forward": (partial(image_model, mixing.FeedForwardStack), 0.01),
    "gmlp": (partial(image_model, mixing.GMLP), 0.01),
    "amlp": (partial(image_model, mixing.GMLP, attention_dim=16), 0.01),
    "external_attention": (partial(with_token_mixer, mixing.ExternalAttention, num_heads=4, memory_size=16), 0.01),
    "synthesizer": (partial(with_token_mixer, mixing.Synthesizer, 16, num_heads=4), 0.01),
    "depthwise": (partial(with_token_mixer, mixing.TokenConv, 5), 0.01),
    "lightweight": (partial(with_token_mixer, mixing.TokenConv, 5, "lightweight", num_heads=4), 0.01),
    "dynamic": (partial(with_token_mixer, mixing.TokenConv, 5, "dynamic", num_heads=4), 0.01),
    "fnet": (fnet, 0.01),
    "gfnet": (partial(image_model, mixing.GFNet), 0.01),
}


@dataclass(frozen=True)
class Run:
    """A training: the loss of every step, and the share of the test images that are recognised in the end."""

    losses: list[float]
    accuracy: float


def train(name: str, data: Digits, epochs: int, dtype: torch.dtype = torch.float32) -> Run:
    """Trains a model of MODELS; its weights and batches depend on nothing but the arguments."""
    torch.manual_seed(0)
    make, rate = MODELS[name]
    model = make().to(dtype)
    train_images, test_images = data.train_images.to(dtype), data.test_images.to(dtype)
    batches = len(data.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches, pct_start=0.2)
    losses = []
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(data.train_labels)).split(BATCH)[:batches]:
            loss = F.cross_entropy(model(train_images[batch]), data.train_labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.inference_mode():
        recognised = model(test_images).argmax(dim=1) == data.test_labels
    return Run(losses, recognised.float().mean().item())


def without_kernels() -> contextlib.AbstractContextManager:
    """Inside, every op is answered by its PyTorch reference, as where no kernel is built."""
    return mock.patch.object(_route, "kernels", dict.fromkeys(_route.kernels, frozenset()))


def plot(runs: dict[str, tuple[Run, Run]], path: str) -> None:
    figure = Figure(figsize=(4 * len(runs), 3.2), layout="tight")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)
    for ax, (name, (fast, reference)) in zip(axes[0], runs.items(), strict=True):
        ax.plot(reference.losses, color="tab:orange", linewidth=3, alpha=0.6, label="PyTorch reference")
        ax.plot(fast.losses, color="tab:blue", linewidth=0.8, label="fastmix")
        ax.set(title=f"{name}: {fast.accuracy:.1%}", xlabel="step")
    axes[0, 0].set_ylabel("training loss")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, tuple[Run, Run]]:
    """Returns the run with and the run without kernels of each model."""
    parser = argparse.ArgumentParser(description="Small models of fastmix.nn on handwritten digits.")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", default="digits.png", help="the plot of the loss curves")
    # Models as small as these only wait for a second thread.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    data, runs = standardised(load()), {}
    for name in options.model or MODELS:
        fast = train(name, data, options.epochs)
        with without_kernels():
            runs[name] = fast, train(name, data, options.epochs)
    rows = [(name, f"{fast.accuracy:.1%}", f"{reference.accuracy:.1%}") for name, (fast, reference) in runs.items()]
    print(tabulate(rows, headers=("model", "test accuracy", "without kernels"), tablefmt="github"))
    plot(runs, options.out)
    print(f"loss curves: {options.out}")
    return runs


if __name__ == "__main__":
    main()
