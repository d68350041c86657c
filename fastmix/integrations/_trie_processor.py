"""A trie as a mask over a transformers model's scores, of rows that grow by a token a call and change places.

A row's node is found from its parent's, which the previous call left under the parent's bytes; a row whose parent it
has not seen is walked from the root. So a call's answer depends on the rows and on where their prompt ends, no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmix.generation import Trie
from fastmix.ops._check import shape_text

_KEPT_NODES = 1024  # whose tokens are remembered: the root and others with many rows below them
_LOW = -1e8  # finite, and below every sum of log-probabilities


class TrieLogitsProcessor:
    """Lets ``generate`` choose only tokens that lead to the keys of a trie: −inf for all others.

    ``model.generate(…, logits_processor=[TrieLogitsProcessor(trie, eos_token_id=…)])`` works with greedy search,
    sampling and beams, with encoder-decoder and decoder-only models and left-padded prompts. It does what
    ``prefix_allowed_tokens_fn`` would with an exact function of the trie: what continues a key keeps its score, an EOS
    where a key ends does. Rows that have ended, or that hold tokens which the trie does not, get pad (without a
    `pad_token_id` the first EOS) as their only token, with a finite score. Where processors that came before have
    excluded every token of a row, the trie's tokens get a very low score instead of −inf: its answer stays legal.

    Scores are taken in any float dtype, on any device. It keeps the nodes of the last call's rows, so one object
    serves one ``generate`` at a time, and any number one after another. Not for continuous batching, which does not
    pass a row's earlier tokens; assisted generation needs `prompt_length`.

    Args:
        trie: the keys, without EOS; one trie for all samples, or B of them (`Trie.concat`) for B samples, each with
            rows / B consecutive rows.
        eos_token_id: the token, or several, that may follow a whole key. Must not occur in a key.
        pad_token_id: what follows EOS; the model's own pad token.
        prompt_length: number of tokens before the key, padding and decoder start token counted; rows still shorter
            are left as they are (a forced BOS that is not in the keys). Default: a generation's first call sees
            the prompt. A call begins a generation unless it has as many rows as the one before, and each is one of
            those plus a token; a prompt that extends the rows of the last call so needs prompt_length or `reset`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an id is negative, or a key contains an EOS token.
    """

    def __init__(
        self,
        trie: Trie,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self.eos_token_ids = checked_eos(trie, eos_token_id)
        for name, value in (("pad_token_id", pad_token_id), ("prompt_length", prompt_length)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.trie, self.prompt_length = trie, prompt_length
        self._fill = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        self._tokens: dict[tuple[int, int], np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Takes the next call as the first of a generation."""
        self._prompt_length = self.prompt_length
        self._nodes: dict[tuple[int, bytes], int] = {}  # (sample, row) of the last call → node
        self._num_rows = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, with −inf where the trie does not allow the token.

        Args:
            input_ids: int64 [rows, length], prompt and generated tokens.
            scores: [rows, V], logits or log-probabilities of the next token.

        Returns:
            A new tensor like scores.

        Raises:
            ValueError: the shapes do not fit each other or the trie.
        """
        masked, allowed = self.mask(input_ids, scores)
        if allowed is not None and (excluded := masked.amax(1) == -torch.inf).any():
            low = max(_LOW, torch.finfo(scores.dtype).min / 64)  # may still be divided by a temperature
            masked = masked.masked_fill(allowed & excluded[:, None], low)
        return masked

    def mask(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The masked scores, all −inf where others have excluded what the trie allows, and the allowed tokens.

        None allowed: the rows have not reached prompt_length, and keep their scores.
        """
        self._check(input_ids, scores)
        rows = input_ids.cpu().contiguous().numpy()
        if self.prompt_length is not None and rows.shape[1] < self.prompt_length:
            return scores, None
        nodes = self._advance(rows)
        width = scores.shape[1]
        distinct = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
        places = [i * width + self._allowed(*node) for node, i in distinct.items()]
        of_node = torch.zeros(len(distinct) * width, dtype=torch.bool, device=scores.device)
        of_node[torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places])).to(scores.device)] = True
        row_node = torch.tensor([distinct[node] for node in nodes], dtype=torch.int64, device=scores.device)
        allowed = of_node.view(-1, width)[row_node]
        masked = scores.masked_fill(~allowed, -torch.inf)
        if ended := [row for row, (_, node) in enumerate(nodes) if node < 0]:
            masked[ended, self._fill] = scores[ended, self._fill].nan_to_num(0.0, 0.0, 0.0)
        return masked, allowed

    def _advance(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(sample, node) of each row; node −1 where the row has ended or left the trie."""
        samples = [i * self.trie.num_tries // len(rows) for i in range(len(rows))]
        parents = [self._nodes.get((b, row[:-1].tobytes())) for b, row in zip(samples, rows, strict=True)]
        if self.prompt_length is None and (
            self._prompt_length is None or len(rows) != self._num_rows or not rows.shape[1] or None in parents
        ):
            self._prompt_length, parents = rows.shape[1], [None] * len(rows)
        nodes = []
        for sample, row, parent in zip(samples, rows, parents, strict=True):
            reader = self.trie.readers[sample]
            if parent is None:
                node = reader.walk(row[self._prompt_length :].tolist())
            else:
                node = reader.child(parent, int(row[-1])) if parent >= 0 else -1
            nodes.append((sample, node))
        self._nodes = {(b, row.tobytes()): node for row, (b, node) in zip(rows, nodes, strict=True)}
        self._num_rows = len(rows)
        return nodes

    def _allowed(self, sample: int, node: int) -> np.ndarray:
        """The tokens that may follow at a node."""
        tokens = self._tokens.get((sample, node))
        if tokens is None:
            reader = self.trie.readers[sample]
            found = reader.tokens(node) + (self.eos_token_ids if reader.ends(node) else [])
            tokens = np.asarray(found or [self._fill])
            if len(self._tokens) == _KEPT_NODES:
                self._tokens.clear()
            self._tokens[sample, node] = tokens
        return tokens

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        if input_ids.ndim != 2 or scores.ndim != 2 or len(input_ids) != len(scores):
            raise ValueError(
                "input_ids must be [rows, length] and scores [rows, V], "
                f"got {shape_text(input_ids)} and {shape_text(scores)}"
            )
        if len(scores) % self.trie.num_tries:
            raise ValueError(f"rows must be a multiple of the {self.trie.num_tries} tries, got {len(scores)}")
        least = max(self.trie.vocab_size, self._fill + 1, *(token + 1 for token in self.eos_token_ids))
        if scores.shape[1] < least:
            raise ValueError(
                f"scores must have at least {least} columns for the trie's vocabulary ({self.trie.vocab_size}), "
                f"EOS {self.eos_token_ids} and pad {self._fill}, got {scores.shape[1]}"
            )


def checked_eos(trie: Trie, eos_token_id: int | Sequence[int]) -> list[int]:
    """The EOS tokens as a list, none of which occurs in a key."""
    if not isinstance(trie, Trie):
        raise TypeError(f"trie must be a fastmix.Trie, got {type(trie).__name__}")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not eos or not all(isinstance(token, int) and token >= 0 for token in eos):
        raise ValueError(f"eos_token_id must be a token or a list of tokens, each at least 0, got {eos_token_id!r}")
    if in_keys := [token for token in eos if trie.uses(token)]:
        raise ValueError(f"eos_token_id must not occur in the trie's keys, got {in_keys}: build them without EOS")
    return eos
