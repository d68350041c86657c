"""External attention and EAMLP, the image model on it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastmix.nn._layers import check_heads, init_truncated
from fastmix.nn.encoder import ImageModel, PreNormBlock
from fastmix.ops.external_attention import external_attention


class ExternalAttention(nn.Module):
    """Attention of the tokens to a learned memory, [B, S, C] to [B, S, C], between two linear layers.

    :func:`fastmix.external_attention` with the memory's keys ``mk`` and values ``mv`` [memory_size, head size], which
    all samples and heads share. Linear weights, mk and mv start normal with σ = 0.02 (cut off at ±2), biases at 0.
    Guo et al., Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks (arXiv:2105.02358).

    Args:
        dim: channels C.
        num_heads: heads, a divisor of dim·expansion.
        memory_size: tokens of the memory.
        expansion: width of the attention as a multiple of dim; the paper's code has 4 and four times as many heads.
    """

    def __init__(self, dim: int, num_heads: int = 1, memory_size: int = 64, expansion: int = 1) -> None:
        super().__init__()
        width = dim * expansion
        check_heads(num_heads, width)
        self.num_heads = num_heads
        # A bias would move all tokens' logits alike, which the softmax over the tokens takes out again.
        self.proj_in = nn.Linear(dim, width, bias=False)
        self.mk = nn.Parameter(torch.empty(memory_size, width // num_heads))
        self.mv = nn.Parameter(torch.empty(memory_size, width // num_heads))
        self.proj_out = nn.Linear(width, dim)
        init_truncated(self)
        nn.init.trunc_normal_(self.mk, std=0.02)
        nn.init.trunc_normal_(self.mv, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, C]; the same shape comes out."""
        return self.proj_out(external_attention(self.proj_in(x), self.mk, self.mv, num_heads=self.num_heads))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, memory_size={len(self.mk)}"


class EAMLP(ImageModel):
    """An all-MLP image model on multi-head external attention, [B, in_chans, H, W] to [B, num_classes].

    Pre-norm blocks of :class:`ExternalAttention` and a channel MLP, over linear patches with a learned position
    embedding; the paper sets such blocks into T2T-ViT, whose stem has attention of its own. Linear weights start normal
    with σ = 0.02 (cut off at ±2), biases at 0. Guo et al., Beyond Self-attention (arXiv:2105.02358).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the mean token.
        embed_dim: channels of a token.
        num_blocks: how many blocks; the paper's EAMLP-14 has 14, EAMLP-19 19.
        num_heads: heads, a divisor of embed_dim·expansion.
        memory_size: tokens of the memory.
        expansion: width of the attention as a multiple of embed_dim.
        mlp_ratio: hidden width of the channel MLP as a multiple of embed_dim.
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
        embed_dim: int = 384,
        num_blocks: int = 14,
        num_heads: int = 24,
        memory_size: int = 64,
        expansion: int = 4,
        mlp_ratio: float = 3.0,
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        mixer = functools.partial(ExternalAttention, embed_dim, num_heads, memory_size, expansion)

        def block(seq_len: int, drop_path: float) -> PreNormBlock:
            return PreNormBlock(embed_dim, mixer, mlp_ratio, activation=activation, drop_path=drop_path)

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
        self.pos_embed = nn.Parameter(torch.empty(1, self.stem.num_patches, embed_dim))
        init_truncated(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W]; returns the tokens behind the norm, [B, S, embed_dim]."""
        return self.norm(self.blocks(self.stem(x) + self.pos_embed))
