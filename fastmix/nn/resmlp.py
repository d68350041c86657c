"""ResMLP."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastmix.nn._layers import Affine, DropPath, Mlp, check_tokens, init_truncated
from fastmix.nn.encoder import ImageModel
from fastmix.ops.token_mixing import token_linear


class ResMLPBlock(nn.Module):
    """ResMLP's block: x += γ1 ⊙ (A·Aff(x) + b) along the tokens, then x += γ2 ⊙ MLP(Aff(x)) along the channels.

    Aff(x) = α ⊙ x + β per channel. The first half is one call of :func:`fastmix.token_linear`. Parameters are named and
    shaped as timm's ``ResBlock``. Touvron et al., ResMLP (arXiv:2105.03404).

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: hidden width of the channel MLP as a multiple of dim.
        init_values: γ1 and γ2 at first.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1); where it drops, the sum is not fused.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float = 4.0,
        *,
        init_values: float = 1e-4,
        activation: str = "gelu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.seq_len = dim, seq_len
        self.norm1 = Affine(dim)
        self.linear_tokens = nn.Linear(seq_len, seq_len)
        self.drop_path = DropPath(drop_path)
        self.norm2 = Affine(dim)
        self.mlp_channels = Mlp(dim, int(dim * mlp_ratio), activation)
        self.ls1 = nn.Parameter(torch.full((dim,), init_values))
        self.ls2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, seq_len, dim]; the same shape comes out."""
        check_tokens(x, self.seq_len, self.dim)
        x = self.drop_path.add(x, self._mix_tokens)
        return x + self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))

    def _mix_tokens(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return token_linear(
            x,
            self.linear_tokens.weight,
            self.linear_tokens.bias,
            norm="affine",
            norm_weight=self.norm1.alpha.flatten(),
            norm_bias=self.norm1.beta.flatten(),
            scale=self.ls1,
            residual=residual,
        )


class ResMLP(ImageModel):
    """ResMLP for images, [B, in_chans, H, W] to [B, num_classes].

    State dicts of timm's resmlp models load unchanged, and the other way round. As in the paper's code, linear weights
    start from a normal distribution with σ = 0.02 (cut off at ±2), biases at 0, α = 1, β = 0, γ = init_values.
    Touvron et al., ResMLP: Feedforward networks for image classification with data-efficient training
    (arXiv:2105.03404).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the mean token.
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        mlp_ratio: hidden width of the channel MLP as a multiple of embed_dim.
        init_values: γ at first; the paper's falls with depth.
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
        init_values: float = 1e-4,
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        block = functools.partial(
            ResMLPBlock, embed_dim, mlp_ratio=mlp_ratio, init_values=init_values, activation=activation
        )
        super().__init__(
            block,
            num_blocks,
            Affine(embed_dim),
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
        )
        init_truncated(self)


def resmlp_12(**kwargs: Any) -> ResMLP:
    """ResMLP-S12: 12 blocks of 384 channels, γ = 1e-4 at first.

    Args:
        kwargs: arguments of :class:`ResMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`ResMLP`.

    Touvron et al., ResMLP (arXiv:2105.03404).
    """
    return ResMLP(**{"num_blocks": 12, "init_values": 1e-4} | kwargs)


def resmlp_24(**kwargs: Any) -> ResMLP:
    """ResMLP-S24: 24 blocks of 384 channels, γ = 1e-5 at first.

    Args:
        kwargs: arguments of :class:`ResMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`ResMLP`.

    Touvron et al., ResMLP (arXiv:2105.03404).
    """
    return ResMLP(**{"num_blocks": 24, "init_values": 1e-5} | kwargs)


def resmlp_36(**kwargs: Any) -> ResMLP:
    """ResMLP-S36: 36 blocks of 384 channels, γ = 1e-6 at first.

    Args:
        kwargs: arguments of :class:`ResMLP`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`ResMLP`.

    Touvron et al., ResMLP (arXiv:2105.03404).
    """
    return ResMLP(**{"num_blocks": 36, "init_values": 1e-6} | kwargs)
