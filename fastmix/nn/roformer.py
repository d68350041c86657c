"""RoFormer: an encoder with rotary position embedding, and a sequence-to-sequence model in one such encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn._answers import WritesAnswers
from fastmix.nn._layers import ACTIVATIONS, check_heads, check_ids, check_ids_shape
from fastmix.ops._check import check_choice, shape_text
from fastmix.ops.scaled_attention import Rotary, scaled_attention


class RoFormerBlock(nn.Module):
    """RoFormer's block, [B, S, C] to [B, S, C]: x = LN(x + attention(x)), then x = LN(x + MLP(x)).

    Queries and keys are rotated by their positions inside :func:`fastmix.scaled_attention`. Parameters are named and
    shaped as transformers' ``RoFormerLayer``.
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv:2104.09864).

    Args:
        dim: channels C.
        num_heads: heads, a divisor of dim.
        mlp_ratio: hidden width of the MLP as a multiple of dim.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        dropout: rate of dropout behind the attention and behind the MLP.
        attention_dropout: rate of dropout of the attention weights.
        rotary_value: whether the values are rotated too.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        activation: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        rotary_value: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check_heads(num_heads, dim)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        hidden_dim = round(dim * mlp_ratio)
        attention = _SelfAttention(dim, num_heads, attention_dropout, rotary_value)
        self.attention = nn.ModuleDict({"self": attention, "output": _AddNorm(dim, dim, dropout, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, hidden_dim)})
        self.act = ACTIVATIONS[activation]()
        self.output = _AddNorm(hidden_dim, dim, dropout, eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        *,
        attn_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        prefix_len: Tensor | None = None,
    ) -> Tensor:
        """x: [B, S, C]; the rest as :func:`fastmix.scaled_attention` takes it; the same shape comes out."""
        mixed = self.attention["self"](x, rotary, attn_mask, lengths, prefix_len)
        x = self.attention["output"](mixed, x)
        return self.output(self.act(self.intermediate["dense"](x)), x)


