"""Convolutions along the tokens as sublayers, and the encoder of Pre-trained Convolutions."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn._layers import check_heads
from fastmix.nn.encoder import Encoder, PreNormBlock
from fastmix.ops._check import check_choice
from fastmix.ops.token_conv import token_conv

_KINDS = ("depthwise", "lightweight", "dynamic")


class TokenConv(nn.Module):
    """Gated linear unit, convolution along the tokens, linear layer: [B, S, C] to [B, S, C].

    out(:func:`fastmix.token_conv` (a ⊙ sigmoid(b), kernel)) with a, b = Linear(x). A "depthwise" kernel is a channel's
    own, a "lightweight" one a head's, normalised by a softmax, a "dynamic" one is predicted for each token and head.
    Weights start Xavier-uniform, depthwise kernels uniform in ±1/√kernel_size, biases 0.
    Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions (arXiv:1901.10430); Tay et al., Are
    Pre-trained Convolutions Better than Pre-trained Transformers? (arXiv:2105.03322).

    Args:
        dim: channels C.
        kernel_size: tokens K that an output sees.
        kind: "depthwise", "lightweight" or "dynamic".
        num_heads: heads of the lightweight and the dynamic kind, a divisor of dim; "depthwise" has none.
        causal: a token sees itself and those before it.
    """

    def __init__(
        self, dim: int, kernel_size: int = 7, kind: str = "depthwise", *, num_heads: int = 1, causal: bool = False
    ) -> None:
        super().__init__()
        check_choice("kind", kind, _KINDS)
        check_heads(num_heads, dim)
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if kind == "depthwise" and num_heads != 1:
            raise ValueError(f"num_heads must be 1 where kind is 'depthwise', got {num_heads}")
        self.kernel_size, self.kind, self.num_heads, self.causal = kernel_size, kind, num_heads, causal
        self.proj_in = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, dim)
        if kind == "dynamic":
            self.proj_kernel = nn.Linear(dim, num_heads * kernel_size, bias=False)
        else:
            rows = dim if kind == "depthwise" else num_heads
            self.kernel = nn.Parameter(torch.empty(rows, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        for module in self.children():
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.kind == "depthwise":
            nn.init.uniform_(self.kernel, -(self.kernel_size**-0.5), self.kernel_size**-0.5)
        elif self.kind == "lightweight":
            nn.init.xavier_uniform_(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, C]; the same shape comes out."""
        x = F.glu(self.proj_in(x), dim=-1)
        if self.kind == "dynamic":
            kernel = self.proj_kernel(x).unflatten(-1, (self.num_heads, self.kernel_size))
        else:
            kernel = self.kernel
        return self.proj_out(token_conv(x, kernel, kind=self.kind, causal=self.causal))

    def extra_repr(self) -> str:
        heads = "" if self.kind == "depthwise" else f", num_heads={self.num_heads}"
        return f"kernel_size={self.kernel_size}, kind={self.kind!r}{heads}, causal={self.causal}"


class TokenConvEncoder(Encoder):
    """A pre-norm encoder with :class:`TokenConv` in place of attention, [B, S, C] to [B, S, C].

    It knows no positions: convolutions see them. Tay et al., Are Pre-trained Convolutions Better than Pre-trained
    Transformers? (arXiv:2105.03322).

    Args:
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        kernel_size: tokens that an output sees.
        kind: "depthwise", "lightweight" or "dynamic".
        num_heads: heads of the lightweight and the dynamic kind, a divisor of embed_dim.
        causal: a token sees itself and those before it.
        mlp_ratio: hidden width of the MLPs as a multiple of embed_dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path_rate: rate of stochastic depth of the last block, in [0, 1); it rises linearly from 0.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        num_blocks: int = 12,
        kernel_size: int = 7,
        kind: str = "depthwise",
        num_heads: int = 1,
        causal: bool = False,
        mlp_ratio: float = 4.0,
        activation: str = "relu",
        drop_path_rate: float = 0.0,
    ) -> None:
        mixer = functools.partial(TokenConv, embed_dim, kernel_size, kind, num_heads=num_heads, causal=causal)
        super().__init__(
            functools.partial(PreNormBlock, embed_dim, mixer, mlp_ratio, activation=activation),
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            drop_path_rate=drop_path_rate,
        )
