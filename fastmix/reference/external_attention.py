"""External attention in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def external_attention(x: Tensor, mk: Tensor, mv: Tensor, *, num_heads: int = 1) -> Tensor:
    """A·mv for each head of x [B, S, C]: A = softmax over the tokens of x·mkᵀ, divided by its sum over the memory."""
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    heads = x.to(dtype).unflatten(-1, (num_heads, mk.shape[1])).transpose(1, 2)  # [B, heads, S, C/heads]
    with _no_autocast(x.device.type):
        attention = (heads @ mk.to(dtype).t()).softmax(dim=-2)  # [B, heads, S, M]
        attention = attention / (1e-9 + attention.sum(dim=-1, keepdim=True))
        y = attention @ mv.to(dtype)
    return y.transpose(1, 2).flatten(-2).to(x.dtype)


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    """It would round the logits to its dtype."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
