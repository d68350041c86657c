"""One decoding step under a prefix tree in plain PyTorch; the rows of the beams are a Python loop."""

from __future__ import annotations

import functools
from itertools import chain

import torch
from torch import Tensor

from fastmix.reference._trie import TrieReader, read_arena

_NONE = float("-inf")


def trie_beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    nodes: Tensor,
    arena: Tensor,
    *,
    num_candidates: int,
    eos_token_ids: list[int],
    normalize: str | None,
    candidate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The public function's formula over the bytes of a trie; candidate_bias is expanded to [B, K, V]."""
    batch, beams, _ = logits.shape
    readers = read_arena(arena.cpu().numpy())
    values = logits if logits.dtype == torch.float64 else logits.float()
    totals = beam_scores.to(values.dtype)
    scores = values.new_full((batch, num_candidates), _NONE)
    beam_index = nodes.new_zeros((batch, num_candidates))
    token = nodes.new_full((batch, num_candidates), -1)
    node = nodes.new_full((batch, num_candidates), -1)
    for b in range(batch):
        reader = readers[b if len(readers) > 1 else 0]
        of_node = functools.cache(functools.partial(_candidates, reader, eos_token_ids=tuple(eos_token_ids)))
        found = [of_node(int(nodes[b, k])) if totals[b, k] > _NONE else ([], []) for k in range(beams)]
        of_beams = [
            _scores(values[b, k], totals[b, k], found[k][0], normalize, candidate_bias, (b, k)) for k in range(beams)
        ]
        every = torch.cat([values.new_empty(0), *of_beams])
        legal = every > _NONE  # and no NaN
        best = every.where(legal, _NONE).sort(descending=True, stable=True).indices
        best = best[legal[best]][:num_candidates]
        count = len(best)
        scores[b, :count] = every[best]
        for column, values_of_beam in (
            (beam_index, [[k] * len(found[k][0]) for k in range(beams)]),
            (token, [tokens for tokens, _ in found]),
            (node, [children for _, children in found]),
        ):
            flat = torch.tensor([*chain.from_iterable(values_of_beam)], dtype=torch.int64, device=logits.device)
            column[b, :count] = flat[best]
    return scores, beam_index, token, node


def _candidates(reader: TrieReader, node: int, eos_token_ids: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Tokens, ascending, and the nodes they lead to: the children, and −1 for each EOS where a key ends."""
    tokens, children = reader.children(node)
    if not reader.ends(node):
        return tokens, children
    together = sorted([*zip(tokens, children, strict=True), *((eos, -1) for eos in eos_token_ids)])
    return [token for token, _ in together], [child for _, child in together]


def _scores(
    row: Tensor, total: Tensor, tokens: list[int], normalize: str | None, bias: Tensor | None, place: tuple[int, int]
) -> Tensor:
    allowed = row[torch.tensor(tokens, dtype=torch.int64, device=row.device)]
    if normalize == "vocab" and tokens:
        allowed = allowed - row.logsumexp(0)
    elif normalize == "allowed" and tokens:
        allowed = allowed - allowed.logsumexp(0)
    scores = total + allowed
    return scores if bias is None else scores + bias[place][tokens].to(row.dtype)
