"""timm's MLP-Mixer, ResMLP and gMLP on fastmix. Imports timm: `fastmix.integrations.timm` does so when asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import mlp_mixer
from torch import Tensor, nn

from fastmix.integrations._bypass import (
    activation_name,
    drops,
    layer_norm_options,
    needed,
    needed_activation,
    needed_norm,
)
from fastmix.integrations._replace import Replacement
from fastmix.ops.token_mixing import token_linear, token_mixing_mlp


class FusedMixerBlock(mlp_mixer.MixerBlock):
    """MixerBlock whose token half, from its LayerNorm to the sum with its input, is one call.

    The channel half is timm's own, and so is the whole block where its token half can't be one call: dropout between
    its layers, or inner modules that were hooked or exchanged since.
    """

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp_tokens
        if _mixer_obstacle(self) or drops(mlp.drop1) or drops(mlp.drop2):
            return super().forward(x)
        mix = partial(
            token_mixing_mlp,
            x,
            mlp.fc1.weight,
            mlp.fc2.weight,
            mlp.fc1.bias,
            mlp.fc2.bias,
            activation=activation_name(mlp.act),
            **_norm_options(self.norm1),
        )
        x = _add(x, mix, self.drop_path)
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class FusedResBlock(mlp_mixer.ResBlock):
    """ResBlock whose token half, from its affine map to the sum with its input, is one call; see FusedMixerBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if _res_obstacle(self):
            return super().forward(x)
        # Under autocast ls1 stays float32 and makes timm's sum float32; else this changes nothing.
        x = x.to(torch.promote_types(x.dtype, self.ls1.dtype))
        linear = self.linear_tokens
        mix = partial(token_linear, x, linear.weight, linear.bias, scale=self.ls1, **_norm_options(self.norm1))
        x = _add(x, mix, self.drop_path)
        return x + self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))


class FusedSpatialGatingUnit(mlp_mixer.SpatialGatingUnit):
    """SpatialGatingUnit in one call."""

    def forward(self, x: Tensor) -> Tensor:
        if _gating_obstacle(self):
            return super().forward(x)
        u, v = x.chunk(2, dim=-1)
        return token_linear(v, self.proj.weight, self.proj.bias, gate=u, **_norm_options(self.norm))


def _add(x: Tensor, mix: Callable[..., Tensor], drop_path: nn.Module) -> Tensor:
    """x + drop_path(mix()), in one call where no path is dropped."""
    quiet = needed("drop_path", drop_path, nn.Identity, DropPath) is None
    if quiet and not (drop_path.training and getattr(drop_path, "drop_prob", 0) > 0):
        return mix(residual=x)
    return x + drop_path(mix())


def _norm_options(norm: nn.Module) -> dict[str, Any]:
    if type(norm) is mlp_mixer.Affine:
        return {"norm": "affine", "norm_weight": norm.alpha.flatten(), "norm_bias": norm.beta.flatten()}
    return layer_norm_options(norm)


def _mixer_obstacle(block: mlp_mixer.MixerBlock) -> str | None:
    mlp = block.mlp_tokens
    return (
        needed_norm("norm1", block.norm1, mlp_mixer.Affine)
        or needed("mlp_tokens", mlp, Mlp)
        or needed("mlp_tokens.fc1", mlp.fc1, nn.Linear)
        or needed_activation("mlp_tokens.act", mlp.act)
        or needed("mlp_tokens.drop1", mlp.drop1, nn.Dropout, nn.Identity)
        or needed("mlp_tokens.norm", mlp.norm, nn.Identity)
        or needed("mlp_tokens.fc2", mlp.fc2, nn.Linear)
        or needed("mlp_tokens.drop2", mlp.drop2, nn.Dropout, nn.Identity)
    )


def _res_obstacle(block: mlp_mixer.ResBlock) -> str | None:
    return needed_norm("norm1", block.norm1, mlp_mixer.Affine) or needed(
        "linear_tokens", block.linear_tokens, nn.Linear
    )


def _gating_obstacle(unit: mlp_mixer.SpatialGatingUnit) -> str | None:
    return needed_norm("norm", unit.norm, mlp_mixer.Affine) or needed("proj", unit.proj, nn.Linear)


REPLACEMENTS = (
    Replacement(
        mlp_mixer.MixerBlock, FusedMixerBlock, "fastmix.token_mixing_mlp and its own channel MLP", _mixer_obstacle
    ),
    Replacement(mlp_mixer.ResBlock, FusedResBlock, "fastmix.token_linear and its own channel MLP", _res_obstacle),
    Replacement(mlp_mixer.SpatialGatingUnit, FusedSpatialGatingUnit, "fastmix.token_linear", _gating_obstacle),
)
