"""Four GANs on handwritten digits, side by side: gradient normalisation, GraN, gradient penalty, and nothing.

    python examples/digits_gan.py [--steps 1000] [--out digits_gan.png]

Generator and discriminator start from the same weights and see the same batches in each of them; only what keeps the
discriminator from growing steep differs. "gn" and "gran" normalise its output by the norm of its gradient by the image
(`fastmix.nn.GradientNormalized`) and take the hinge loss; "penalty" is WGAN-GP (`fastmix.per_sample.interpolate`,
`input_gradient_penalty`); "none" is the hinge loss alone. The data are scikit-learn's 1797 images of 8×8 pixels, a
fifth of them for the test. Generated images are judged by a small classifier of digits: the Fréchet distance between
its features of them and of the test images (that of the training images is the best to be had), the share of them that
it is sure of, and the number of digits among them, the exponential of the entropy of its answers. Times are of a step
of both networks, the median. Plotted: the distance in the course of training, and images.

Wu et al., Gradient Normalization for Generative Adversarial Networks (arXiv:2109.02235); Bhaskara et al., GraN-GAN
(arXiv:2111.03162); Gulrajani et al., Improved Training of Wasserstein GANs (arXiv:1704.00028); Heusel et al., GANs
Trained by a Two Time-Scale Update Rule (arXiv:1706.08500), for the distance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from digits_data import Digits, load
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastmix.nn import GradientNormalized
from fastmix.per_sample import input_gradient_penalty, interpolate

METHODS = ("gn", "gran", "penalty", "none")
BATCH, LATENT = 64, 32
SURE = 0.9  # a probability


# The judge


@dataclass(frozen=True)
class Score:
    distance: float
    sure: float
    digits: float


class Judge:
    """Scores images by a classifier that it trains."""

    def __init__(self, data: Digits) -> None:
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU()),
        )
        self.head = nn.Linear(32, 10)
        self.model = nn.Sequential(self.features, self.head)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        for _ in range(12):
            for batch in torch.randperm(len(data.train_labels)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(self.model(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
        with torch.inference_mode():
            self.accuracy = (self.model(data.test_images).argmax(1) == data.test_labels).float().mean().item()
            self.real = self.features(data.test_images).double()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Score:
        features = self.features(images)
        answers = self.head(features).softmax(dim=1)
        digits = torch.special.entr(answers.mean(dim=0)).sum().exp()
        sure = (answers.amax(dim=1) >= SURE).float().mean()
        return Score(frechet_distance(features.double(), self.real).item(), sure.item(), digits.item())


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between Gaussians with the moments of two samples [N, D], squared: |μ − ν|² + tr(A + B − 2(AB)^½)."""
    cov_a, cov_b = a.mT.cov(), b.mT.cov()
    # AB has real eigenvalues of at least 0, up to rounding.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root


# The GANs


def discriminator(width: int) -> nn.Sequential:
    """[B, 1, 8, 8] → [B, 1], piecewise linear, without norms."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.1)),
        *(nn.Flatten(), nn.Linear(16 * width, 1)),
    )


def generator(width: int) -> nn.Sequential:
    """[B, LATENT] → [B, 1, 8, 8] in (−1, 1)."""
    return nn.Sequential(
        *(nn.Linear(LATENT, 16 * width), nn.Unflatten(1, (4 * width, 2, 2)), nn.BatchNorm2d(4 * width), nn.ReLU()),
        *(nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 1, 3, padding=1), nn.Tanh()),
    )


class Gan:
    def __init__(self, method: str, width: int, rate: float, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.method = method
        self.generator, self.discriminator = generator(width), discriminator(width)
        normalised = method in ("gn", "gran")
        self.critic = GradientNormalized(self.discriminator, method) if normalised else self.discriminator
        self.adams = [
            torch.optim.Adam(model.parameters(), lr=rate, betas=(0.0, 0.9))
            for model in (self.discriminator, self.generator)
        ]
        self.decays = [torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps) for adam in self.adams]

    def step(self, real: Tensor, z: Tensor) -> None:
        """One of the discriminator and one of the generator; z: [2, B, LATENT]."""
        adam_d, adam_g = self.adams
        with torch.no_grad():
            fake = self.generator(z[0])
        adam_d.zero_grad()
        self.loss(real, fake).backward()
        adam_d.step()
        adam_g.zero_grad()
        self.discriminator.requires_grad_(False)
        (-self.critic(self.generator(z[1])).mean()).backward()
        self.discriminator.requires_grad_(True)
        adam_g.step()
        for decay in self.decays:
            decay.step()

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's."""
        on_real, on_fake = self.critic(torch.cat([real, fake])).chunk(2)
        if self.method == "penalty":
            penalty = input_gradient_penalty(self.critic, interpolate(real, fake), target=1.0)
            return on_fake.mean() - on_real.mean() + 10 * penalty
        return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        self.generator.eval()
        images = self.generator(z)
        self.generator.train()
        return images


