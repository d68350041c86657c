"""What the models share: drop-path, affine, MLPs, patch embedding, initialisation, checks of token ids."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmix.init import lecun_truncated_normal_
from fastmix.ops._check import check_choice, check_tensor, dtype_name, shape_text
from fastmix.ops.token_mixing import token_mixing_mlp

# The op's activations, as modules for what is not fused.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class DropPath(nn.Module):
    """Drops a residual branch, per sample: in training each sample is 0 with probability p, else scaled by 1/(1 − p).

    The identity in evaluation and where p = 0. Raises ValueError if p is not in [0, 1).
    Huang et al., Deep Networks with Stochastic Depth (arXiv:1603.09382).

    Args:
        p: probability of dropping a sample's branch, in [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        check_drop_path("drop-path probability", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, …], the output of a branch; the same shape comes out."""
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        mask = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def add(self, x: Tensor, branch: Callable[..., Tensor]) -> Tensor:
        """x + DropPath(branch(x)); the kernel of branch(x, residual=x) does the sum where nothing is dropped."""
        if self.training and self.p > 0:
            return x + self(branch(x))
        return branch(x, residual=x)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Affine(nn.Module):
    """ResMLP's per-channel α ⊙ x + β, with α = 1 and β = 0 at first.

    Touvron et al., ResMLP: Feedforward networks for image classification (arXiv:2105.03404).

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)

    def extra_repr(self) -> str:
        return f"{self.alpha.shape[-1]}"


class Mlp(nn.Module):
    """W2·act(W1·x + b1) + b2 over the last dimension, PyTorch's own products."""

    def __init__(self, dim: int, hidden_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenMlp(nn.Module):
    """An MLP over the tokens, fused with the LayerNorm before and the sum after it."""

    def __init__(self, seq_len: int, hidden_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.fc1 = nn.Linear(seq_len, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, seq_len)

    def forward(self, x: Tensor, norm: nn.LayerNorm, kind: str, residual: Tensor | None = None) -> Tensor:
        """norm is over the channels (kind "layer") or over the tokens ("token_layer")."""
        return token_mixing_mlp(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            norm=kind,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class PatchEmbed(nn.Module):
    """Cuts an image [B, in_chans, H, W] into patches and projects each: [B, tokens, embed_dim]."""

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(size % patch_size or size <= 0 for size in self.img_size):
            raise ValueError(f"img_size must be a multiple of patch_size = {patch_size}, got {img_size}")
        self.grid = tuple(size // patch_size for size in self.img_size)
        self.num_patches = math.prod(self.grid)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        image = (self.proj.in_channels, *self.img_size)
        if tuple(x.shape[1:]) != image:
            raise ValueError(f"x must be [B, {', '.join(map(str, image))}], got {shape_text(x)}")
        return self.proj(x).flatten(2).transpose(1, 2)


def check_drop_path(name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def check_tokens(x: Tensor, seq_len: int, dim: int) -> None:
    if tuple(x.shape[1:]) != (seq_len, dim):
        raise ValueError(f"x must be [B, {seq_len}, {dim}], got {shape_text(x)}")


def check_heads(num_heads: int, dim: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")


def add_weight(module: nn.Module, name: str, weight: Tensor, trainable: bool) -> None:
    """As a parameter, or as a buffer: constant, and in the state dict all the same."""
    if trainable:
        module.register_parameter(name, nn.Parameter(weight))
    else:
        module.register_buffer(name, weight)


def init_truncated(model: nn.Module) -> None:
    """Weights of linear layers from a normal distribution with σ = 0.02, cut off at ±2; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_lecun(model: nn.Module) -> None:
    """Flax's default: weights of variance 1/fan-in from a normal distribution cut off at ±2σ; biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            lecun_truncated_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_ids(name: str, ids: Tensor, like: Tensor | None = None) -> None:
    check_tensor(name, ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {dtype_name(ids.dtype)}")
    if like is not None:
        check_ids_shape(name, ids, like)
    elif ids.ndim != 2:
        raise ValueError(f"{name} must be [B, S], got {shape_text(ids)}")


def check_ids_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(f"{name} must be shaped as input_ids, {shape_text(input_ids)}, got {shape_text(tensor)}")
