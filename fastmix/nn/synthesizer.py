"""Synthesizer: attention whose weights do not come from comparing tokens."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn._layers import add_weight, check_heads, check_tokens, init_truncated
from fastmix.nn.encoder import Encoder, PreNormBlock
from fastmix.ops._check import check_choice
from fastmix.ops.token_mixing import token_linear

_KINDS = ("random", "factorized_random", "dense", "factorized_dense")


class Synthesizer(nn.Module):
    """Multi-head attention with synthesised weights, [B, S, C] to [B, S, C]: out(softmax(R)·value(x)), per head.

    - "random": R is a parameter [S, S], the same for every sample; one call of :func:`fastmix.token_linear`.
    - "factorized_random": R = R1·R2ᵀ with R1, R2 [S, rank].
    - "dense": a token's row of R is W2·relu(W1·x + b1) + b2.
    - "factorized_dense": that row is the outer product of two such predictions, of lengths a and b with a·b = S.

    R, R1 and R2 start from N(0, 1) (the paper leaves it open), linear weights normal with σ = 0.02 (cut off at ±2),
    biases 0. Tay et al., Synthesizer: Rethinking Self-Attention for Transformer Models (arXiv:2005.00743).

    Args:
        dim: channels C.
        seq_len: tokens S.
        kind: "random", "factorized_random", "dense" or "factorized_dense".
        num_heads: heads, a divisor of dim.
        rank: columns of R1 and R2.
        trainable: False keeps R (R1 and R2) as drawn, the paper's fixed random Synthesizer.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        kind: str = "random",
        *,
        num_heads: int = 1,
        rank: int = 8,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, _KINDS)
        check_heads(num_heads, dim)
        if kind in ("dense", "factorized_dense") and not trainable:
            raise ValueError(f"trainable must be True where kind is {kind!r}, got False")
        self.dim, self.seq_len, self.kind, self.num_heads = dim, seq_len, kind, num_heads
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        head_dim = dim // num_heads
        if kind == "random":
            add_weight(self, "r", torch.randn(num_heads, seq_len, seq_len), trainable)
        elif kind == "factorized_random":
            add_weight(self, "r1", torch.randn(num_heads, seq_len, rank), trainable)
            add_weight(self, "r2", torch.randn(num_heads, seq_len, rank), trainable)
        else:
            self.fc1 = nn.Linear(dim, dim)
            # The heads' own second layers, [heads, rows of R, C/heads] and [heads, rows of R].
            lengths = (seq_len,) if kind == "dense" else _balanced_factors(seq_len)
            shapes = [(num_heads, length, head_dim) for length in lengths]
            self.w2 = nn.ParameterList(nn.init.trunc_normal_(torch.empty(shape), std=0.02) for shape in shapes)
            self.b2 = nn.ParameterList(torch.zeros(shape[:2]) for shape in shapes)
        init_truncated(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, C]; the same shape comes out."""
        check_tokens(x, self.seq_len, self.dim)
        value = self.value(x)
        if self.kind == "random":
            return self.out(token_linear(value, self.r.softmax(dim=-1)))
        if self.kind == "factorized_random":
            return self.out(token_linear(value, (self.r1 @ self.r2.transpose(1, 2)).softmax(dim=-1)))
        hidden, value = self._heads(F.relu(self.fc1(x))), self._heads(value)
        if self.kind == "dense":
            # W2's rows are the keys of an attention: its softmax needs no [B, heads, S, S] where PyTorch fuses it.
            key, bias = self.w2[0].expand(len(x), -1, -1, -1), self.b2[0][:, None]
            mixed = F.scaled_dot_product_attention(hidden, key, value, attn_mask=bias, scale=1.0)
        else:
            a, b = (hidden @ w2.mT + b2[:, None] for w2, b2 in zip(self.w2, self.b2, strict=True))
            scores = (a[..., :, None] * b[..., None, :]).flatten(3)  # [B, heads, S, a·b]
            mixed = scores.softmax(dim=-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, C] to [B, heads, S, C/heads]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, seq_len={self.seq_len}, kind={self.kind!r}, num_heads={self.num_heads}"


class SynthesizerEncoder(Encoder):
    """A pre-norm Transformer encoder with :class:`Synthesizer` for attention, [B, S, C] to [B, S, C].

    Tay et al., Synthesizer: Rethinking Self-Attention for Transformer Models (arXiv:2005.00743).

    Args:
        embed_dim: channels of a token.
        seq_len: tokens S.
        num_blocks: how many blocks.
        kind: "random", "factorized_random", "dense" or "factorized_dense".
        num_heads: heads, a divisor of embed_dim.
        trainable: False keeps the random weights as drawn.
        mlp_ratio: hidden width of the MLPs as a multiple of embed_dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path_rate: rate of stochastic depth of the last block, in [0, 1); it rises linearly from 0.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        seq_len: int,
        num_blocks: int = 6,
        kind: str = "random",
        num_heads: int = 8,
        trainable: bool = True,
        mlp_ratio: float = 4.0,
        activation: str = "relu",
        drop_path_rate: float = 0.0,
    ) -> None:
        mixer = functools.partial(Synthesizer, embed_dim, seq_len, kind, num_heads=num_heads, trainable=trainable)
        super().__init__(
            functools.partial(PreNormBlock, embed_dim, mixer, mlp_ratio, activation=activation),
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            drop_path_rate=drop_path_rate,
        )
        init_truncated(self)


def _balanced_factors(n: int) -> tuple[int, int]:
    """a ≥ b with a·b = n, as equal as can be."""
    b = next(b for b in range(math.isqrt(n), 0, -1) if n % b == 0)
    return n // b, b
