"""GFNet."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastmix.nn._layers import DropPath, Mlp, PatchEmbed, init_truncated
from fastmix.nn.encoder import Encoder
from fastmix.nn.fft_mixing import GlobalFilter


class GFNetBlock(nn.Module):
    """GFNet's block: x += MLP(LN(filter(LN(x)))), one residual for the global filter and the channel MLP.

    Rao et al., Global Filter Networks for Image Classification (arXiv:2107.00645).

    Args:
        dim: channels C.
        h: height of the image in tokens.
        w: width of the image in tokens.
        mlp_ratio: hidden width of the MLP as a multiple of dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1).
    """

    def __init__(
        self, dim: int, h: int, w: int, mlp_ratio: float = 4.0, *, activation: str = "gelu", drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = GlobalFilter(dim, h, w)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, h·w, dim]; the same shape comes out."""
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))


class GFNet(Encoder):
    """GFNet for images, [B, in_chans, H, W] to [B, num_classes].

    Parameters are named and shaped as in the paper's code, and start as there: linear weights and the position
    embedding normal with σ = 0.02 (cut off at ±2), biases 0. The paper's sizes, embed_dim and num_blocks: GFNet-Ti 256
    and 12, XS 384 and 12, S 384 and 19, B 512 and 19. Rao et al., Global Filter Networks for Image Classification
    (arXiv:2107.00645).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the mean token.
        embed_dim: channels of a token.
        num_blocks: how many blocks.
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
        num_blocks: int = 12,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        super().__init__(
            functools.partial(GFNetBlock, embed_dim, *patch_embed.grid, mlp_ratio, activation=activation),
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            drop_path_rate=drop_path_rate,
        )
        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(torch.empty(1, patch_embed.num_patches, embed_dim))
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        init_truncated(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W]; returns the logits, [B, num_classes]."""
        return self.head(super().forward(self.patch_embed(x) + self.pos_embed).mean(dim=1))
