"""Two tasks of different scale on one trunk, under five weightings of their losses.

    python examples/multitask.py [--epochs 30] [--out multitask.png]

A small network reads the upper half of a digit and has two heads: which digit it is (cross entropy, about 1), and the
sum of the lower half's pixels in units of one grey level out of 16 (squared error, in the thousands). Added up as they
are, the second drowns the first. Each weighting of `fastmix.losses.MultiTaskLoss` is trained from the same weights on
the same batches, beside plain sums and each task alone; the table has both tasks' test errors, the plot these and how
the weights' ratio changes in training.

Chen et al., GradNorm (arXiv:1711.02257).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits_data import Digits, load
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastmix.losses import MultiTaskLoss

BATCH = 64


@dataclass(frozen=True)
class Tasks:
    """The upper halves [N, 1, 4, 8], the digits [N], and the sums of the lower halves [N]."""

    x: Tensor
    digit: Tensor
    ink: Tensor


@dataclass(frozen=True)
class Run:
    error: float  # the share of digits not recognised
    rmse: float  # of the sums, grey levels
    ratios: list[float]  # weight of the digit's loss over that of the sum's, of each step


class Model(nn.Module):
    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(32, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.digit, self.ink = nn.Linear(hidden, 10), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.digit(h), 100 * self.ink(h)[:, 0]


def tasks(images: Tensor, labels: Tensor) -> Tasks:
    upper, lower = images.chunk(2, dim=2)
    return Tasks(upper, labels, 16 * lower.sum((1, 2, 3)))


def losses(model: Model, data: Tasks, batch: Tensor) -> list[Tensor]:
    digit, ink = model(data.x[batch])
    return [F.cross_entropy(digit, data.digit[batch]), F.mse_loss(ink, data.ink[batch])]


def weightings(model: Model, data: Tasks) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    frequencies = data.digit.bincount() / len(data.digit)
    prior = [-(frequencies * frequencies.log()).sum().item(), data.ink.var().item()]
    return {
        "plain sum": sum,
        "digit alone": lambda both: both[0],
        "sum alone": lambda both: both[1],
        "initial": MultiTaskLoss(2, "initial", warmup_steps=5),
        "prior": MultiTaskLoss(2, "prior", prior=prior),
        "realtime": MultiTaskLoss(2, "realtime"),
        # With γ = 0 its gradients have the direction of "realtime"; below, the smaller loss counts for more.
        "generalized_mean": MultiTaskLoss(2, "generalized_mean", gamma=-0.5),
        "gradient_norm": MultiTaskLoss(2, "gradient_norm", shared_parameters=model.trunk.parameters()),
    }


def train(name: str, data: Digits, options: argparse.Namespace) -> Run:
    torch.manual_seed(options.seed)
    model = Model()
    known, unseen = tasks(data.train_images, data.train_labels), tasks(data.test_images, data.test_labels)
    weigh, ratios = weightings(model, known)[name], []
    steps = options.epochs * (len(known.x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps)
    for _ in tqdm(range(options.epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(known.x)).split(BATCH)[: len(known.x) // BATCH]:
            optimizer.zero_grad()
            weigh(losses(model, known, batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # so that no weighting gains by a larger step
            optimizer.step()
            schedule.step()
            if isinstance(weigh, MultiTaskLoss):
                ratios.append((weigh.weights[0] / weigh.weights[1]).item())
    with torch.inference_mode():
        digit, ink = model(unseen.x)
    error = (digit.argmax(1) != unseen.digit).float().mean().item()
    return Run(error, math.sqrt(F.mse_loss(ink, unseen.ink).item()), ratios)


def plot(runs: dict[str, Run], path: str) -> None:
    figure = Figure(figsize=(13, 3.6), layout="tight")
    errors, rmse, ratios = figure.subplots(1, 3)
    errors.barh(list(runs), [100 * run.error for run in runs.values()])
    rmse.barh(list(runs), [run.rmse for run in runs.values()])
    for name, run in runs.items():
        if run.ratios:
            ratios.semilogy(run.ratios, label=name, linewidth=0.8)
    errors.set(xlabel="digit: error, %")
    rmse.set(xlabel="sum: error, grey levels", yticks=[])
    for axes in (errors, rmse):
        axes.invert_yaxis()  # in the table's order
    ratios.set(xlabel="step", ylabel="weight of the digit / of the sum")
    ratios.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """Returns the run of each weighting."""
    parser = argparse.ArgumentParser(description="Two tasks of different scale under several weightings.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=3e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="multitask.png", help="the plot")
    # Networks as small as these only wait for a second thread.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    data = load()
    names = weightings(Model(), tasks(data.train_images, data.train_labels))
    runs = {name: train(name, data, options) for name in names}
    rows = [(name, f"{run.error:.1%}", f"{run.rmse:.2f}") for name, run in runs.items()]
    headers = ("weighting", "digit: error", "sum: error, grey levels")
    print(tabulate(rows, headers=headers, tablefmt="github"))
    plot(runs, options.out)
    print(f"plot: {options.out}")
    return runs


if __name__ == "__main__":
    main()
