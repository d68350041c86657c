"""Cases of external_attention."""

from __future__ import annotations

import torch

import fastmix
from fastmix.reference import external_attention as reference
from fastmix.testing.cases import Case


def external_attention_case(
    name: str, shape: tuple[int, int, int], memory: int, num_heads: int = 1, *, transform=None, size: float = 1.0
) -> Case:
    """x of `shape`; the keys are `size` times as large as makes the logits' variance 1."""

    def make(generator):
        head = shape[2] // num_heads
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        mk, mv = torch.randn(2, memory, head, generator=generator, dtype=torch.float64)
        mk = mk * (size * head**-0.5)
        return {"x": transform(x) if transform else x, "mk": mk, "mv": mv, "num_heads": num_heads}

    return Case(
        "external_attention",
        f"external_attention {name}",
        fastmix.external_attention,
        reference.external_attention,
        make,
        independent=1,
        gradients={"x": 1, "mk": 0, "mv": 0},
    )


CASES = [
    *(
        external_attention_case(f"{b}x{s}x{c}, M {m}, {heads} heads", (b, s, c), m, heads)
        for b, s, c, m, heads in [
            (1, 1, 1, 1, 1), (2, 1, 6, 5, 2), (3, 2, 1, 3, 1), (2, 7, 5, 3, 1), (2, 7, 12, 1, 4), (2, 49, 33, 17, 1),
            (2, 49, 24, 64, 3), (2, 100, 20, 9, 20), (1, 196, 64, 64, 1), (2, 197, 34, 31, 2), (1, 517, 8, 6, 1),
            (5, 16, 16, 16, 2), (1, 33, 300, 70, 1),
        ]
    ),
    external_attention_case("empty batch", (0, 6, 8), 4, 2),
    external_attention_case("no tokens", (2, 0, 8), 4, 2),
    external_attention_case("strided", (3, 20, 24), 7, 2, transform=lambda x: x.transpose(1, 2).contiguous().mT),
    external_attention_case("constant", (2, 30, 8), 5, transform=lambda x: torch.full_like(x, 0.5)),
    external_attention_case("large logits", (2, 30, 16), 8, 2, size=30.0),
    external_attention_case("one token takes all", (2, 30, 16), 8, size=3e4),
    external_attention_case("small values", (2, 30, 16), 8, 2, transform=lambda x: x * 1e-3),
    external_attention_case("large values", (2, 30, 16), 8, 2, transform=lambda x: x * 1e3, size=1e-3),
]  # fmt: skip
