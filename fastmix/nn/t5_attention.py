"""T5's attention."""

from __future__ import annotations

from torch import Tensor, nn

from fastmix.ops._check import shape_text
from fastmix.ops.scaled_attention import RelativeBias, scaled_attention


class T5Attention(nn.Module):
    """T5's attention with relative position bias, [B, T, C] to [B, T, C], on :func:`fastmix.scaled_attention`.

    Unscaled products and no biases in the projections. The bias, a table [num_buckets, num_heads], stays one: no
    [T, S] of it is built. Parameters are named, shaped and initialised as transformers' ``T5Attention``.
    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    Args:
        dim: channels C.
        num_heads: heads; T5's need not divide dim.
        head_dim: channels of a head.
        is_decoder: whether this is a decoder's: self-attention is causal, and all buckets are for keys in the past.
        has_relative_attention_bias: whether the module owns the table; T5's first self-attention does, and the others
            are given its :attr:`relative_bias`.
        num_buckets: rows of the table.
        max_distance: from here on all distances share one bucket.
        dropout: rate of dropout of the attention weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int = 64,
        *,
        is_decoder: bool = False,
        has_relative_attention_bias: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.is_decoder, self.max_distance, self.dropout = is_decoder, max_distance, dropout
        width = num_heads * head_dim
        self.q = nn.Linear(dim, width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=False)
        self.o = nn.Linear(width, dim, bias=False)
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads) if has_relative_attention_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As T5 does: the query projection is small, in place of a scale of the scores."""
        nn.init.normal_(self.q.weight, std=(self.dim * self.head_dim) ** -0.5)
        nn.init.normal_(self.k.weight, std=self.dim**-0.5)
        nn.init.normal_(self.v.weight, std=self.dim**-0.5)
        nn.init.normal_(self.o.weight, std=(self.num_heads * self.head_dim) ** -0.5)
        if self.relative_attention_bias is not None:
            nn.init.normal_(self.relative_attention_bias.weight, std=self.dim**-0.5)

    @property
    def relative_bias(self) -> RelativeBias | None:
        """The module's own table, for the attentions that share it; None without one."""
        if self.relative_attention_bias is None:
            return None
        return RelativeBias(self.relative_attention_bias.weight, not self.is_decoder, self.max_distance)

    def forward(
        self,
        x: Tensor,
        key_value_states: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        relative_bias: RelativeBias | None = None,
    ) -> Tensor:
        """Attends from x to itself, or to key_value_states.

        Args:
            x: [B, T, C].
            key_value_states: [B, S, C], the encoder's output, for cross-attention; it is never causal.
            attn_mask: bool (True = attend) or float (added to the scores), broadcastable to [B, num_heads, T, S].
            key_lengths: [B], int32 or int64; the first key_lengths[b] keys are attended to, the rest is padding.
            relative_bias: another attention's table, in place of the module's own.

        Returns:
            [B, T, C].

        Raises:
            ValueError: x or key_value_states is not [B, length, C].
        """
        states = x if key_value_states is None else key_value_states
        for name, tensor in (("x", x), ("key_value_states", states)):
            if tensor.ndim != 3 or tensor.shape[2] != self.dim:
                raise ValueError(f"{name} must be [B, length, {self.dim}], got {shape_text(tensor)}")
        heads = (self.num_heads, self.head_dim)
        q, k, v = (
            layer(tensor).unflatten(2, heads).transpose(1, 2)
            for layer, tensor in ((self.q, x), (self.k, states), (self.v, states))
        )
        output = scaled_attention(
            q,
            k,
            v,
            attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_decoder and key_value_states is None,
            scale=1.0,
            key_lengths=key_lengths,
            relative_bias=self.relative_bias if relative_bias is None else relative_bias,
        )
        return self.o(output.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, is_decoder={self.is_decoder}"
