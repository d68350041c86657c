"""FNet's encoder and its linear and random ablations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmix.init import lecun_truncated_normal_
from fastmix.nn._layers import Mlp, add_weight, check_tokens
from fastmix.nn.fft_mixing import FourierMixing
from fastmix.ops._check import check_choice
from fastmix.ops.token_mixing import token_linear

_MIXINGS = ("fourier", "linear", "random")


class LinearMixing(nn.Module):
    """FNet's ablation of the Fourier transform: W_S·x·W_C, a matrix along the tokens and one along the channels.

    Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms (arXiv:2105.03824).

    Args:
        dim: channels C.
        seq_len: tokens S.
        trainable: True ("linear": normal with σ = 0.02 at first), or False ("random": constant, variance 1/fan-in).
    """

    def __init__(self, dim: int, seq_len: int, *, trainable: bool = True) -> None:
        super().__init__()
        for name, size in (("weight_tokens", seq_len), ("weight_channels", dim)):
            weight = torch.empty(size, size)
            weight = nn.init.normal_(weight, std=0.02) if trainable else lecun_truncated_normal_(weight)
            add_weight(self, name, weight, trainable)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, C]; the same shape comes out."""
        check_tokens(x, len(self.weight_tokens), len(self.weight_channels))
        return token_linear(x @ self.weight_channels, self.weight_tokens)

    def extra_repr(self) -> str:
        return f"{len(self.weight_channels)}, seq_len={len(self.weight_tokens)}"


class FNetBlock(nn.Module):
    """FNet's block: x = LN(x + mix(x)), then x = LN(x + MLP(x)), with eps 1e-12.

    Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms (arXiv:2105.03824).

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP as a multiple of dim.
        mixing: "fourier", "linear" or "random".
        seq_len: tokens S; "fourier" takes any number and needs none.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        dropout: rate of dropout behind the MLP.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        *,
        mixing: str = "fourier",
        seq_len: int | None = None,
        activation: str = "gelu_tanh",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("mixing", mixing, _MIXINGS)
        if mixing == "fourier":
            self.mixing = FourierMixing()
        elif seq_len is None:
            raise ValueError(f"seq_len must be the number of tokens where mixing is {mixing!r}, got None")
        else:
            self.mixing = LinearMixing(dim, seq_len, trainable=mixing == "linear")
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: [B, S, C]; lengths: [B], see :class:`FNet`; the same shape comes out."""
        if lengths is None:
            mixed = self.mixing(x)
        elif isinstance(self.mixing, FourierMixing):
            mixed = self.mixing(x, lengths)
        else:
            raise ValueError("lengths must be None where mixing is not 'fourier'")
        x = self.norm1(x + mixed)
        return self.norm2(x + self.dropout(self.mlp(x)))


class FNet(nn.Module):
    """FNet's encoder, [B, S, C] to [B, S, C]: post-norm blocks that mix tokens and channels by a Fourier transform.

    Embeddings and heads are the user's. As in the paper's code, weights start normal with σ = 0.02, and so do the first
    biases of the MLPs; the second ones start at 0. Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms
    (arXiv:2105.03824).

    Args:
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        mlp_ratio: hidden width of the MLPs as a multiple of embed_dim.
        mixing: "fourier", or the paper's ablations "linear" (learned matrices) and "random" (constant ones).
        seq_len: tokens S; "fourier" takes any number and needs none.
        activation: "gelu", "gelu_tanh" (the paper's code's), "relu" or "silu".
        dropout: rate of dropout behind the MLPs.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        num_blocks: int = 12,
        mlp_ratio: float = 4.0,
        mixing: str = "fourier",
        seq_len: int | None = None,
        activation: str = "gelu_tanh",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        named = {"mixing": mixing, "seq_len": seq_len, "activation": activation, "dropout": dropout}
        self.blocks = nn.ModuleList(FNetBlock(embed_dim, mlp_ratio, **named) for _ in range(num_blocks))
        for block in self.blocks:
            for weight in (block.mlp.fc1.weight, block.mlp.fc1.bias, block.mlp.fc2.weight):
                nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(block.mlp.fc2.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encodes x.

        Args:
            x: [B, S, C].
            lengths: [B], int32 or int64; the Fourier transform then takes only the first lengths[b] tokens of a
                sample, so that its padding does not count. The paper's own encoder has no such mask.

        Returns:
            [B, S, C].
        """
        for block in self.blocks:
            x = block(x, lengths)
        return x


def fnet_base(**kwargs: Any) -> FNet:
    """FNet-Base: 12 blocks of 768 channels, hidden width 3072.

    Args:
        kwargs: arguments of :class:`FNet`, which override these sizes.

    Returns:
        The encoder, freshly initialised.

    Raises:
        ValueError: as :class:`FNet`.

    Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms (arXiv:2105.03824).
    """
    return FNet(**{"embed_dim": 768, "num_blocks": 12} | kwargs)


def fnet_large(**kwargs: Any) -> FNet:
    """FNet-Large: 24 blocks of 1024 channels, hidden width 4096.

    Args:
        kwargs: arguments of :class:`FNet`, which override these sizes.

    Returns:
        The encoder, freshly initialised.

    Raises:
        ValueError: as :class:`FNet`.

    Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms (arXiv:2105.03824).
    """
    return FNet(**{"embed_dim": 1024, "num_blocks": 24} | kwargs)
