"""External attention in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

from torch import Tensor

from fastmix.reference._dtypes import compute_dtype, no_autocast


def external_attention(x: Tensor, mk: Tensor, mv: Tensor, *, num_heads: int = 1) -> Tensor:
    """A·mv for each head of x [B, S, C]: A = softmax over the tokens of x·mkᵀ, divided by its sum over the memory."""
    dtype = compute_dtype(x)
    heads = x.to(dtype).unflatten(-1, (num_heads, mk.shape[1])).transpose(1, 2)  # [B, heads, S, C/heads]
    with no_autocast(x):
        attention = (heads @ mk.to(dtype).t()).softmax(dim=-2)  # [B, heads, S, M]
        attention = attention / (1e-9 + attention.sum(dim=-1, keepdim=True))
        y = attention @ mv.to(dtype)
    return y.transpose(1, 2).flatten(-2).to(x.dtype)
