"""The stack of feed-forward layers of "Do You Even Need Attention?"."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastmix.nn._layers import DropPath, Mlp, PatchEmbed, TokenMlp, check_tokens, init_truncated
from fastmix.nn.encoder import Encoder


class FeedForwardBlock(nn.Module):
    """Two MLPs with LayerNorm: x += MLP(LN(x)) along the channels, then xᵀ += MLP(LN(xᵀ)) along the tokens.

    The second LayerNorm is over the tokens, too. That half is one call of :func:`fastmix.token_mixing_mlp`.
    Melas-Kyriazi, Do You Even Need Attention? A Stack of Feed-Forward Layers Does Surprisingly Well on ImageNet
    (arXiv:2105.02723).

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: hidden width of both MLPs, as a multiple of dim and of seq_len.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1); where it drops, the sum is not fused.
    """

    def __init__(
        self, dim: int, seq_len: int, mlp_ratio: float = 4.0, *, activation: str = "gelu", drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.dim, self.seq_len = dim, seq_len
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp1 = Mlp(dim, int(dim * mlp_ratio), activation)
        self.norm2 = nn.LayerNorm(seq_len, eps=1e-6)
        self.mlp2 = TokenMlp(seq_len, int(seq_len * mlp_ratio), activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, seq_len, dim]; the same shape comes out."""
        check_tokens(x, self.seq_len, self.dim)
        x = x + self.drop_path(self.mlp1(self.norm1(x)))
        return self.drop_path.add(x, functools.partial(self.mlp2, norm=self.norm2, kind="token_layer"))


class FeedForwardStack(Encoder):
    """A vision transformer whose attention is an MLP over the tokens, [B, in_chans, H, W] to [B, num_classes].

    With class token and position embedding, and the parameters' names of the paper's code. Linear weights start normal
    with σ = 0.02 (cut off at ±2), biases at 0, as a vision transformer's.
    Melas-Kyriazi, Do You Even Need Attention? A Stack of Feed-Forward Layers Does Surprisingly Well on ImageNet
    (arXiv:2105.02723).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the class token.
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        mlp_ratio: hidden width of all MLPs, as a multiple of embed_dim and of the number of tokens.
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
        embed_dim: int = 768,
        num_blocks: int = 12,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        seq_len = patch_embed.num_patches + 1
        super().__init__(
            functools.partial(FeedForwardBlock, embed_dim, seq_len, mlp_ratio, activation=activation),
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            drop_path_rate=drop_path_rate,
        )
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, seq_len, embed_dim))
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        init_truncated(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W]; returns the logits, [B, num_classes]."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(super().forward(x)[:, 0])
