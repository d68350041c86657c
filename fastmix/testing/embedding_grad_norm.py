"""Cases of embedding_grad_norm_sq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmix
from fastmix.reference import embedding_grad_norm as reference
from fastmix.testing.cases import Case


def embedding_case(
    name: str,
    sizes: tuple[int, int, int],
    ids: int,
    *,
    padding_idx: int | None = None,
    row_weight: bool = False,
    transform: Callable[[Tensor], Tensor] = lambda grad_output: grad_output,
    transform_ids: Callable[[Tensor], Tensor] = lambda input: input,
) -> Case:
    """sizes: B, L, D; ids: how many different ones there are."""
    b, length, d = sizes

    def make(generator):
        input = torch.randint(ids, (b, length), generator=generator)
        grad_output, weights = (torch.randn(b, length, n, generator=generator, dtype=torch.float64) for n in (d, 1))
        return {
            "input": transform_ids(input),
            "grad_output": transform(grad_output),
            "padding_idx": padding_idx,
            "row_weight": weights[..., 0] if row_weight else None,
        }

    # A norm is one number, whose error may be 0 by chance: the slice is the batch.
    return Case(
        "embedding_grad_norm",
        f"embedding_grad_norm_sq {name}",
        fastmix.embedding_grad_norm_sq,
        reference.embedding_grad_norm_sq,
        make,
    )


CASES = [
    *(
        embedding_case(f"{'x'.join(map(str, sizes))}, {ids} ids", sizes, ids)
        for sizes, ids in [
            ((4, 1, 1), 1), ((4, 1, 9), 5), ((3, 2, 5), 1), ((4, 7, 12), 3), ((3, 20, 1), 4), ((3, 20, 33), 1000),
            ((2, 20, 33), 1), ((3, 130, 16), 40), ((2, 300, 70), 17), ((70, 5, 8), 3),
        ]
    ),
    embedding_case("empty batch", (0, 7, 6), 3),
    embedding_case("no id", (3, 0, 6), 3),
    embedding_case("padding id", (3, 20, 12), 4, padding_idx=1),
    embedding_case("padding id 0", (3, 20, 12), 4, padding_idx=0),
    embedding_case("padding id that does not occur", (3, 20, 12), 4, padding_idx=7),
    embedding_case("nothing but padding", (3, 20, 12), 1, padding_idx=0),
    embedding_case("row weights", (3, 20, 12), 4, row_weight=True),
    embedding_case("row weights, padding id", (3, 20, 12), 4, row_weight=True, padding_idx=2),
    embedding_case("one gradient for a bag's ids", (3, 20, 12), 4, row_weight=True,
                   transform=lambda g: g[:, :1].expand(g.shape)),
    embedding_case("negative and huge ids", (3, 20, 12), 4, padding_idx=-(2**40),
                   transform_ids=lambda ids: torch.tensor([-1, 2**62, -(2**40), 2**32])[ids]),
    embedding_case("ids that are equal in their last 32 bits", (3, 20, 12), 4, transform_ids=lambda ids: ids << 32),
    embedding_case("transposed", (3, 20, 12), 4, transform=lambda g: g.mT.contiguous().mT),
    embedding_case("large values", (3, 20, 12), 4, transform=lambda g: 1e3 * g),
    embedding_case("small values", (3, 20, 12), 4, transform=lambda g: 1e-3 * g),
    embedding_case("nearly opposite gradients", (3, 2, 12), 1,
                   transform=lambda g: g * 0.01 + torch.tensor([1.0, -1.0])[:, None]),
]  # fmt: skip
