"""Convolution along the tokens in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def token_conv(x: Tensor, kernel: Tensor, *, kind: str = "depthwise", causal: bool = False) -> Tensor:
    """y[b, s, c] = Σ_k w[…, k]·x[b, s + k − offset, c], w = kernel, or its softmax over k for each head's channels."""
    dtype = compute_dtype(x)
    weight = kernel.to(dtype)
    if kind != "depthwise":
        weight = weight.softmax(-1)
    tokens, channels = x.shape[1:]
    heads, taps = weight.shape[-2:]
    before = taps - 1 if causal else (taps - 1) // 2
    padded = F.pad(x.to(dtype), (0, 0, before, taps - 1 - before)).unflatten(2, (heads, channels // max(heads, 1)))
    # One tap at a time, so that no tensor holds all neighbours of all tokens.
    y = sum(weight[..., k, None] * padded[:, k : k + tokens] for k in range(taps))
    return y.reshape(x.shape).to(x.dtype)
