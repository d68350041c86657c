"""Token-mixing MLP and token linear in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype, no_autocast

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def token_mixing_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale ⊙ (w2·act(w1·norm(x) + b1) + b2) along the tokens of x [B, S, C]."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        u = _norm(x.to(dtype), norm, norm_weight, norm_bias, eps)
        hidden = ACTIVATIONS[activation](_per_token(w1.to(dtype) @ u, b1))  # [B, D, C]
        return _out(_per_token(w2.to(dtype) @ hidden, b2), x, scale, residual)


def token_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale ⊙ gate ⊙ (weight·norm(x) + bias + added) along the tokens of x [B, S, C]."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        u = _norm(x.to(dtype), norm, norm_weight, norm_bias, eps)
        weight = weight.to(dtype)
        z = _per_token(weight @ u, bias) if weight.ndim == 2 else _per_head(weight, u, bias)
        if added is not None:
            z = z + added.to(dtype)
        if gate is not None:
            z = gate.to(dtype) * z
        return _out(z, x, scale, residual)


def _norm(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if norm == "layer":
        return F.layer_norm(x, x.shape[2:], weight, bias, eps)
    if norm == "token_layer":
        return F.layer_norm(x.transpose(1, 2), x.shape[1:2], weight, bias, eps).transpose(1, 2)
    if norm == "affine":
        x = x if weight is None else x * weight
        return x if bias is None else x + bias
    return x


def _per_token(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z + bias.to(z.dtype)[:, None]


def _per_head(weight: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    """Each head's weight [heads, S_out, S] on its own part of the channels."""
    heads = weight.shape[0]
    z = torch.einsum("hts,bshc->bthc", weight, u.unflatten(2, (heads, u.shape[2] // heads)))
    if bias is not None:
        z = z + bias.to(z.dtype).t()[:, :, None]
    return z.flatten(2)


def _out(z: Tensor, x: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """The rest of both, rounded once."""
    if scale is not None:
        z = z * scale.to(z.dtype)
    if residual is None:
        return z.to(x.dtype)
    return (residual.to(z.dtype) + z).to(torch.promote_types(x.dtype, residual.dtype))
