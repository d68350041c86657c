"""Sampling under a trie: frequencies against exact probabilities, scores, reproducibility."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastmix import Trie
from fastmix.generation import lookahead_bias, trie_beam_search

WIDTH, EOS = 8, 0
KEYS = [(1,), (1, 2), (1, 2, 3), (1, 4), (2, 2), (2, 3, 1, 1, 1), (5,)]


def _bigram(batch: int, seed: int = 0):
    """A step_fn whose logits depend on the last token, and its table [V, V]; row 0 is the first token's."""
    table = 1.5 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def step_fn(tokens, beam_index, state):
        return (table[:1].expand(batch, -1) if tokens is None else table[tokens]).float(), None

    return step_fn, table


def _frequencies(output) -> dict[tuple[int, ...], int]:
    found: dict[tuple[int, ...], int] = {}
    for rows in output.payloads:
        drawn = tuple(sorted(payload for row in rows for payload in row))
        found[drawn] = found.get(drawn, 0) + 1
    return found


def _check_frequencies(found: dict, probabilities: dict) -> None:
    """Pearson's statistic within five standard deviations of its mean, and nothing impossible."""
    total = sum(found.values())
    assert set(found) <= {what for what, p in probabilities.items() if p > 0}
    assert sum(probabilities.values()) == pytest.approx(1)
    statistic = sum((found.get(what, 0) - total * p) ** 2 / (total * p) for what, p in probabilities.items() if p > 0)
    freedom = len(probabilities) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


def _conditionals(key: tuple[int, ...]):
    """For each token of a key and its EOS: the row of the table, the token, all tokens that are allowed."""
    for i, token in enumerate((*key, EOS)):
        prefix = key[:i]
        allowed = {other[i] for other in KEYS if other[:i] == prefix and len(other) > i}
        yield (prefix[-1] if prefix else 0), token, sorted(allowed | ({EOS} if prefix in KEYS else set()))


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_beam_is_ancestral_sampling(temperature, normalize):
    batch = 1000
    step_fn, table = _bigram(batch)
    output = trie_beam_search(
        step_fn,
        Trie.from_sequences(KEYS),
        num_beams=1,
        max_length=9,
        eos_token_id=EOS,
        length_penalty=0.0,
        normalize=normalize,
        do_sample=True,
        temperature=temperature,
        generator=torch.Generator().manual_seed(1),
    )
    table = table / temperature
    probabilities, scores = {}, {}
    for i, key in enumerate(KEYS):
        parts = [(table[row][token], table[row], table[row][allowed]) for row, token, allowed in _conditionals(key)]
        of_allowed = float(sum(value - allowed.logsumexp(0) for value, _, allowed in parts))
        of_vocabulary = float(sum(value - row.logsumexp(0) for value, row, _ in parts))
        probabilities[(i,)], scores[i] = math.exp(of_allowed), of_vocabulary if normalize == "vocab" else of_allowed
    _check_frequencies(_frequencies(output), probabilities)
    drawn = torch.tensor([scores[rows[0][0]] for rows in output.payloads])
    torch.testing.assert_close(output.scores[:, 0], drawn, rtol=1e-5, atol=1e-5)


def test_beams_are_drawn_without_replacement():
    # Four of five keys are drawn, and the best two of them stay.
    keys, batch = [(token,) for token in range(1, 6)], 1000
    step_fn, table = _bigram(batch, seed=3)
    output = trie_beam_search(
        step_fn,
        Trie.from_sequences(keys),
        num_beams=2,
        max_length=2,
        eos_token_id=EOS,
        early_stopping="never",
        do_sample=True,
        generator=torch.Generator().manual_seed(1),
    )
    assert (output.scores > -math.inf).all()
    p = torch.softmax(table[0, 1:6], 0).tolist()
    best = sorted(range(5), key=lambda i: -p[i])
    probabilities: dict[tuple[int, ...], float] = {}
    for drawn in itertools.permutations(range(5), 4):
        left, chance = 1.0, 1.0
        for i in drawn:
            chance, left = chance * p[i] / left, left - p[i]
        kept = tuple(sorted([i for i in best if i in drawn][:2]))
        probabilities[kept] = probabilities.get(kept, 0) + chance
    _check_frequencies(_frequencies(output), probabilities)


def _sample(seed: int, num_beams: int = 3, **options):
    step_fn, _ = _bigram(64)
    arguments = {"num_beams": num_beams, "max_length": 9, "eos_token_id": EOS, "do_sample": True}
    generator = torch.Generator().manual_seed(seed)
    return trie_beam_search(step_fn, Trie.from_sequences(KEYS), **arguments, generator=generator, **options)


def test_a_generator_makes_it_reproducible():
    first, again, other = _sample(1), _sample(1), _sample(2)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(first.scores, again.scores)
    assert first.payloads != other.payloads
    forward = _sample(1, fast_forward=True)
    assert torch.equal(first.sequences, forward.sequences)
    assert torch.equal(first.scores, forward.scores)


def test_rows_are_keys_without_duplicates_and_have_their_scores():
    _, table = _bigram(1)
    bias = torch.linspace(-1, 1, WIDTH)
    output = _sample(5, num_beams=4, temperature=2.0, length_penalty=0.0, candidate_bias=bias)
    log_p = (table / 2).log_softmax(1) + bias
    for row, score, payload in zip(
        output.sequences.flatten(0, 1), output.scores.flatten(), itertools.chain(*output.payloads), strict=True
    ):
        tokens = row[row >= 0].tolist()
        if not tokens:
            assert score == -math.inf
            assert payload == []
            continue
        assert tokens[-1] == EOS
        assert [KEYS.index(tuple(tokens[:-1]))] == payload
        expected = sum(log_p[row, token] for row, token in itertools.pairwise([0, *tokens]))
        assert float(score) == pytest.approx(float(expected), abs=1e-4)
    for rows in output.payloads:
        found = [payload[0] for payload in rows if payload]
        assert len(found) == len(set(found))


def test_look_ahead_is_sampled_from_the_weighted_probabilities():
    # The question has 2, so p(2) becomes √p(2) behind the separator 1, before what is allowed is normalised.
    batch = 1000
    step_fn, table = _bigram(batch)
    trie = Trie.from_sequences([(1, 2), (1, 3)])
    output = trie_beam_search(
        step_fn,
        trie,
        num_beams=1,
        max_length=3,
        eos_token_id=EOS,
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
        candidate_bias=lookahead_bias(trie, [[2, 7]] * batch, sep_token_id=1),
    )
    p = table[1].softmax(0)
    weighted = torch.stack([p[2].sqrt(), p[3]])
    weighted = (weighted / weighted.sum()).tolist()
    _check_frequencies(_frequencies(output), {(0,): weighted[0], (1,): weighted[1]})
