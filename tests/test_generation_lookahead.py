"""lookahead_bias: the weights against the definition, the search against it, a question over a small triple store."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmix
from fastmix import Trie
from fastmix.generation import lookahead_bias, trie_beam_search

SEP, EOS, WIDTH = 0, 6, 7

tokens = st.lists(st.integers(0, 5), max_size=6)
keys_strategy = st.lists(st.one_of(tokens, st.builds(lambda key: [2, SEP, *key], tokens)), min_size=1, max_size=12)


def _lcs(a, b) -> int:
    """Length of the longest common subsequence, by the table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def _probabilities(row: torch.Tensor, prefix, keys, question) -> dict[tuple[int, bool], float]:
    """(token, whether it ends the key) → probability, as the look-ahead is defined."""
    children = sorted({key[len(prefix)] for key in keys if key[: len(prefix)] == prefix and len(key) > len(prefix)})
    p = row.double().softmax(0)
    powers = {}
    for token in children:
        weight = 1
        if len(children) > 1 and SEP in prefix:
            through = [key for key in keys if key[: len(prefix) + 1] == (*prefix, token)]
            weight = max(weight, *(_lcs(key, question) - _lcs(prefix, question) + 1 for key in through))
        powers[token, False] = float(p[token] ** (1 / weight))
    if prefix in keys:
        powers[EOS, True] = float(p[EOS])
    total = sum(powers.values())
    return {what: value / total for what, value in powers.items()}


def _step(trie: Trie, logits: torch.Tensor, nodes: torch.Tensor, bias) -> list[dict[tuple[int, int, bool], float]]:
    """For each sample (beam, token, whether it ends the key) → log-probability."""
    step = fastmix.trie_beam_step(
        logits,
        torch.zeros(nodes.shape, dtype=logits.dtype),
        nodes,
        trie,
        num_candidates=nodes.shape[1] * WIDTH,
        eos_token_id=EOS,
        candidate_bias=bias,
    )
    rows = zip(*(part.tolist() for part in step), strict=True)
    return [
        {(k, token, node < 0): score for score, k, token, node in zip(*row, strict=True) if score > -math.inf}
        for row in rows
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(keys_strategy, min_size=2, max_size=2) | st.lists(keys_strategy, min_size=1, max_size=1),
    st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=2, max_size=2),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_weights_are_those_of_the_definition(tries, questions, dtype):
    trie = Trie.concat([Trie.from_sequences(keys, vocab_size=6) for keys in tries])
    keys = [sorted({tuple(key) for key in tries[b % len(tries)]}) for b in range(2)]
    prefixes = [sorted({key[:n] for key in keys[b] for n in range(len(key) + 1)}) for b in range(2)]
    beams = max(map(len, prefixes))
    nodes = torch.full((2, beams), -1)
    for b in range(2):
        for k, prefix in enumerate(prefixes[b]):
            nodes[b, k] = trie.readers[b % len(tries)].walk(prefix)
    logits = (2 * torch.randn(2, beams, WIDTH, dtype=torch.float64)).to(dtype)
    before = logits.clone()
    bias = lookahead_bias(trie, questions, sep_token_id=SEP)
    for _ in range(2):  # the second time from what it has kept
        steps = _step(trie, logits, nodes, bias)
        for b in range(2):
            expected = {
                (k, *what): math.log(p)
                for k, prefix in enumerate(prefixes[b])
                for what, p in _probabilities(logits[b, k], prefix, keys[b], questions[b]).items()
            }
            assert steps[b].keys() == expected.keys()
            for what, value in steps[b].items():
                assert value == pytest.approx(expected[what], rel=1e-4, abs=1e-4)
    assert torch.equal(logits, before)


def test_masked_logits_stay_masked():
    trie = Trie.from_sequences([[1, SEP, 2], [1, SEP, 3], [1, SEP, 4]])
    nodes = torch.tensor([[trie.walk([1, SEP])] * 2])
    logits = torch.zeros(1, 2, WIDTH)
    logits[0, 0, 3] = logits[0, 1] = -math.inf
    (step,) = _step(trie, logits, nodes, lookahead_bias(trie, [[3, 4]], sep_token_id=SEP))
    assert {what[:2] for what in step} == {(0, 2), (0, 4)}


def test_the_search_multiplies_the_probabilities_of_the_definition():
    keys = [(1, SEP, 2, 3), (1, SEP, 2, 4, 5), (1, SEP, 3), (2, SEP, 5, 5), (2, 4)]
    trie, question = Trie.from_sequences(keys), [1, 9, 4, 5]
    table = torch.randn(WIDTH, WIDTH, dtype=torch.float64)

    def step_fn(tokens, beam_index, state):
        return (table[:1] if tokens is None else table[tokens]), None

    arguments = {"num_beams": 5, "max_length": 9, "eos_token_id": EOS, "length_penalty": 0.0}
    bias = lookahead_bias(trie, [question], sep_token_id=SEP)
    output = trie_beam_search(step_fn, trie, **arguments, candidate_bias=bias)
    expected = {}
    for i, key in enumerate(keys):
        steps = [(key[:n], token, False) for n, token in enumerate(key)] + [(key, EOS, True)]
        expected[i] = sum(
            math.log(_probabilities(table[prefix[-1] if prefix else 0], prefix, keys, question)[token, is_end])
            for prefix, token, is_end in steps
        )
    found = {payloads[0]: score for payloads, score in zip(output.payloads[0], output.scores[0].tolist(), strict=True)}
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_triple_store_is_asked_for_the_predicate_that_the_question_mentions():
    triples = [
        ("姚明", "身高", "229厘米"),
        ("姚明", "出生日期", "1980年9月12日"),
        ("姚明", "妻子", "叶莉"),
        ("姚明", "毕业院校", "上海交通大学"),
        ("姚明织带", "成立时间", "2002年"),
        ("叶莉", "丈夫", "姚明"),
    ]
    characters = sorted({c for s, p, _ in triples for c in s + p})
    ids = {c: i + 1 for i, c in enumerate(characters)}  # 0 is [SEP]
    encoded = [[*map(ids.get, s), SEP, *map(ids.get, p), SEP] for s, p, _ in triples]
    trie = Trie.from_sequences(encoded)
    eos, width = len(ids) + 1, len(ids) + 2
    questions = ["姚明的毕业院校是哪里", "姚明的出生日期是哪天", "请问姚明的身高"]
    question_tokens = [[ids.get(c, width) for c in question] for question in questions]
    subject = torch.zeros(width).scatter(0, torch.tensor([ids["姚"], ids["明"]]), 4.0)  # the model knows of whom

    def step_fn(tokens, beam_index, state):
        logits = subject.clone()
        logits[SEP] = 3.0
        logits[ids["妻"]] = 1.0  # and prefers this predicate
        return logits.expand(*([len(questions)] if tokens is None else tokens.shape), -1), None

    def answers(**options):
        output = trie_beam_search(
            step_fn, trie, num_beams=4, max_length=12, eos_token_id=eos, normalize="allowed", **options
        )
        return [triples[rows[0][0]][2] for rows in output.payloads]

    assert answers() == ["叶莉"] * 3
    bias = lookahead_bias(trie, question_tokens, sep_token_id=SEP)
    assert answers(candidate_bias=bias) == ["上海交通大学", "1980年9月12日", "229厘米"]
