"""Per-sample gradient norms of an embedding table in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

from torch import Tensor

from fastmix.reference._dtypes import compute_dtype, no_autocast


def embedding_grad_norm_sq(
    input: Tensor, grad_output: Tensor, *, padding_idx: int | None = None, row_weight: Tensor | None = None
) -> Tensor:
    """‖Σ_l e_(id_l) (w_l g_l)ᵀ‖² = Σ_(l, m: id_l = id_m) w_l w_m g_l·g_m for each sample of input [B, L] (ids)."""
    g = grad_output.to(compute_dtype(grad_output))
    if row_weight is not None:
        g = g * row_weight.to(g.dtype)[..., None]
    if padding_idx is not None:
        g = g.masked_fill((input == padding_idx)[..., None], 0.0)
    same = input[:, :, None] == input[:, None, :]
    with no_autocast(grad_output):
        # The sum over equal ids in each id's place: every row holds its id's gradient, which counts once.
        rows = same.to(g.dtype) @ g
    return (rows.square().sum(2) / same.sum(2)).sum(1)
