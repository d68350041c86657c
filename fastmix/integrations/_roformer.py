"""transformers' RoFormer on fastmix. Imports transformers: `fastmix.integrations.transformers` does so when asked."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.roformer import modeling_roformer

from fastmix.integrations._attention import additive_mask, mask_options
from fastmix.integrations._bypass import drops, needed
from fastmix.integrations._replace import Replacement
from fastmix.ops.scaled_attention import Rotary, scaled_attention


class FusedRoFormerSelfAttention(modeling_roformer.RoFormerSelfAttention):
    """RoFormer's attention, with the rotation of queries and keys inside it where no cache needs rotated keys.

    Its own forward answers where weights are asked for, or where its dropout was hooked or exchanged since.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions or _obstacle(self):
            attention_mask = additive_mask(attention_mask, hidden_states.dtype)
            arguments = (sinusoidal_pos, encoder_hidden_states, past_key_values, output_attentions)
            return super().forward(hidden_states, attention_mask, *arguments, **kwargs)
        query = self._heads(self.query(hidden_states))
        is_cross = encoder_hidden_states is not None
        rotary = None
        cache, is_updated = past_key_values, {}
        if isinstance(cache, EncoderDecoderCache):
            is_updated = cache.is_updated if is_cross else {}
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            states = encoder_hidden_states if is_cross else hidden_states
            key, value = self._heads(self.key(states)), self._heads(self.value(states))
            if sinusoidal_pos is not None and not is_cross:
                if cache is None and not self.rotary_value:
                    sin, cos = sinusoidal_pos[0, 0].chunk(2, dim=-1)
                    rotary = Rotary(cos, sin)
                else:
                    rotated = (query, key, value) if self.rotary_value else (query, key)
                    rotated = self.apply_rotary_position_embeddings(sinusoidal_pos, *rotated)
                    query, key, value = (*rotated, value)[:3]
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                is_updated[self.layer_idx] = True
        dropout_p = self.dropout.p if drops(self.dropout) else 0.0
        options = mask_options(attention_mask, query, key)
        context = scaled_attention(query, key, value, dropout_p=dropout_p, rotary=rotary, **options)
        return context.transpose(1, 2).flatten(2), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)


def _obstacle(attention: nn.Module) -> str | None:
    return needed("dropout", attention.dropout, nn.Dropout)


REPLACEMENTS = (
    Replacement(
        modeling_roformer.RoFormerSelfAttention,
        FusedRoFormerSelfAttention,
        "fastmix.scaled_attention with its Rotary",
        _obstacle,
        masks_from=modeling_roformer.RoFormerPreTrainedModel,
    ),
)
