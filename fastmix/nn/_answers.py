"""Answers written by a sequence-to-sequence model in one encoder, token by token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.generation.search import StepFunction
from fastmix.nn._layers import check_ids
from fastmix.ops._check import check_same_device, check_tensor, dtype_name, shape_text


class WritesAnswers(nn.Module):
    """Generation for a model with an encoder `roformer` and `predict`, its head."""

    def step_fn(self, input_ids: Tensor, lengths: Tensor | None = None) -> StepFunction:
        """The model as :func:`fastmix.generation.trie_beam_search` calls it: writes answers to sources.

        Every call encodes the rows anew; nothing is cached. Put the model in evaluation mode first.

        Args:
            input_ids: [B, S], int32 or int64, the sources. S and the tokens written must fit max_seq_len.
            lengths: [B], int32 or int64, 1 … S: tokens from here on are padding.

        Returns:
            ``step_fn(tokens, beam_index, state) -> (logits, state)``.

        Raises:
            TypeError: ids or lengths are no int32 or int64.
            ValueError: a shape or device does not fit, or a length is outside.
        """
        check_ids("input_ids", input_ids)
        if lengths is None:
            lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1])
        longest = _check_lengths(lengths, input_ids)
        input_ids, lengths = input_ids[:, :longest], lengths.long()

        def step(tokens: Tensor | None, beam_index: Tensor | None, state: object) -> tuple[Tensor, object]:
            if tokens is None:
                answers = input_ids.new_empty(len(input_ids), 1, 0)
                return self._continue(input_ids, lengths, answers, 1)[:, 0, 0], answers
            new = tokens[..., None] if tokens.ndim == 2 else tokens
            before = state.gather(1, beam_index[..., None].expand(-1, -1, state.shape[2]))
            answers = torch.cat([before, new.to(before.dtype)], dim=2)
            logits = self._continue(input_ids, lengths, answers, new.shape[2])
            return logits[:, :, 0] if tokens.ndim == 2 else logits, answers

        return step

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_length: int,
        eos_token_id: int,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        top_p: float = 1.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Writes answers to sources, the likeliest token each time or drawn.

        For answers of a given set, or the best ones by beam search, use :meth:`step_fn`. Put the model in evaluation
        mode first.

        Args:
            input_ids: [B, S], int32 or int64, the sources. S + max_length − 1 tokens must fit max_seq_len.
            lengths: [B], int32 or int64, 1 … S: tokens from here on are padding.
            max_length: most tokens of an answer, EOS counted.
            eos_token_id: the token that ends it.
            num_return_sequences: R, answers drawn for each row; 1 without `do_sample`.
            do_sample: draws tokens in proportion to their probability, in place of taking the likeliest.
            top_p: in (0, 1]: draws from the fewest tokens that have at least this probability together.
            temperature: divides the logits before the softmax; positive.
            generator: of the model's device, for `do_sample`.

        Returns:
            int64 [B, R, T], T ≤ max_length the tokens of the longest; what follows a row's EOS is EOS.

        Raises:
            TypeError: ids or lengths are no int32 or int64, or a count is no int.
            ValueError: a shape or device does not fit, or a value is out of range.

        Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv:1904.09751).
        """
        _check_counts(max_length, num_return_sequences, do_sample)
        _check_probabilities(top_p, temperature)
        step = self.step_fn(input_ids, lengths)
        logits, state = step(None, None, None)
        if not 0 <= eos_token_id < logits.shape[1]:
            raise ValueError(f"eos_token_id must be in 0..{logits.shape[1] - 1}, got {eos_token_id}")
        logits = logits[:, None].expand(-1, num_return_sequences, -1)
        rows = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)  # all continue the single first
        written = rows.new_empty(*rows.shape, 0)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        while True:
            tokens = _draw(logits, top_p, temperature, generator) if do_sample else logits.argmax(dim=2)
            tokens = tokens.masked_fill(ended, eos_token_id)
            written = torch.cat([written, tokens[..., None]], dim=2)
            ended |= tokens == eos_token_id
            if written.shape[2] == max_length or bool(ended.all()):
                return written
            logits, state = step(tokens, rows, state)
            rows = torch.arange(num_return_sequences, device=rows.device).expand_as(rows)

    def _continue(self, input_ids: Tensor, lengths: Tensor, answers: Tensor, count: int) -> Tensor:
        """Logits [B, K, count, V] of what follows the last `count` tokens of the rows with their answers [B, K, L]."""
        b, k, length = answers.shape
        place = lengths[:, None] + torch.arange(length, device=lengths.device)  # [B, L], right behind the source
        rows = F.pad(input_ids, (0, length))[:, None].expand(-1, k, -1)
        rows = rows.scatter(2, place[:, None].expand(-1, k, -1), answers).flatten(0, 1)
        lengths = lengths.repeat_interleave(k)
        types = (torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]).long()
        x = self.roformer(rows, token_type_ids=types, lengths=lengths + length, prefix_len=lengths)
        last = (lengths + length - count)[:, None] + torch.arange(count, device=lengths.device)
        x = x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return self.predict(x).unflatten(0, (b, k))


def _draw(logits: Tensor, top_p: float, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [B, R, V]."""
    probs = (logits.flatten(0, 1).float() / temperature).softmax(dim=1)
    if top_p < 1:
        ordered, order = probs.sort(dim=1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(dim=1) - ordered >= top_p, 0)  # those before suffice
        probs = torch.zeros_like(probs).scatter(1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).view(logits.shape[:2])


def _check_lengths(lengths: Tensor, input_ids: Tensor) -> int:
    """The longest."""
    check_tensor("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {dtype_name(lengths.dtype)}")
    if lengths.shape != input_ids.shape[:1]:
        raise ValueError(f"lengths must be [{len(input_ids)}], got {shape_text(lengths)}")
    check_same_device("lengths", lengths, "input_ids", input_ids)
    if len(lengths) == 0:
        return input_ids.shape[1]
    smallest, longest = torch.stack(lengths.aminmax()).tolist()
    if smallest < 1 or longest > input_ids.shape[1]:
        raise ValueError(f"lengths must be in 1..{input_ids.shape[1]}, got values from {smallest} to {longest}")
    return longest


def _check_counts(max_length: int, num_return_sequences: int, do_sample: bool) -> None:
    for name, value in (("max_length", max_length), ("num_return_sequences", num_return_sequences)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(f"num_return_sequences must be 1 without do_sample, got {num_return_sequences}")


def _check_probabilities(top_p: float, temperature: float) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
