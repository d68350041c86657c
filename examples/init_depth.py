"""What 100 layers do to activations and gradients, under each residual form and initialisation, before any training.

    python examples/init_depth.py [--layers 100] [--dim 256] [--out init_depth.png]

Every layer is a branch W2·φ(W1·x), φ a ReLU scaled so that its second moment is 1 (`fastmix.init.activation_gain`), and
the forms join it to x; "none" has no residual connection. Plotted for each layer l: the second moment of its output,
and the norm of the loss's gradient by it, as a multiple of that at the last layer. Where a curve falls off, the lower
layers do not learn; where it rises, a step of one size for all is too large for some. "warmup_alpha" is shown at
α = 0.1, on its way to post-norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastmix import init
from fastmix.nn import Residual

INITIALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "lecun": init.lecun_normal_,
    "lecun, truncated": init.lecun_truncated_normal_,
    "he": init.he_normal_,
    "xavier": init.xavier_normal_,
    "orthogonal": init.orthogonal_,
}
FORMS = ("none", "post", "pre", "rezero", "skipinit", "fixup", "warmup_alpha")
Curves = tuple[list[float], list[float]]  # of each layer: second moment, gradient norm


class ScaledReLU(nn.Module):
    """√2·relu, whose second moment is that of its normal input."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = init.activation_gain("relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.relu(x)


def build(form: str, initialise: Callable[[Tensor], Tensor], layers: int, dim: int) -> nn.Sequential:
    blocks = []
    for _ in range(layers):
        branch = nn.Sequential(nn.Linear(dim, dim, bias=False), ScaledReLU(), nn.Linear(dim, dim, bias=False))
        for layer in (branch[0], branch[2]):
            initialise(layer.weight)
        if form in ("post", "pre"):
            branch = Residual(branch, form, norm=nn.LayerNorm(dim))
        elif form == "warmup_alpha":
            branch = Residual(branch, form, norm=nn.LayerNorm(dim), alpha_steps=10, advance="step")
            branch.step()
        elif form != "none":
            branch = Residual(branch, form)
        blocks.append(branch)
    model = nn.Sequential(*blocks)
    return init.fixup_(model) if form == "fixup" else model


def measure(model: nn.Sequential, x: Tensor) -> Curves:
    """The loss is a random direction of the last layer's output, so that its gradient there is the same for all."""
    outputs = []
    for block in model:
        x = block(x)
        outputs.append(x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((x * direction).sum(), outputs)
    last = grads[-1].norm()
    return [y.square().mean().item() for y in outputs], [(grad.norm() / last).item() for grad in grads]


def plot(curves: dict[tuple[str, str], Curves], path: str) -> None:
    initialisers = list(dict.fromkeys(initialiser for initialiser, _ in curves))
    figure = Figure(figsize=(3.4 * len(initialisers), 6), layout="tight")
    axes = figure.subplots(2, len(initialisers), sharex=True, sharey="row", squeeze=False)
    for column, initialiser in enumerate(initialisers):
        for (of, form), both in curves.items():
            for ax, values in zip(axes[:, column], both, strict=True):
                if of == initialiser:
                    ax.semilogy(range(1, len(values) + 1), values, label=form)
        axes[0, column].set(title=initialiser, ylim=(1e-6, 1e6))
        axes[1, column].set(xlabel="layer", ylim=(1e-6, 1e6))
    axes[0, 0].set_ylabel("second moment")
    axes[1, 0].set_ylabel("gradient, last layer's = 1")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[tuple[str, str], Curves]:
    """Returns (initialiser, form) → curves."""
    parser = argparse.ArgumentParser(description="Second moments and gradients through deep stacks.")
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="init_depth.png", help="the plot")
    options = parser.parse_args(argv)
    initialisers = INITIALISERS | {
        "roformer_v2": partial(init.roformer_v2_, hidden_size=options.dim, num_layers=options.layers)
    }
    torch.manual_seed(options.seed)
    x, curves = torch.randn(options.batch, options.dim), {}
    for initialiser, form in tqdm([(i, form) for i in initialisers for form in FORMS], unit="stack"):
        curves[initialiser, form] = measure(build(form, initialisers[initialiser], options.layers, options.dim), x)
    rows = [(*of, moments[0], moments[-1], grads[0]) for of, (moments, grads) in curves.items()]
    headers = ("initialisation", "form", "second moment, first", "last", "gradient, first")
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2g"))
    plot(curves, options.out)
    print(f"curves: {options.out}")
    return curves


if __name__ == "__main__":
    main()