class RoFormerEncoder(nn.Module):
    """RoFormer: embeddings and blocks with rotary position embedding, token ids [B, S] to [B, S, C].

    State dicts of transformers' ``RoFormerModel`` load unchanged, and the other way round. Weights start normal with
    σ = 0.02, biases at 0.
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv:2104.09864).

    Args:
        vocab_size: number of token ids.
        embed_dim: channels C.
        num_blocks: how many blocks.
        num_heads: heads, a divisor of embed_dim; a head's size must be even.
        mlp_ratio: hidden width of the MLPs as a multiple of embed_dim.
        embedding_size: channels of the embeddings, None for embed_dim; else a linear layer follows them.
        max_seq_len: the longest sequence.
        type_vocab_size: number of token types.
        pad_token_id: the token whose embedding is 0 and stays so, None for none.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        dropout: rate of dropout behind the embeddings, the attention and the MLPs.
        attention_dropout: rate of dropout of the attention weights.
        rotary_value: whether the values are rotated too.
        eps: of the norms.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 50000,
        embed_dim: int = 768,
        num_blocks: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        embedding_size: int | None = None,
        max_seq_len: int = 1536,
        type_vocab_size: int = 2,
        pad_token_id: int | None = 0,
        activation: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        rotary_value: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check_heads(num_heads, embed_dim)
        head_dim = embed_dim // num_heads
        if head_dim % 2:
            raise ValueError(f"embed_dim must be an even multiple of num_heads = {num_heads}, got {embed_dim}")
        self.max_seq_len = max_seq_len
        size = embed_dim if embedding_size is None else embedding_size
        self.embeddings = _Embeddings(vocab_size, type_vocab_size, size, pad_token_id, dropout, eps)
        self.embeddings_project = nn.Linear(size, embed_dim) if size != embed_dim else None
        named = {"activation": activation, "dropout": dropout, "attention_dropout": attention_dropout}
        named |= {"rotary_value": rotary_value, "eps": eps}
        blocks = (RoFormerBlock(embed_dim, num_heads, mlp_ratio, **named) for _ in range(num_blocks))
        positions = _SinusoidalPositions(max_seq_len, head_dim)
        self.encoder = nn.ModuleDict({"embed_positions": positions, "layer": nn.ModuleList(blocks)})
        init_normal(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        prefix_len: Tensor | None = None,
    ) -> Tensor:
        """Encodes a batch of sequences.

        Args:
            input_ids: [B, S] token ids, int32 or int64; S ≤ max_seq_len.
            attention_mask: [B, S], 0 or False where a token is padding, at any place.
            token_type_ids: [B, S], int32 or int64; all 0 by default.
            lengths: [B], int32 or int64, in place of attention_mask: from lengths[b] on tokens are padding, on which
                the attention then spends no time. What comes out at padding means nothing.
            prefix_len: [B], int32 or int64: UniLM's mask; the first prefix_len[b] tokens see each other, each later one
                sees them, itself and what is before it.

        Returns:
            [B, S, embed_dim].

        Raises:
            TypeError: ids are no int32 or int64.
            ValueError: a shape does not fit, the sequence is too long, or attention_mask and lengths are both given.
        """
        check_ids("input_ids", input_ids)
        if input_ids.shape[1] > self.max_seq_len:
            longest = f"[B, S] with S ≤ max_seq_len = {self.max_seq_len}"
            raise ValueError(f"input_ids must be {longest}, got {shape_text(input_ids)}")
        if token_type_ids is not None:
            check_ids("token_type_ids", token_type_ids, input_ids)
        attn_mask = None
        if attention_mask is not None:
            check_ids_shape("attention_mask", attention_mask, input_ids)
            if lengths is not None:
                raise ValueError("attention_mask must be None where lengths are given")
            attn_mask = (attention_mask != 0)[:, None, None]
        x = self.embeddings(input_ids, token_type_ids)
        if self.embeddings_project is not None:
            x = self.embeddings_project(x)
        rotary = self.encoder["embed_positions"](input_ids.shape[1])
        for block in self.encoder["layer"]:
            x = block(x, rotary, attn_mask=attn_mask, lengths=lengths, prefix_len=prefix_len)
        return x


class RoFormerForSeq2Seq(WritesAnswers):
    """A RoFormer that reads a source and writes an answer in one pass, token ids [B, S] to logits [B, S, vocab_size].

    UniLM's mask: the source's tokens see each other, the answer's see the source and what is before them. The
    classifier's weight is the token embedding's. State dicts of transformers' ``RoFormerForMaskedLM`` load unchanged
    and the other way round, also from files that leave the shared weights out.
    Dong et al., Unified Language Model Pre-training for Natural Language Understanding and Generation
    (arXiv:1905.03197).

    Args:
        kwargs: arguments of :class:`RoFormerEncoder`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.roformer = RoFormerEncoder(**kwargs)
        block = self.roformer.encoder["layer"][0]
        sizes = self.roformer.embeddings.word_embeddings.weight.shape
        self.cls = nn.ModuleDict({"predictions": _PredictionHead(block.output.LayerNorm, block.act, *sizes)})
        self.register_state_dict_post_hook(_add_shared)
        self.register_load_state_dict_pre_hook(_drop_shared)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        prefix_len: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of each position's next token, and their loss.

        Args:
            input_ids: [B, S], int32 or int64: a source, its answer, padding.
            token_type_ids: [B, S], int32 or int64: 0 for the source, 1 for the answer.
            prefix_len: [B], int32 or int64, the source's length; by default the zeros that begin token_type_ids.
            labels: [B, S], int32 or int64: input_ids where they are to be predicted, −100 elsewhere (source, padding).
                A label is compared with the logits of the position before.
            attention_mask: [B, S], 0 or False where a token is padding. An answer sees no padding behind it without.
            lengths: [B], in place of attention_mask; see :class:`RoFormerEncoder`.

        Returns:
            Logits [B, S, vocab_size]; the mean cross-entropy of the labels, None without labels.

        Raises:
            TypeError: ids are no int32 or int64.
            ValueError: a shape does not fit, or neither token_type_ids nor prefix_len is given.
        """
        if prefix_len is None:
            prefix_len = source_lengths(input_ids, token_type_ids)
        x = self.roformer(input_ids, attention_mask, token_type_ids, lengths=lengths, prefix_len=prefix_len)
        logits = self.predict(x)
        return logits, None if labels is None else next_token_loss(logits, labels, input_ids)

    def predict(self, x: Tensor) -> Tensor:
        """Logits [..., vocab_size] of what the encoder gives, [..., C]."""
        return self.cls["predictions"](x, self.roformer.embeddings.word_embeddings.weight)


class _Embeddings(nn.Module):
    def __init__(self, vocab: int, types: int, size: int, pad_token_id: int | None, dropout: float, eps: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, size, padding_idx=pad_token_id)
        self.token_type_embeddings = nn.Embedding(types, size)
        self.LayerNorm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = self.token_type_embeddings
        added = types.weight[0] if token_type_ids is None else types(token_type_ids)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + added))


class _SinusoidalPositions(nn.Module):
    """Row p is [sin(p·θ), cos(p·θ)] with θ_i = 10000^(−2i/head_dim), a constant of the state dict."""

    def __init__(self, max_seq_len: int, head_dim: int) -> None:
        super().__init__()
        theta = 10000 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * theta
        table = torch.cat([angle.sin(), angle.cos()], dim=1)
        self.register_buffer("weight", table.to(torch.get_default_dtype()))

    def forward(self, length: int) -> Rotary:
        sin, cos = self.weight[:length].chunk(2, dim=1)
        return Rotary(cos.contiguous(), sin.contiguous())


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, rotary_value: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.rotary_value = num_heads, dropout, rotary_value
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rotary: Rotary, attn_mask: Tensor | None, lengths: Tensor | None, prefix_len: Tensor | None
    ) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        output = scaled_attention(
            query,
            key,
            _rotate(value, rotary) if self.rotary_value else value,
            attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            prefix_len=prefix_len,
            query_lengths=lengths,
            key_lengths=lengths,
            rotary=rotary,
        )
        return output.transpose(1, 2).flatten(2)


class _AddNorm(nn.Module):
    """LN(dense(x) + residual): what ends both halves of a block."""

    def __init__(self, in_dim: int, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _PredictionHead(nn.Module):
    """Logits of tokens, by the embedding's own weight."""

    def __init__(self, norm: nn.LayerNorm, act: nn.Module, vocab_size: int, size: int) -> None:
        super().__init__()
        dense = nn.Linear(norm.normalized_shape[0], size)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(size, eps=norm.eps)})
        self.act = act
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        init_normal(self)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.transform["LayerNorm"](self.act(self.transform["dense"](x))), words, self.bias)


