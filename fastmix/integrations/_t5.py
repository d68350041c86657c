"""transformers' T5 and mT5 on fastmix. Imports transformers: `fastmix.integrations.transformers` does so when asked."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

from fastmix.integrations._attention import NoBias
from fastmix.integrations._attention_mask import StructuredMask
from fastmix.integrations._bypass import needed
from fastmix.integrations._replace import Replacement
from fastmix.ops.scaled_attention import RelativeBias


class _BucketTable(nn.Module):
    """Passes T5's table of buckets on, from layer to layer too, where its own forward passes the [1, H, T, S] it makes.

    It does so while the model's attention implementation is fastmix, which its masks show.
    """

    def forward(self, hidden_states: Tensor, mask=None, key_value_states=None, position_bias=None, *args, **kwargs):
        if position_bias is None and isinstance(mask, StructuredMask):
            position_bias = self._structured_bias()
        return super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)

    def _structured_bias(self) -> RelativeBias | NoBias | None:
        if not self.has_relative_attention_bias:
            return NoBias()
        table = self.relative_attention_bias
        if needed("relative_attention_bias", table, nn.Embedding) or table.max_norm is not None:
            return None
        return RelativeBias(table.weight, not self.is_decoder, self.relative_attention_max_distance)


class FusedT5Attention(_BucketTable, modeling_t5.T5Attention):
    """Of T5."""


class FusedMT5Attention(_BucketTable, modeling_mt5.MT5Attention):
    """Of mT5."""


_WHAT = "fastmix.scaled_attention with its RelativeBias"
REPLACEMENTS = (
    Replacement(modeling_t5.T5Attention, FusedT5Attention, _WHAT, masks_from=modeling_t5.T5PreTrainedModel),
    Replacement(modeling_mt5.MT5Attention, FusedMT5Attention, _WHAT, masks_from=modeling_mt5.MT5PreTrainedModel),
)
