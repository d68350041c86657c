"""RoFormer-Sim: one RoFormer that writes sentences and gives vectors of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.nn.roformer import RoFormerForSeq2Seq, init_normal, next_token_loss, source_lengths
from fastmix.ops._check import check_choice


class RoFormerSimOutput(NamedTuple):
    """What :class:`RoFormerSim` gives for a batch of pairs.

    Attributes:
        logits: [B, S, vocab_size], of each position's next token.
        vectors: [B, embed_dim] of length 1, of the first sentences; float32 (float64 for float64).
        loss: the mean cross-entropy of the labels, None without labels.
    """

    logits: Tensor
    vectors: Tensor
    loss: Tensor | None


class RoFormerSim(RoFormerForSeq2Seq):
    """A RoFormer that rewrites sentences and embeds them, in one pass, token ids [B, S] to logits and vectors.

    A row is a pair of sentences under UniLM's mask. The first sentence's tokens see each other alone, so their pooled
    output is the vector of that sentence, and the second sentence is learnt as its continuation. Trained with each pair
    in both orders, rows 2i and 2i + 1, by the sum of two losses::

        output = model(input_ids, token_type_ids, labels=labels)
        loss = output.loss + fastmix.losses.in_batch_similarity_loss(output.vectors)

    Except for ``pooling="linear"``, parameters are those of :class:`RoFormerForSeq2Seq`, whose state dicts load.
    Su, SimBERT: Integrating Retrieval and Generation into BERT (technical report, 2020), and RoFormer-Sim: Integrating
    Retrieval and Generation into RoFormer (2021).

    Args:
        pooling: the vector of a sentence before it is normalised: "cls", the output at its first token; "linear", a
            linear layer of that, as in the original; "mean", the mean over its tokens.
        kwargs: arguments of :class:`RoFormerEncoder`.
    """

    def __init__(self, *, pooling: str = "cls", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("pooling", pooling, ("cls", "linear", "mean"))
        self.pooling, self.pooler = pooling, None
        if pooling == "linear":
            dim = self.roformer.encoder["layer"][0].output.dense.out_features
            self.pooler = nn.Linear(dim, dim)
            init_normal(self.pooler)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        prefix_len: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> RoFormerSimOutput:
        """The logits of each position's next token, the first sentences' vectors, and the loss of the labels.

        Args:
            input_ids: [B, S], int32 or int64: a sentence, its partner, padding.
            token_type_ids: [B, S], int32 or int64: 0 for the first sentence, 1 for the second.
            prefix_len: [B], int32 or int64, the first sentence's length; by default the zeros that begin
                token_type_ids.
            labels: [B, S], int32 or int64: input_ids where they are to be predicted, −100 elsewhere (first sentence,
                padding). A label is compared with the logits of the position before.
            attention_mask: [B, S], 0 or False where a token is padding.
            lengths: [B], in place of attention_mask; see :class:`RoFormerEncoder`.

        Returns:
            Logits, vectors, loss. A row without a first sentence is pooled to zeros.

        Raises:
            TypeError: ids are no int32 or int64.
            ValueError: a shape does not fit, or neither token_type_ids nor prefix_len is given.
        """
        if prefix_len is None:
            prefix_len = source_lengths(input_ids, token_type_ids)
        x = self.roformer(input_ids, attention_mask, token_type_ids, lengths=lengths, prefix_len=prefix_len)
        logits = self.predict(x)
        vectors = F.normalize(self._pool(x, prefix_len, attention_mask, lengths))
        loss = None if labels is None else next_token_loss(logits, labels, input_ids)
        return RoFormerSimOutput(logits, vectors, loss)

    def encode(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """The vectors of sentences, each alone in its row: those that it has as the first sentence of any pair.

        Args:
            input_ids: [B, S], int32 or int64.
            attention_mask: [B, S], 0 or False where a token is padding.
            lengths: [B], in place of attention_mask; see :class:`RoFormerEncoder`.
            normalize: whether the vectors get length 1; :class:`fastmix.losses.SentencePairHead` learns from such that
                have not.

        Returns:
            [B, embed_dim], float32 (float64 for float64).

        Raises:
            TypeError: ids are no int32 or int64.
            ValueError: a shape does not fit.
        """
        x = self.roformer(input_ids, attention_mask, lengths=lengths)
        vectors = self._pool(x, None, attention_mask, lengths)
        return F.normalize(vectors) if normalize else vectors

    def _pool(
        self, x: Tensor, prefix_len: Tensor | None, attention_mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """[B, C] from the tokens of the first sentence; float32 at least."""
        place = torch.arange(x.shape[1], device=x.device)
        chosen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            chosen = attention_mask != 0
        for end in (prefix_len, lengths):
            if end is not None:
                chosen = chosen & (place < end[:, None])
        if self.pooling != "mean":
            chosen = chosen & (chosen.cumsum(dim=1) == 1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = x.masked_fill(~chosen[..., None], 0).sum(dim=1)
        pooled = total / chosen.sum(dim=1, keepdim=True).clamp(min=1)
        if self.pooler is None:
            return pooled
        return self.pooler(pooled.to(self.pooler.weight.dtype)).to(pooled.dtype)
