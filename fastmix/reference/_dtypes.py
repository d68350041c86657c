"""What the references compute in: float32 for the halves, and what they are told, whatever autocast would have."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would round the factors of matrix products to its dtype."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext()
