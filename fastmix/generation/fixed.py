"""Non-autoregressive decoding: the best keys of a trie under logits that are all there from the start."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.generation._hypotheses import (
    Hypotheses,
    TrieBeamSearchOutput,
    check_int,
    check_normalize,
    check_trie,
    first_nodes,
    score_dtype,
    take_rows,
)
from fastmix.generation.trie import Trie
from fastmix.ops._check import check_float, shape_text
from fastmix.ops.beam_search import trie_beam_step


@torch.no_grad()
def trie_decode_fixed(
    logits: Tensor, trie: Trie, *, num_beams: int, normalize: str | None = "vocab"
) -> TrieBeamSearchOutput:
    """The best keys of a trie under the logits of one forward pass, as of a masked language model, by beam search.

    A key of n ≤ L tokens scores Σ_{i<n} log p_i(token i), over its own positions; there is no EOS, and the empty key
    scores 0. With at least as many beams as keys the answer is exact.

    Args:
        logits: [B, L, V], one row a position.
        trie: the keys; one trie for all samples or one for each.
        num_beams: K ≥ 1.
        normalize: "vocab" (log-softmax over V), "allowed" (over the children of the beam's node) or None (logits as
            they are).

    Returns:
        The K best keys of each sample (`TrieBeamSearchOutput`), with ``num_model_calls`` 0.

    Raises:
        TypeError: an argument is of another type.
        ValueError: logits has another shape or device, num_beams is below 1, or normalize is unknown.
    """
    check_float("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must be [B, L, V], got {shape_text(logits)}")
    check_trie(trie)
    check_int("num_beams", num_beams, 1)
    check_normalize(normalize)
    batch, length, width = logits.shape
    nodes = first_nodes(trie, logits)
    scores = torch.zeros((batch, 1), dtype=score_dtype(logits), device=logits.device)
    sequences = torch.empty((batch, 1, 0), dtype=torch.int64, device=logits.device)
    finished = Hypotheses(batch, num_beams, scores.dtype, logits.device)
    finished.add(scores.where(_ends(nodes, trie), -torch.inf), nodes, sequences)
    for position in range(min(length, max(reader.max_depth for reader in trie.readers))):
        row = logits[:, position].to(scores.dtype)
        if normalize == "vocab":  # once, not for each of the beams
            row = row.log_softmax(1)
        scores, parents, tokens, nodes = trie_beam_step(
            row[:, None].expand(batch, nodes.shape[1], width),
            scores,
            nodes,
            trie,
            num_candidates=num_beams,
            eos_token_id=[],
            normalize=None if normalize == "vocab" else normalize,
        )
        sequences = torch.cat([take_rows(sequences, parents), tokens[..., None]], 2)
        finished.add(scores.where(_ends(nodes, trie), -torch.inf), nodes, sequences)
    return finished.output(trie, num_beams, num_model_calls=0)


def _ends(nodes: Tensor, trie: Trie) -> Tensor:
    """Whether a key ends at each node [B, K]: on the device, as the step that has no other candidate than EOS."""
    only_eos = torch.full((max(1, trie.vocab_size),), -torch.inf, device=nodes.device)
    only_eos[0] = 0
    step = trie_beam_step(
        only_eos.expand(*nodes.shape, -1),
        torch.zeros(nodes.shape, device=nodes.device),
        nodes,
        trie,
        num_candidates=2 * nodes.shape[1],  # a child may have the same token
        eos_token_id=0,
        normalize=None,
    )
    is_end = (step.node < 0) & (step.scores > -torch.inf)
    return torch.zeros_like(nodes).scatter_reduce(1, step.beam_index, is_end.long(), "amax").bool()
