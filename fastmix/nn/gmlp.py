"""gMLP and aMLP."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn._layers import ACTIVATIONS, DropPath, check_tokens, init_truncated
from fastmix.nn.encoder import ImageModel
from fastmix.ops._check import check_choice
from fastmix.ops.token_mixing import token_linear


class SpatialGatingUnit(nn.Module):
    """gMLP's gate: splits x into u and v along the channels and returns u ⊙ (W·LN(v) + b), W [S, S] along the tokens.

    One call of :func:`fastmix.token_linear`. W starts near zero (normal, σ = 1e-6) and b at 1: at first u passes.
    Liu et al., Pay Attention to MLPs (arXiv:2105.08050).

    Args:
        dim: channels of x, even; the output has half of them.
        seq_len: tokens S.
    """

    def __init__(self, dim: int, seq_len: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.dim, self.seq_len = dim, seq_len
        self.norm = nn.LayerNorm(dim // 2)
        self.proj = nn.Linear(seq_len, seq_len)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W near zero, b = 1."""
        nn.init.normal_(self.proj.weight, std=1e-6)
        nn.init.ones_(self.proj.bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """x: [B, S, dim]; added: [B, S, dim/2], aMLP's attention, joins W·LN(v) + b; returns [B, S, dim/2]."""
        check_tokens(x, self.seq_len, self.dim)
        u, v = x.chunk(2, dim=-1)
        return token_linear(
            v,
            self.proj.weight,
            self.proj.bias,
            norm="layer",
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            eps=self.norm.eps,
            gate=u,
            added=added,
        )


class TinyAttention(nn.Module):
    """aMLP's attention: one head of attention_dim channels, softmax(q·kᵀ/√attention_dim)·v, projected to out_dim."""

    def __init__(self, dim: int, out_dim: int, attention_dim: int = 64) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * attention_dim)
        self.proj = nn.Linear(attention_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class GatedMlp(nn.Module):
    """Linear, activation, spatial gating unit, linear."""

    def __init__(self, dim: int, hidden_dim: int, seq_len: int, activation: str = "gelu") -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = ACTIVATIONS[activation]()
        self.gate = SpatialGatingUnit(hidden_dim, seq_len)
        self.fc2 = nn.Linear(hidden_dim // 2, dim)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        return self.fc2(self.gate(self.act(self.fc1(x)), added))


class GMLPBlock(nn.Module):
    """gMLP's block: x += Linear(gate(gelu(Linear(LN(x))))); with attention_dim aMLP's.

    Parameters are named and shaped as timm's ``SpatialGatingBlock``; aMLP's attention is ``attn``.
    Liu et al., Pay Attention to MLPs (arXiv:2105.08050).

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: width before the gate as a multiple of dim.
        attention_dim: channels of aMLP's one attention head over LN(x), which is added to the gate; None is gMLP.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float = 6.0,
        *,
        attention_dim: int | None = None,
        activation: str = "gelu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.dim, self.seq_len = dim, seq_len
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = GatedMlp(dim, hidden_dim, seq_len, activation)
        self.attn = None if attention_dim is None else TinyAttention(dim, hidden_dim // 2, attention_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, seq_len, dim]; the same shape comes out."""
        check_tokens(x, self.seq_len, self.dim)
        normed = self.norm(x)
        attention = None if self.attn is None else self.attn(normed)
        return x + self.drop_path(self.mlp_channels(normed, attention))


class GMLP(ImageModel):
    """gMLP for images, [B, in_chans, H, W] to [B, num_classes]; ``attention_dim=64`` makes it aMLP.

    State dicts of timm's gmlp models load unchanged, and the other way round. The gates' W starts near zero (normal,
    σ = 1e-6) and b at 1, as the paper asks; it leaves the rest open: linear weights normal with σ = 0.02 (cut off
    at ±2), biases 0. Liu et al., Pay Attention to MLPs (arXiv:2105.08050).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the mean token.
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        mlp_ratio: width before the gate as a multiple of embed_dim.
        attention_dim: channels of aMLP's one attention head, None for gMLP.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path_rate: rate of stochastic depth of the last block, in [0, 1); it rises linearly from 0.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        num_blocks: int = 30,
        mlp_ratio: float = 6.0,
        attention_dim: int | None = None,
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        block = functools.partial(
            GMLPBlock, embed_dim, mlp_ratio=mlp_ratio, attention_dim=attention_dim, activation=activation
        )
        super().__init__(
            block,
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
        )
        init_truncated(self)
        for block in self.blocks:
            block.mlp_channels.gate.reset_parameters()


def gmlp_ti16(**kwargs: Any) -> GMLP:
    """gMLP-Ti/16: 30 blocks of 128 channels, 768 before the gate.

    Args:
        kwargs: arguments of :class:`GMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`GMLP`.

    Liu et al., Pay Attention to MLPs (arXiv:2105.08050).
    """
    return GMLP(**{"embed_dim": 128} | kwargs)


def gmlp_s16(**kwargs: Any) -> GMLP:
    """gMLP-S/16: 30 blocks of 256 channels, 1536 before the gate.

    Args:
        kwargs: arguments of :class:`GMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`GMLP`.

    Liu et al., Pay Attention to MLPs (arXiv:2105.08050).
    """
    return GMLP(**{"embed_dim": 256} | kwargs)


def gmlp_b16(**kwargs: Any) -> GMLP:
    """gMLP-B/16: 30 blocks of 512 channels, 3072 before the gate.

    Args:
        kwargs: arguments of :class:`GMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`GMLP`.

    Liu et al., Pay Attention to MLPs (arXiv:2105.08050).
    """
    return GMLP(**{"embed_dim": 512} | kwargs)