# In transformers' state dicts the classifier's parameters are listed again, under names of their own.
_SHARED = {
    "cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def _add_shared(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, source in _SHARED.items():
        state_dict[prefix + name] = state_dict[prefix + source]


def _drop_shared(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Before loading; the last argument collects the errors that load_state_dict raises."""
    for name, source in _SHARED.items():
        value, expected = state_dict.pop(prefix + name, None), state_dict.get(prefix + source)
        if value is not None and expected is not None and not value.is_meta and not torch.equal(value, expected):
            others[-1].append(f"{prefix}{name} must equal {prefix}{source}: the model shares them")


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, H, S, D], all of its channel pairs (2i, 2i + 1) rotated by position."""
    even, odd = x.unflatten(3, (-1, 2)).unbind(-1)
    rotated = even * rotary.cos - odd * rotary.sin, even * rotary.sin + odd * rotary.cos
    return torch.stack(rotated, dim=-1).flatten(3).to(x.dtype)


def source_lengths(input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """[B], the zeros that begin each row of token_type_ids."""
    check_ids("input_ids", input_ids)
    if token_type_ids is None:
        raise ValueError("prefix_len must be given where token_type_ids is None, got None")
    check_ids("token_type_ids", token_type_ids, input_ids)
    return (token_type_ids.cumsum(dim=1) == 0).sum(dim=1)


def next_token_loss(logits: Tensor, labels: Tensor, input_ids: Tensor) -> Tensor:
    check_ids("labels", labels, input_ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long())


def init_normal(model: nn.Module) -> None:
    """Weights of linear layers and embeddings normal with σ = 0.02, biases and the padding's embedding 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
