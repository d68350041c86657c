"""Cases of token_conv."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmix
from fastmix.reference import token_conv as reference
from fastmix.testing.cases import Case


def token_conv_case(
    name: str,
    shape: tuple[int, int, int],
    taps: int,
    *,
    kind: str = "depthwise",
    heads: int = 1,
    causal: bool = False,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
    transform_kernel: Callable[[Tensor], Tensor] = lambda kernel: kernel,
) -> Case:
    """shape: of x; heads: of all but "depthwise"."""
    batch, tokens, channels = shape
    rows = {"depthwise": (channels,), "lightweight": (heads,), "dynamic": (batch, tokens, heads)}[kind]

    def make(generator):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        kernel = torch.randn(*rows, taps, generator=generator, dtype=torch.float64)
        return {"x": transform(x), "kernel": transform_kernel(kernel), "kind": kind, "causal": causal}

    return Case(
        "token_conv",
        f"{kind} {name}",
        fastmix.token_conv,
        reference.token_conv,
        make,
        independent=1,
        gradients={"x": 1, "kernel": 1 if kind == "dynamic" else 0},
    )


def _cases(kind: str) -> list[Case]:
    """What the three kinds have in common. Channels are 2 × heads × an odd number, or as the name says."""

    def case(name, shape, taps, **options):
        return token_conv_case(name, shape, taps, kind=kind, **options)

    return [
        *(
            case(f"{b}x{s}x{c}, {heads} heads, K = {k}{', causal' if causal else ''}", (b, s, c), k, heads=heads,
                 causal=causal)
            for b, s, c, heads, k, causal in [
                (2, 1, 1, 1, 1, False), (2, 1, 6, 2, 3, True), (2, 2, 15, 3, 4, False), (2, 7, 5, 5, 1, False),
                (2, 7, 10, 1, 5, True), (3, 7, 42, 2, 7, False), (2, 7, 9, 3, 20, False), (2, 7, 9, 3, 21, True),
                (1, 100, 64, 2, 3, False), (1, 100, 20, 2, 8, False), (2, 100, 33, 3, 31, False),
                (1, 130, 70, 1, 31, True), (2, 90, 16, 2, 12, True), (2, 197, 12, 4, 7, False),
                (1, 197, 8, 1, 150, False),
            ]
        ),
        case("empty batch", (0, 7, 6), 3, heads=2),
        case("no token", (2, 0, 6), 3, heads=2),
        case("no channel", (2, 7, 0), 3, heads=1),
        case("transposed", (2, 30, 12), 5, heads=2, transform=lambda x: x.mT.contiguous().mT),
        case("a chunk of the channels", (2, 30, 12), 5, heads=2, transform=lambda x: x.repeat(1, 1, 2)[..., 7:19]),
        case("strided channels", (2, 30, 12), 5, heads=2, transform=lambda x: x.repeat(1, 1, 2)[..., ::2]),
        case("expanded", (3, 30, 12), 5, heads=2, transform=lambda x: x[:1].expand(3, 30, 12)),
        case("transposed kernel", (2, 30, 12), 5, heads=2, transform_kernel=lambda k: k.mT.contiguous().mT),
        case("large values", (2, 30, 12), 5, heads=2, transform=lambda x: x * 1e3),
        case("small values", (2, 30, 12), 5, heads=2, transform=lambda x: x * 1e-3),
    ]  # fmt: skip


CASES = [
    *(case for kind in ("depthwise", "lightweight", "dynamic") for case in _cases(kind)),
    *(
        token_conv_case("large logits", (2, 30, 12), 5, kind=kind, heads=2, transform_kernel=lambda kernel: 30 * kernel)
        for kind in ("lightweight", "dynamic")
    ),
    token_conv_case("wide heads", (1, 20, 150), 9, kind="dynamic", heads=1),
    token_conv_case("large kernel", (2, 30, 12), 5, transform_kernel=lambda kernel: 100 * kernel),
]
