"""mlp-mixer-pytorch on fastmix. Imports it: `fastmix.integrations.lucidrains` does so when asked."""

from __future__ import annotations

from mlp_mixer_pytorch import mlp_mixer_3d_pytorch, mlp_mixer_pytorch
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
from fastmix.ops.token_mixing import token_mixing_mlp


class _FusedTokenMLP(nn.Module):
    """A residual block's forward in one call, if its function is the two-layer perceptron over tokens.

    The block's own forward answers where dropout is active between the layers, or where inner modules were hooked or
    exchanged since.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _obstacle(self) or drops(self.fn[2]) or drops(self.fn[4]):
            return super().forward(x)
        first, activation, _, second, _ = self.fn
        return token_mixing_mlp(
            x,
            first.weight.squeeze(-1),
            second.weight.squeeze(-1),
            first.bias,
            second.bias,
            activation=activation_name(activation),
            residual=x,
            **layer_norm_options(self.norm),
        )


class FusedPreNormResidual(_FusedTokenMLP, mlp_mixer_pytorch.PreNormResidual):
    """Of MLPMixer."""


class FusedPreNormResidual3D(_FusedTokenMLP, mlp_mixer_3d_pytorch.PreNormResidual):
    """Of MLPMixer3D."""


def _mixes_tokens(block: nn.Module) -> bool:
    """The same class holds the MLP over channels, which is of Linear layers."""
    return isinstance(block.fn, nn.Sequential) and any(isinstance(layer, nn.Conv1d) for layer in block.fn)


def _obstacle(block: nn.Module) -> str | None:
    fn = block.fn
    reason = needed_norm("norm", block.norm) or needed("fn", fn, nn.Sequential)
    if reason is None and len(fn) != 5:
        return f"its fn has {len(fn)} layers"
    return (
        reason
        or _needed_linear("fn.0", fn[0])
        or needed_activation("fn.1", fn[1])
        or needed("fn.2", fn[2], nn.Dropout, nn.Identity)
        or _needed_linear("fn.3", fn[3])
        or needed("fn.4", fn[4], nn.Dropout, nn.Identity)
    )


def _needed_linear(name: str, module: nn.Module) -> str | None:
    """As `needed`, for a convolution that is a linear map at each position."""
    reason = needed(name, module, nn.Conv1d)
    if reason is None and (module.kernel_size, module.stride, module.padding, module.groups) != ((1,), (1,), (0,), 1):
        return f"its {name} is no linear map over tokens"
    return reason


REPLACEMENTS = (
    Replacement(
        mlp_mixer_pytorch.PreNormResidual, FusedPreNormResidual, "fastmix.token_mixing_mlp", _obstacle, _mixes_tokens
    ),
    Replacement(
        mlp_mixer_3d_pytorch.PreNormResidual,
        FusedPreNormResidual3D,
        "fastmix.token_mixing_mlp",
        _obstacle,
        _mixes_tokens,
    ),
)