@dataclass
class Run:
    """distances: (step, Fréchet distance) in the course of training; seconds: of each step."""

    gan: Gan
    distances: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    score: Score | None = None
    images: Tensor | None = None

    def score_images(self, step: int, judge: Judge, z: Tensor) -> None:
        self.images = self.gan.images(z)
        self.score = judge(self.images)
        self.distances.append((step, self.score.distance))


def train(data: Digits, judge: Judge, options: argparse.Namespace) -> dict[str, Run]:
    runs = {method: Run(Gan(method, options.width, options.rate, options.steps, options.seed)) for method in METHODS}
    z_shown = torch.randn(len(data.train_images), LATENT)
    for run in runs.values():
        run.score_images(0, judge, z_shown)
    often = -(-options.steps // options.points)
    for step in tqdm(range(1, options.steps + 1), unit="step"):
        real = data.train_images[torch.randint(len(data.train_images), (BATCH,))]
        z = torch.randn(2, BATCH, LATENT)
        for run in runs.values():
            start = time.perf_counter()
            run.gan.step(real, z)
            run.seconds.append(time.perf_counter() - start)
            if step % often == 0 or step == options.steps:
                run.score_images(step, judge, z_shown)
    return runs


def plot(runs: dict[str, Run], best: float, real: Tensor, path: str) -> None:
    figure = Figure(figsize=(12, 4.6), layout="tight")
    axes = figure.subplot_mosaic([["curve", *runs, "real"]], width_ratios=[3, *[1] * (len(runs) + 1)])
    for method, run in runs.items():
        axes["curve"].semilogy(*zip(*run.distances, strict=True), label=method)
    axes["curve"].axhline(best, color="black", linestyle=":", label="training images")
    axes["curve"].set(xlabel="step", ylabel="Fréchet distance to test images")
    axes["curve"].legend()
    for name, images in {**{method: run.images for method, run in runs.items()}, "real": real}.items():
        rows = F.pad(images[:50], (1, 1, 1, 1), value=-1.0).view(10, 5, 10, 10)
        axes[name].imshow(rows.transpose(1, 2).reshape(100, 50).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes[name].set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """Returns the run of each method."""
    parser = argparse.ArgumentParser(description="GANs with gradient normalisation, GraN, gradient penalty.")
    parser.add_argument("--steps", type=int, default=1000, help="of each network")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer")
    parser.add_argument("--rate", type=float, default=1e-3, help="both networks' learning rate, which falls to 0")
    parser.add_argument("--points", type=int, default=20, help="of the curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="digits_gan.png", help="the plot")
    # Networks as small as these only wait for a second thread.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = load(lowest=-1.0)
    judge = Judge(data)
    print(f"the judge recognises {judge.accuracy:.1%} of the test images")
    runs = train(data, judge, options)
    best = judge(data.train_images)
    rows = [(*_score(method, run.score), f"{1e3 * statistics.median(run.seconds):.1f}") for method, run in runs.items()]
    headers = ("method", "Fréchet distance", f"sure ≥ {SURE}", "digits", "ms a step")
    print(tabulate([*rows, (*_score("training images", best), "")], headers=headers, tablefmt="github"))
    plot(runs, best.distance, data.train_images, options.out)
    print(f"curves and images: {options.out}")
    return runs


def _score(name: str, score: Score) -> tuple[str, ...]:
    return name, f"{score.distance:.1f}", f"{score.sure:.1%}", f"{score.digits:.1f}"


if __name__ == "__main__":
    main()
