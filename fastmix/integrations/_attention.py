"""fastmix.scaled_attention as an attention implementation of transformers.

Imports transformers: `fastmix.integrations.transformers` does so when asked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from fastmix.integrations._attention_mask import StructuredMask, attention_options, structured_mask
from fastmix.integrations._masks import NAME
from fastmix.ops._check import shape_text
from fastmix.ops.scaled_attention import RelativeBias, scaled_attention

# Arguments that models pass to an attention function and that change its result, beyond what scaled_attention knows.
_NOT_SERVED = ("softcap", "s_aux", "sinks", "head_mask", "cache", "indices", "block_indices")
_logger = logging.get_logger(__name__)


class NoBias(NamedTuple):
    """In the place of T5's position_bias of zeros."""


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, structured_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | RelativeBias | NoBias | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, T, D] to [B, T, H, Dv], and no weights.

    As with its sdpa, `is_causal`, the module's unless given, counts where there is no mask and more than one query.
    """
    for name in _NOT_SERVED:
        if kwargs.get(name) is not None:
            raise ValueError(f'{name} must be None with attn_implementation="{NAME}", got a {type(module).__name__}\'s')
    if kwargs.get("output_attentions"):
        _logger.warning_once(f'attn_implementation="{NAME}" returns no attention weights: use "eager" for them')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = mask_options(attention_mask, query, key)
    if attention_mask is None:
        options["is_causal"] = is_causal and query.shape[2] > 1
    if isinstance(position_bias, RelativeBias):
        options["relative_bias"] = position_bias._replace(weight=position_bias.weight.to(query.device))
    elif position_bias is not None and not isinstance(position_bias, NoBias):
        options["attn_mask"] = _combined(options.get("attn_mask"), position_bias)
    if cu_seq_lens_q is not None:
        options |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
    output = scaled_attention(query, key, value, dropout_p=dropout, scale=scaling, **options)
    return output.transpose(1, 2).contiguous(), None


def mask_options(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Any]:
    """A model's mask, structured or dense, as arguments of scaled_attention."""
    if attention_mask is None:
        return {}
    if isinstance(attention_mask, StructuredMask):
        expected = [query.shape[0], 1, query.shape[2], key.shape[2]]
        if list(attention_mask.shape) != expected:
            raise ValueError(f"attention_mask must be {expected}, got {shape_text(attention_mask)}")
        return attention_options(attention_mask)
    if attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)
    return {"attn_mask": attention_mask}


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As transformers' eager attention adds it to the scores; a mask that is no bool is so already."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    allowed = mask.dense() if isinstance(mask, StructuredMask) else mask
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _combined(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
