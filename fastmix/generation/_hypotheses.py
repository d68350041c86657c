"""What the searches share: their result, the finished hypotheses of a batch, and checks of arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmix.generation.trie import Trie

NORMALIZATIONS = ("vocab", "allowed", None)


class TrieBeamSearchOutput(NamedTuple):
    """The best keys of every sample, best first; a row that does not exist has score −inf, tokens −1 and no payloads.

    Attributes:
        sequences: int64 [B, R, L], the generated tokens, padded with −1 to the longest.
        scores: [B, R], float32, or float64 for float64 logits.
        payloads: ``payloads[b][r]``, the list of the key's payloads.
        num_model_calls: how often the model was called.
    """

    sequences: Tensor
    scores: Tensor
    payloads: list[list[list[int]]]
    num_model_calls: int


class Hypotheses:
    """The best finished hypotheses of every sample, best first; rows still free have score −inf."""

    def __init__(self, batch: int, rows: int, dtype: torch.dtype, device: torch.device):
        self.scores = torch.full((batch, rows), -torch.inf, dtype=dtype, device=device)  # [B, R]
        self._nodes = torch.full((batch, rows), -1, device=device)  # [B, R], where the key ends
        self._sequences = torch.full((batch, rows, 0), -1, device=device)  # [B, R, L]

    def add(self, scores: Tensor, nodes: Tensor, sequences: Tensor) -> None:
        """Keep the best of these [B, N] and the present ones, the present ones in a tie; −inf is no hypothesis."""
        rows, length = self.scores.shape[1], sequences.shape[2]
        padded = torch.nn.functional.pad(self._sequences, (0, length - self._sequences.shape[2]), value=-1)
        scores, order = torch.cat([self.scores, scores], 1).sort(dim=1, descending=True, stable=True)
        self.scores, order = scores[:, :rows], order[:, :rows]
        self._nodes = torch.cat([self._nodes, nodes], 1).gather(1, order)
        self._sequences = take_rows(torch.cat([padded, sequences], 1), order)

    def output(self, trie: Trie, rows: int, num_model_calls: int) -> TrieBeamSearchOutput:
        sequences = self._sequences[:, :rows]
        length = int((sequences >= 0).any(0).any(0).sum())
        payloads = [
            [trie.readers[b % trie.num_tries].payloads(node) for node in nodes]
            for b, nodes in enumerate(self._nodes[:, :rows].tolist())
        ]
        return TrieBeamSearchOutput(sequences[:, :, :length], self.scores[:, :rows], payloads, num_model_calls)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[b, rows[b, k]]`` as [B, K, N], of values [B, M, N] and rows [B, K]."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))


def first_nodes(trie: Trie, logits: Tensor) -> Tensor:
    """The root of each sample's trie, [B, 1]."""
    batch = logits.shape[0]
    if trie.num_tries not in (1, batch):
        raise ValueError(f"trie must hold one trie or one for each of the {batch} samples, got {trie.num_tries}")
    if trie.device != logits.device:
        raise ValueError(f"trie must be on the device of the logits, {logits.device}, got {trie.device}")
    return trie.roots.expand(batch)[:, None]


def score_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def check_trie(trie: object) -> None:
    if not isinstance(trie, Trie):
        raise TypeError(f"trie must be a fastmix.Trie, got {type(trie).__name__}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in {low}..{high}'}, got {value}")


def check_normalize(normalize: object) -> None:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be 'vocab', 'allowed' or None, got {normalize!r}")
