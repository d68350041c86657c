"""The density of digits under a VAE, estimated with more and more latents.

    python examples/vae_density.py [--likelihood bernoulli] [--out vae_density.png]

Trains a VAE on scikit-learn's 1797 digits of 8×8 pixels and estimates log p(x) of the held-out ones with K = 1 … 5000
latents each (`fastmix.losses.vae_log_prob`). The expected estimate is a lower bound that rises with K: K = 1 is the
usual bound (ELBO), and the curve flattens where it is near the truth. Beside it: the same for images of noise and of
digits upside down, which should be less likely, and how well the density tells them from digits (AUC). Latents are
decoded in chunks: K = 5000 needs no more memory than a chunk.

Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (arXiv:1509.00519).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from digits_data import load
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastmix.losses import vae_log_prob

BATCH = 64
VARIANCE = 0.02  # of the Gaussian likelihood


class VAE(nn.Module):
    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, 64), nn.Unflatten(1, (1, 8, 8))
        )

    def log_prob(self, x: Tensor, num_samples: int, likelihood: str, generator: torch.Generator) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        options = {"variance": VARIANCE} if likelihood == "gaussian" else {}
        return vae_log_prob(
            x, self.decoder, mu, logvar, num_samples, likelihood=likelihood, generator=generator, **options
        )


@dataclass(frozen=True)
class Densities:
    """log p(x) [N] for each K, of each kind of images."""

    of: dict[str, dict[int, Tensor]]

    def mean(self, kind: str, k: int) -> float:
        return self.of[kind][k].mean().item()

    def auc(self, kind: str, k: int) -> float:
        """The chance that a digit has a higher density than an image of this kind."""
        values = torch.cat([self.of["digits"][k], self.of[kind][k]])
        labels = [1] * len(self.of["digits"][k]) + [0] * len(self.of[kind][k])
        return roc_auc_score(labels, values)


def train(images: Tensor, options: argparse.Namespace) -> VAE:
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = VAE(options.latent, options.hidden)
    steps = options.epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps)
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for _ in range(options.epochs):
            for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                loss = -model.log_prob(images[batch], options.train_samples, options.likelihood, generator).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.set_postfix(bound=f"{-loss.item():.1f}", refresh=False)
                progress.update()
    return model


def evaluate(model: VAE, kinds: dict[str, Tensor], options: argparse.Namespace) -> Densities:
    generator = torch.Generator().manual_seed(options.seed)
    found: dict[str, dict[int, Tensor]] = {kind: {} for kind in kinds}
    jobs = [(kind, k) for k in options.samples for kind in kinds]
    for kind, k in tqdm(jobs, desc="density", unit="estimate"):
        with torch.inference_mode():
            found[kind][k] = model.log_prob(kinds[kind], k, options.likelihood, generator)
    return Densities(found)


def plot(densities: Densities, path: str) -> None:
    figure = Figure(figsize=(9, 3.6), layout="tight")
    curve, histogram = figure.subplots(1, 2)
    samples = list(densities.of["digits"])
    curve.semilogx(samples, [densities.mean("digits", k) for k in samples], marker="o")
    curve.set(xlabel="latents K", ylabel="estimate of log p(x), nats", title="held-out digits, mean")
    kinds = ("digits", "upside down")  # beside what is shuffled, far below, these two could not be told apart
    values = [densities.of[kind][max(samples)].numpy() for kind in kinds]
    histogram.hist(values, bins=40, histtype="stepfilled", alpha=0.6, label=kinds)
    histogram.set(xlabel=f"log p(x), K = {max(samples)}", ylabel="images")
    histogram.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> Densities:
    parser = argparse.ArgumentParser(description="The density of digits under a VAE.")
    parser.add_argument("--likelihood", choices=("gaussian", "bernoulli"), default="gaussian")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--train-samples", type=int, default=5, help="latents of a training image")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 5, 10, 50, 100, 500, 1000, 5000], metavar="K")
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="vae_density.png", help="the plot")
    options = parser.parse_args(argv)
    data = load()
    model = train(data.train_images, options)
    digits = data.test_images
    shuffled = digits.flatten()[torch.randperm(digits.numel())].view_as(digits)
    densities = evaluate(model, {"digits": digits, "upside down": digits.flip(2), "shuffled": shuffled}, options)
    rows = [
        (k, *(f"{densities.mean(kind, k):.2f}" for kind in densities.of), f"{densities.auc('upside down', k):.3f}")
        for k in options.samples
    ]
    headers = ("K", *(f"log p, {kind}" for kind in densities.of), "AUC, upside down")
    print(tabulate(rows, headers=headers, tablefmt="github"))
    plot(densities, options.out)
    print(f"curves: {options.out}")
    return densities


if __name__ == "__main__":
    main()
