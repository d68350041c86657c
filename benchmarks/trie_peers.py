"""Peers of the trie and of its beam search.

Those of a step return scores, beams and tokens, as trie_beam_step does; the harness compares the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastmix.benchmarks import trie_data
from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.peers import missing
from fastmix.benchmarks.trie_data import EOS, Setting

# A step


def step_peers(setting: Setting, depth: int) -> tuple[Provider, ...]:
    return (
        Provider("transformers + dict trie", _scores_of(_transformers(setting, depth)), missing("transformers")),
        Provider("log_softmax, CSR children, topk", _scores_of(_csr_children(setting, depth))),
        Provider("unconstrained log_softmax + topk", _scores_of(_unconstrained), yardstick=True),
    )


def _scores_of(step: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda **inputs: step(**inputs)[0]


def _transformers(setting: Setting, depth: int) -> Callable[..., tuple[Tensor, ...]]:
    """What GenerationMixin._beam_search computes from logits, with a prefix_allowed_tokens_fn over nested dictionaries.

    The dictionaries hold the paths of these beams and all children at their ends, not the other keys: the same walks
    and lists, without the time and the gigabyte that the rest takes.
    """

    @functools.cache
    def prepared(device: torch.device):
        from transformers import PrefixConstrainedLogitsProcessor

        beams = trie_data.prefixes(setting, depth)
        root = dict_trie(
            [*prefix, token]
            for prefix, tokens in zip(beams, trie_data.children(setting, depth), strict=True)
            for token in tokens
        )
        processor = PrefixConstrainedLogitsProcessor(lambda _, sent: allowed_tokens(root, sent.tolist()), setting.beams)
        return processor, torch.tensor(beams, dtype=torch.int64, device=device)

    def step(logits, beam_scores, nodes, trie, *, num_candidates, eos_token_id):
        batch, beams, vocab_size = logits.shape
        processor, sequences = prepared(logits.device)
        log_probs = torch.log_softmax(logits.to(copy=True, dtype=torch.float32).view(-1, vocab_size), dim=-1)
        log_probs = processor(sequences, log_probs).view(batch, beams, vocab_size) + beam_scores.float()[:, :, None]
        scores, index = torch.topk(log_probs.view(batch, -1), num_candidates)
        return scores, index // vocab_size, index % vocab_size

    return step


def dict_trie(keys: Iterable[list[int]]) -> dict:
    """Nested dictionaries."""
    root: dict = {}
    for key in keys:
        node = root
        for token in key:
            node = node.setdefault(token, {})
    return root


def allowed_tokens(root: dict, sequence: list[int]) -> list[int]:
    """What may follow a sequence; EOS where there is nothing, as transformers goes on asking for finished beams."""
    node = root
    for token in sequence:
        node = node.get(token)
        if node is None:
            return [EOS]
    return list(node) or [EOS]


def _csr_children(setting: Setting, depth: int) -> Callable[..., tuple[Tensor, ...]]:
    """Vectorised: log-softmax, then the children's tokens, of beams side by side and padded, gathered from a CSR table.

    The table has the rows of these beams only.
    """

    @functools.cache
    def prepared(device: torch.device):
        rows = trie_data.children(setting, depth)
        starts = np.cumsum([0, *map(len, rows)])
        return tuple(torch.from_numpy(array).to(device) for array in (starts, np.concatenate(rows).astype(np.int64)))

    def step(logits, beam_scores, nodes, trie, *, num_candidates, eos_token_id):
        batch, _, vocab_size = logits.shape
        starts, tokens = prepared(logits.device)
        first, count = starts[:-1, None], starts.diff()[:, None]
        j = torch.arange(int(count.max()), device=logits.device)
        legal = j < count
        token = tokens[(first + j).clamp_(max=len(tokens) - 1)]
        log_probs = torch.log_softmax(logits.float(), dim=-1).view(-1, vocab_size).gather(1, token)
        scores = (log_probs + beam_scores.float().view(-1, 1)).masked_fill_(~legal, float("-inf")).view(batch, -1)
        best, index = torch.topk(scores, min(num_candidates, scores.shape[1]))
        best = torch.nn.functional.pad(best, (0, num_candidates - best.shape[1]), value=float("-inf"))
        return best, index // token.shape[1], token.view(batch, -1).gather(1, index)

    return step


def _unconstrained(logits, beam_scores, nodes, trie, *, num_candidates, eos_token_id):
    scores = torch.log_softmax(logits.float(), dim=-1) + beam_scores.float()[:, :, None]
    return torch.topk(scores.view(len(logits), -1), num_candidates)


# The index


@functools.cache
def dict_of_keys(setting: Setting) -> dict:
    of = trie_data.keys(setting)
    bounds = of.offsets.tolist()
    tokens = of.tokens.tolist()
    return dict_trie([*tokens[start:end], EOS] for start, end in pairwise(bounds))


def marisa_keys(matrix: np.ndarray):
    """marisa-trie knows bytes: a token is two, the high one first."""
    import marisa_trie

    width = 2 * matrix.shape[1]
    text = matrix.astype(">u2").tobytes()
    return marisa_trie.BinaryTrie(text[i : i + width] for i in range(0, len(text), width))


def marisa_records(matrix: np.ndarray):
    """With a payload for each key. These keys are text: a token is a character, past the control characters."""
    import marisa_trie

    text = (matrix + 0x100).astype("<u4").tobytes().decode("utf-32-le")
    width = matrix.shape[1]
    keys = (text[i : i + width] for i in range(0, len(text), width))
    return marisa_trie.RecordTrie("<I", ((key, (i,)) for i, key in enumerate(keys)))
