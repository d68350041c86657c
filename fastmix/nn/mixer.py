"""MLP-Mixer."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from fastmix.nn._layers import DropPath, Mlp, TokenMlp, check_tokens, init_lecun
from fastmix.nn.encoder import ImageModel


class MixerBlock(nn.Module):
    """MLP-Mixer's block: x += W2·gelu(W1·LN(x) + b1) + b2 along the tokens, then x += MLP(LN(x)) along the channels.

    The first half is one call of :func:`fastmix.token_mixing_mlp`. Parameters are named and shaped as timm's
    ``MixerBlock``. Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: hidden widths of the token MLP and of the channel MLP, both as multiples of dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1); where it drops, the sum is not fused.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: tuple[float, float] = (0.5, 4.0),
        *,
        activation: str = "gelu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        tokens_dim, channels_dim = (int(ratio * dim) for ratio in mlp_ratio)
        self.dim, self.seq_len = dim, seq_len
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = TokenMlp(seq_len, tokens_dim, activation)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim, channels_dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, seq_len, dim]; the same shape comes out."""
        check_tokens(x, self.seq_len, self.dim)
        x = self.drop_path.add(x, functools.partial(self.mlp_tokens, norm=self.norm1, kind="layer"))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class MLPMixer(ImageModel):
    """MLP-Mixer for images, [B, in_chans, H, W] to [B, num_classes].

    State dicts of timm's mixer models load unchanged, and the other way round. Weights start as in the paper's code,
    Flax's default: variance 1/fan-in, normal cut off at ±2σ, biases 0; the classifier starts at 0.
    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).

    Args:
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        num_classes: width of the output; 0 gives the mean token.
        embed_dim: channels of a token.
        num_blocks: how many blocks.
        mlp_ratio: hidden widths of the token MLP and of the channel MLP, both as multiples of embed_dim.
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
        embed_dim: int = 512,
        num_blocks: int = 8,
        mlp_ratio: tuple[float, float] = (0.5, 4.0),
        activation: str = "gelu",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            functools.partial(MixerBlock, embed_dim, mlp_ratio=mlp_ratio, activation=activation),
            num_blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
        )
        init_lecun(self)
        if num_classes > 0:
            nn.init.zeros_(self.head.weight)


def mixer_s16(**kwargs: Any) -> MLPMixer:
    """Mixer-S/16: 8 blocks of 512 channels, hidden widths 256 and 2048.

    Args:
        kwargs: arguments of :class:`MLPMixer`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`MLPMixer`.

    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).
    """
    return MLPMixer(**{"embed_dim": 512, "num_blocks": 8} | kwargs)


def mixer_b16(**kwargs: Any) -> MLPMixer:
    """Mixer-B/16: 12 blocks of 768 channels, hidden widths 384 and 3072.

    Args:
        kwargs: arguments of :class:`MLPMixer`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`MLPMixer`.

    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).
    """
    return MLPMixer(**{"embed_dim": 768, "num_blocks": 12} | kwargs)


def mixer_l16(**kwargs: Any) -> MLPMixer:
    """Mixer-L/16: 24 blocks of 1024 channels, hidden widths 512 and 4096.

    Args:
        kwargs: arguments of :class:`MLPMixer`, which override these sizes.

    Returns:
        The model, freshly initialised.

    Raises:
        ValueError: as :class:`MLPMixer`.

    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).
    """
    return MLPMixer(**{"embed_dim": 1024, "num_blocks": 24} | kwargs)
