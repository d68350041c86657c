"""What else computes a token-mixing MLP, ResMLP's token linear and gMLP's gating unit: PyTorch, timm, lucidrains."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

# MLP-Mixer: x + MLP over tokens of LayerNorm(x).


def mixer_transposed(x, w1, w2, b1, b2, norm_weight, norm_bias) -> Tensor:
    """As models are written: linear layers along the last dimension, so that tokens have to come there."""
    u = F.layer_norm(x, x.shape[2:], norm_weight, norm_bias, 1e-6).transpose(1, 2)
    return x + F.linear(F.gelu(F.linear(u, w1, b1)), w2, b2).transpose(1, 2)


def mixer_products(x, w1, w2, b1, b2, norm_weight, norm_bias) -> Tensor:
    """Without a transpose: the weights stand on the left."""
    u = F.layer_norm(x, x.shape[2:], norm_weight, norm_bias, 1e-6)
    return x + (w2 @ F.gelu(w1 @ u + b1[:, None]) + b2[:, None])


def mixer_timm(x, w1, w2, b1, b2, norm_weight, norm_bias) -> Tensor:
    module = _timm_token_half("MixerBlock", x.shape[2], x.shape[1], w1.shape[0])
    parameters = {"norm1.weight": norm_weight, "norm1.bias": norm_bias}
    parameters |= {"mlp_tokens.fc1.weight": w1, "mlp_tokens.fc1.bias": b1}
    parameters |= {"mlp_tokens.fc2.weight": w2, "mlp_tokens.fc2.bias": b2}
    return functional_call(module, parameters, (x,))


def mixer_lucidrains(x, w1, w2, b1, b2, norm_weight, norm_bias) -> Tensor:
    module = _lucidrains_mixer(x.shape[2], x.shape[1], w1.shape[0])
    parameters = {"norm.weight": norm_weight, "norm.bias": norm_bias}
    parameters |= {"fn.0.weight": w1[:, :, None], "fn.0.bias": b1, "fn.3.weight": w2[:, :, None], "fn.3.bias": b2}
    return functional_call(module, parameters, (x,))


# ResMLP: x + scale ⊙ (W·Affine(x) + b).


def resmlp_transposed(x, weight, bias, norm_weight, norm_bias, scale) -> Tensor:
    u = torch.addcmul(norm_bias, norm_weight, x).transpose(1, 2)
    return x + scale * F.linear(u, weight, bias).transpose(1, 2)


def resmlp_products(x, weight, bias, norm_weight, norm_bias, scale) -> Tensor:
    return torch.addcmul(x, scale, weight @ torch.addcmul(norm_bias, norm_weight, x) + bias[:, None])


def resmlp_timm(x, weight, bias, norm_weight, norm_bias, scale) -> Tensor:
    module = _timm_token_half("ResBlock", x.shape[2], x.shape[1], 0)
    parameters = {"norm1.alpha": norm_weight[None, None], "norm1.beta": norm_bias[None, None], "ls1": scale}
    parameters |= {"linear_tokens.weight": weight, "linear_tokens.bias": bias}
    return functional_call(module, parameters, (x,))


# gMLP: u ⊙ (W·LayerNorm(v) + b) for [u, v] = z.


def gating_transposed(z, weight, bias, norm_weight, norm_bias) -> Tensor:
    u, v = z.chunk(2, dim=-1)
    v = F.layer_norm(v, v.shape[2:], norm_weight, norm_bias)
    return u * F.linear(v.transpose(1, 2), weight, bias).transpose(1, 2)


def gating_products(z, weight, bias, norm_weight, norm_bias) -> Tensor:
    u, v = z.chunk(2, dim=-1)
    return u * (weight @ F.layer_norm(v, v.shape[2:], norm_weight, norm_bias) + bias[:, None])


def gating_timm(z, weight, bias, norm_weight, norm_bias) -> Tensor:
    parameters = {"norm.weight": norm_weight, "norm.bias": norm_bias, "proj.weight": weight, "proj.bias": bias}
    return functional_call(_timm_gating(z.shape[2], z.shape[1]), parameters, (z,))


def gating_lucidrains(z, weight, bias, norm_weight, norm_bias) -> Tensor:
    parameters = {"norm.weight": norm_weight, "norm.bias": norm_bias, "weight": weight[None], "bias": bias[None]}
    return functional_call(_lucidrains_gating(z.shape[2], z.shape[1]), parameters, (z,))


# A linear map along the tokens and nothing else.


def linear_transposed(x, weight, bias) -> Tensor:
    return F.linear(x.transpose(1, 2), weight, bias).transpose(1, 2)


def linear_products(x, weight, bias) -> Tensor:
    return weight @ x + bias[:, None]


# The peers' modules, without memory of their own: the case's tensors are their parameters.


class _TokenHalf(nn.Module):
    """The first line of a timm block's forward, on its own modules."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1 = block.norm1
        if hasattr(block, "ls1"):
            self.ls1, self.linear_tokens = block.ls1, block.linear_tokens
        else:
            self.mlp_tokens = block.mlp_tokens

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x).transpose(1, 2)
        if hasattr(self, "ls1"):
            return x + self.ls1 * self.linear_tokens(u).transpose(1, 2)
        return x + self.mlp_tokens(u).transpose(1, 2)


@functools.cache
def _timm_token_half(block: str, channels: int, tokens: int, hidden: int) -> nn.Module:
    from timm.models import mlp_mixer

    ratio = {"mlp_ratio": (hidden / channels, 1)} if hidden else {}
    with torch.device("meta"):
        return _TokenHalf(getattr(mlp_mixer, block)(channels, tokens, **ratio))


@functools.cache
def _timm_gating(channels: int, tokens: int) -> nn.Module:
    from timm.models.mlp_mixer import SpatialGatingUnit

    with torch.device("meta"):
        return SpatialGatingUnit(channels, tokens)


@functools.cache
def _lucidrains_mixer(channels: int, tokens: int, hidden: int) -> nn.Module:
    from mlp_mixer_pytorch.mlp_mixer_pytorch import FeedForward, PreNormResidual

    with torch.device("meta"):
        block = PreNormResidual(
            channels, FeedForward(tokens, hidden, dense=functools.partial(nn.Conv1d, kernel_size=1))
        )
    block.norm.eps = 1e-6  # the case's; theirs is 1e-5
    return block


@functools.cache
def _lucidrains_gating(channels: int, tokens: int) -> nn.Module:
    from g_mlp_pytorch import SpatialGatingUnit

    with torch.device("meta"):
        return SpatialGatingUnit(channels, tokens)
