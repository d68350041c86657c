"""Models whose samples' gradients `fastmix bench grad_norm` measures, with a loss for each sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 1000


@dataclass(frozen=True)
class Setting:
    """A model and batches of it: make() the model, draw(generator) its input x in float64 or int64 and labels y."""

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], dict[str, Tensor]]

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """x, y, and the parameters by their names, as the model's modules initialise them."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(generator.initial_seed())
            model = self.make().double()
        return self.draw(generator) | {name: parameter.detach() for name, parameter in model.named_parameters()}

    def model(self, parameters: dict[str, Tensor]) -> nn.Module:
        """The model on these tensors, without memory of its own."""
        with torch.device("meta"):
            model = self.make()
        model.load_state_dict(parameters, assign=True)
        return model


def losses(output: Tensor, y: Tensor) -> Tensor:
    """[B]: the mean cross entropy over a sample's positions, of output [B, …, classes] and labels [B, …]."""
    entropies = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
    return entropies.view(len(y), -1).mean(1)


# A transformer that continues a text, of plain linear layers, so that every peer knows its layers


class CausalAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def transformer(dim: int, depth: int = 2, vocabulary: int = VOCABULARY) -> nn.Module:
    blocks = [Block(dim, max(dim // 64, 1)) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(vocabulary, dim), *blocks, nn.LayerNorm(dim), nn.Linear(dim, vocabulary))


def mlp(dim: int, depth: int = 4) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(dim, dim), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn(size: int, width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, 10),
    )


# Settings


def lm_setting(b: int, t: int, dim: int) -> Setting:
    def draw(generator):
        text = torch.randint(VOCABULARY, (b, t + 1), generator=generator)
        return {"x": text[:, :-1].contiguous(), "y": text[:, 1:].contiguous()}

    return Setting(f"LM B{b} T{t} d{dim}", functools.partial(transformer, dim), draw)


def mlp_setting(b: int, dim: int, t: int | None = None) -> Setting:
    """Linear layers on a vector a sample, or on each of its t tokens."""

    def draw(generator):
        shape = (b,) if t is None else (b, t)
        x = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.randint(dim, shape, generator=generator)}

    name = f"MLP B{b} d{dim}" if t is None else f"tokens B{b} T{t} d{dim}"
    return Setting(name, functools.partial(mlp, dim), draw)


def cnn_setting(b: int, size: int = 28, width: int = 32) -> Setting:
    def draw(generator):
        x = torch.randn(b, 1, size, size, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.randint(10, (b,), generator=generator)}

    return Setting(f"CNN B{b} 1x{size}x{size}", functools.partial(cnn, size, width), draw)
