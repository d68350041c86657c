"""Look-ahead: candidates whose completions share more with the question weigh more (the KgCLUE baseline's rule)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix.generation._hypotheses import check_int, check_trie
from fastmix.generation.trie import Trie


def lookahead_bias(trie: Trie, question_tokens: Sequence[Sequence[int]], *, sep_token_id: int) -> LookaheadBias:
    """Look-ahead over a trie of triples S [SEP] P [SEP] …: favours the P that the question mentions.

    Where a node has several children and S is finished, a child's weight is the largest LCS(key, question) −
    LCS(prefix, question) + 1 over the keys through it, LCS being the length of the longest common subsequence, and its
    log-probability is divided by the weight. What the trie allows is then normalised anew, at every node.

    Args:
        trie: the keys; one trie for all samples or one for each.
        question_tokens: one list of tokens a sample.
        sep_token_id: ends S: a prefix that contains it has a finished S.

    Returns:
        What `trie_beam_search` and `trie_beam_step` take as ``candidate_bias``. It reads the trie on the host.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the trie holds neither one trie nor one a sample, or sep_token_id is negative.
    """
    check_trie(trie)
    check_int("sep_token_id", sep_token_id, 0)
    try:
        questions = [[int(token) for token in question] for question in question_tokens]
    except (TypeError, ValueError) as error:
        raise TypeError(f"question_tokens must be a list of ints for each sample, got {error}") from None
    if trie.num_tries not in (1, len(questions)):
        raise ValueError(
            f"trie must hold one trie or one for each of the {len(questions)} questions, got {trie.num_tries}"
        )
    return LookaheadBias(trie, questions, sep_token_id)


class LookaheadBias:
    """The `candidate_bias` that `lookahead_bias` returns; it keeps the weights of the nodes that it has seen."""

    def __init__(self, trie: Trie, questions: list[list[int]], sep_token_id: int):
        self._trie, self._sep = trie, sep_token_id
        self._questions = [_Question(question) for question in questions]
        self._weights: dict[tuple[int, int], dict[int, int]] = {}

    def reweigh(self, logits: Tensor, nodes: Tensor, trie: Trie, normalize: str | None) -> tuple[Tensor, str | None]:
        """The logits [B, K, V] with log-probabilities divided by the weights, to be normalised over what is allowed."""
        if trie is not self._trie:
            raise ValueError("candidate_bias must have been made for the trie that is searched")
        if len(self._questions) != logits.shape[0]:
            raise ValueError(
                f"candidate_bias must have {logits.shape[0]} questions, one a sample, got {len(self._questions)}"
            )
        weighted = [
            (b, k, token, weight)
            for b, row in enumerate(nodes.tolist())
            for k, node in enumerate(row)
            for token, weight in self._weights_of(b, node).items()
        ]
        if not weighted:
            return logits, "allowed"
        b, k, token, weight = torch.tensor(weighted, device=logits.device).unbind(1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        # A constant per row does not count, so log p / weight + logsumexp goes with the other tokens' plain logits.
        constant = logits.logsumexp(2)[b, k]
        logits[b, k, token] = (logits[b, k, token] - constant) / weight + constant
        return logits, "allowed"

    def _weights_of(self, b: int, node: int) -> dict[int, int]:
        """Token → weight, of the children of a node that weigh more than 1."""
        if (b, node) not in self._weights:
            self._weights[b, node] = self._find_weights(b, node)
        return self._weights[b, node]

    def _find_weights(self, b: int, node: int) -> dict[int, int]:
        reader, question = self._trie.readers[b % self._trie.num_tries], self._questions[b]
        prefix = reader.prefix(node)
        if self._sep not in prefix or len(reader.tokens(node)) < 2:
            return {}
        start = question.extend(question.start, prefix)
        weights: dict[int, int] = {}
        for i in range(*reader.interval(node)):
            rest = reader.key(i)[len(prefix) :]
            if rest:
                gain = question.lcs(question.extend(start, rest)) - question.lcs(start)
                weights[rest[0]] = max(gain + 1, weights.get(rest[0], 1))
        return {token: weight for token, weight in weights.items() if weight > 1}


class _Question:
    """Longest common subsequences with a fixed sequence, bit-parallel (Hyyrö 2004): bit i is 0 where row i steps up."""

    def __init__(self, tokens: list[int]):
        self.start = (1 << len(tokens)) - 1  # of the empty sequence
        self._places: dict[int, int] = {}
        for i, token in enumerate(tokens):
            self._places[token] = self._places.get(token, 0) | 1 << i

    def extend(self, state: int, tokens: list[int]) -> int:
        for token in tokens:
            match = state & self._places.get(token, 0)
            state = ((state + match) | (state - match)) & self.start
        return state

    def lcs(self, state: int) -> int:
        return (self.start ^ state).bit_count()
