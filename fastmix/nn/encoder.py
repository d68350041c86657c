"""What the models have in common: a stack of blocks, for sequences and for images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastmix.nn._layers import DropPath, Mlp, PatchEmbed, check_drop_path


class Encoder(nn.Module):
    """A stack of blocks and a final norm, [B, S, C] to [B, S, C]; stochastic depth rises linearly with depth.

    ``Encoder(partial(MixerBlock, 512, seq_len=128), num_blocks=8, norm=nn.LayerNorm(512))`` is an MLP-Mixer for
    sequences. Block i drops its branches with probability drop_path_rate·i/(num_blocks − 1).

    Args:
        block: makes one block; called with ``drop_path=`` the block's own rate.
        num_blocks: how many blocks.
        norm: the norm behind the last block, None for none.
        drop_path_rate: the last block's rate, in [0, 1).
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        num_blocks: int,
        norm: nn.Module | None = None,
        *,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_drop_path("drop_path_rate", drop_path_rate)
        last = max(1, num_blocks - 1)
        self.blocks = nn.Sequential(*(block(drop_path=drop_path_rate * i / last) for i in range(num_blocks)))
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, C]; the same shape comes out."""
        return self.norm(self.blocks(x))


class ImageModel(Encoder):
    """An encoder of image patches: projection of the patches, blocks, norm, mean over the tokens, linear classifier.

    The modules are called stem, blocks, norm and head, as timm's are.

    Args:
        block: makes one block; called with ``seq_len=`` the number of patches and ``drop_path=`` its rate.
        num_blocks: how many blocks.
        norm: the norm behind the last block.
        img_size: height and width of the image, or both as one number.
        patch_size: height and width of a patch.
        in_chans: channels of the image.
        embed_dim: channels of a token.
        num_classes: width of the output; 0 gives the mean token, [B, embed_dim].
        drop_path_rate: the last block's rate of stochastic depth, in [0, 1).
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        num_blocks: int,
        norm: nn.Module,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        stem = PatchEmbed(img_size, patch_size, in_chans, embed_dim)

        def make_block(drop_path: float) -> nn.Module:
            return block(seq_len=stem.num_patches, drop_path=drop_path)

        super().__init__(make_block, num_blocks, norm, drop_path_rate=drop_path_rate)
        self.stem = stem
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W]; returns the tokens behind the norm, [B, S, embed_dim]."""
        return self.norm(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W]; returns the logits, [B, num_classes]."""
        return self.head(self.forward_features(x).mean(dim=1))


class PreNormBlock(nn.Module):
    """A Transformer's pre-norm block around any mixing sublayer: x += mix(LN(x)), then x += MLP(LN(x)).

    Args:
        dim: channels.
        mixer: makes the mixing sublayer, a module [B, S, C] to [B, S, C] such as :class:`Synthesizer`.
        mlp_ratio: hidden width of the MLP as a multiple of dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        drop_path: rate of stochastic depth, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[[], nn.Module],
        mlp_ratio: float = 4.0,
        *,
        activation: str = "gelu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer()
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
