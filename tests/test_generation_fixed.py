"""trie_decode_fixed against brute force over the keys, and against a beam search in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmix import Trie
from fastmix.generation import trie_decode_fixed

WIDTH = 7


def _logits(shape: tuple[int, ...], seed: int, masked: bool = False, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    if masked:  # a third of the tokens, and a whole position now and then
        logits[torch.rand(shape, generator=generator) < 0.3] = -math.inf
        logits[torch.rand(shape[:2], generator=generator) < 0.1] = -math.inf
    return logits.to(dtype)


def _candidates(row: torch.Tensor, prefix: tuple[int, ...], keys, normalize) -> list[tuple[int, float]]:
    tokens = sorted({key[len(prefix)] for key in keys if key[: len(prefix)] == prefix and len(key) > len(prefix)})
    values = row.double()[tokens]
    if normalize == "vocab":
        values = values - row.double().logsumexp(0)
    elif normalize == "allowed" and tokens:
        values = values - values.logsumexp(0)
    return [(token, value) for token, value in zip(tokens, values.tolist(), strict=True) if value > -math.inf]


def _plain(logits: torch.Tensor, keys, num_beams: int, normalize) -> list[tuple[float, tuple[int, ...]]]:
    beams = [(0.0, ())]
    finished = [beam for beam in beams if beam[1] in keys]
    for row in logits:
        longer = [
            (score + value, (*prefix, token))
            for score, prefix in beams
            for token, value in _candidates(row, prefix, keys, normalize)
        ]
        beams = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
        finished += [beam for beam in beams if beam[1] in keys]
    return sorted(finished, key=lambda beam: -beam[0])[:num_beams]


def _check(output, expected, keys_of, rows: int, **tolerance) -> None:
    length = max((len(sequence) for found in expected for _, sequence in found), default=0)
    assert list(output.sequences.shape) == [len(expected), rows, length]
    assert output.num_model_calls == 0
    for b, found in enumerate(expected):
        existing = output.scores[b] > -math.inf
        assert existing.tolist() == [True] * len(found) + [False] * (rows - len(found))
        assert [tuple(row[row >= 0].tolist()) for row in output.sequences[b, existing]] == [key for _, key in found]
        assert (output.sequences[b, ~existing] == -1).all()
        scores = torch.tensor([score for score, _ in found], dtype=torch.float64)
        torch.testing.assert_close(output.scores[b, existing].double(), scores, **tolerance)
        payloads = [[i for i, other in enumerate(keys_of[b]) if other == key] for _, key in found]
        assert output.payloads[b] == payloads + [[]] * (rows - len(found))


keys_strategy = st.lists(st.lists(st.integers(0, 5), max_size=6).map(tuple), max_size=12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(keys_strategy, min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from(["vocab", "allowed", None]),
)
def test_decoding(tries, num_beams, length, seed, masked, normalize):
    trie = Trie.concat([Trie.from_sequences(keys, vocab_size=6) for keys in tries])
    logits = _logits((len(tries), length, WIDTH), seed, masked)
    few = trie_decode_fixed(logits, trie, num_beams=num_beams, normalize=normalize)
    expected = [_plain(logits[b], keys, num_beams, normalize) for b, keys in enumerate(tries)]
    _check(few, expected, tries, num_beams, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(keys_strategy, st.integers(0, 6), st.integers(0, 1000), st.sampled_from(["vocab", "allowed"]))
def test_enough_beams_return_every_key(keys, length, seed, normalize):
    logits = _logits((2, length, WIDTH), seed, dtype=torch.float32)
    num_beams = max(1, len(set(keys)))
    output = trie_decode_fixed(logits, Trie.from_sequences(keys), num_beams=num_beams, normalize=normalize)
    assert output.scores.dtype == torch.float32
    expected = []
    for rows in logits:
        found = [
            (sum(dict(_candidates(rows[i], key[:i], keys, normalize))[token] for i, token in enumerate(key)), key)
            for key in set(keys)
            if len(key) <= length
        ]
        expected.append(sorted(found, key=lambda item: -item[0]))
    _check(output, expected, [keys, keys], num_beams, rtol=1e-5, atol=1e-5)


def test_every_end_on_the_way_is_a_result():
    keys = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    logits = torch.full((1, 3, 5), -20.0).scatter(2, torch.tensor([[[1], [2], [3]]]), 0.0)
    output = trie_decode_fixed(logits, Trie.from_sequences(keys), num_beams=4)
    assert output.payloads == [[[0], [1], [2], [3]]]
    assert output.scores[0, 0] == 0
    torch.testing.assert_close(output.scores, torch.zeros(1, 4), rtol=0, atol=1e-6)


def test_ends_are_found_behind_beams_that_also_go_on():
    logits = torch.tensor([[[0.0, 4, 3], [2, 0, 0]]])
    output = trie_decode_fixed(logits, Trie.from_sequences([(1,), (1, 0), (2,)]), num_beams=2, normalize=None)
    assert output.payloads == [[[1], [0]]]
    output = trie_decode_fixed(logits[:, :1], Trie.from_sequences([(1,), (1, 0), (2,)]), num_beams=2)
    assert output.payloads == [[[0], [2]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_substrings_of_a_passage(dtype):
    passage = [1, 2, 3, 2, 3, 4]
    trie = Trie.from_substrings([passage])
    substrings = sorted({tuple(passage[i:j]) for i in range(6) for j in range(i + 1, 7)})
    logits = _logits((1, 6, WIDTH), 3, dtype=dtype)
    output = trie_decode_fixed(logits, trie, num_beams=len(substrings))
    rows = {
        tuple(row[row >= 0].tolist()): float(s) for row, s in zip(output.sequences[0], output.scores[0], strict=True)
    }
    assert set(rows) == set(substrings)
    log_p = logits[0].double().log_softmax(1)
    for substring, score in rows.items():
        assert score == pytest.approx(float(sum(log_p[i, token] for i, token in enumerate(substring))), abs=1e-4)
    assert output.payloads == [[[0]] * len(substrings)]


@pytest.mark.gpu
def test_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(50, (length,), generator=generator).tolist() for length in range(7) for _ in range(40)]
    trie, logits = Trie.from_sequences(keys), torch.randn(3, 6, 60, generator=generator)
    on_cpu = trie_decode_fixed(logits, trie, num_beams=9)
    on_gpu = trie_decode_fixed(logits.cuda(), trie.to("cuda"), num_beams=9)
    assert on_gpu.payloads == on_cpu.payloads
    assert torch.equal(on_gpu.sequences.cpu(), on_cpu.sequences)
    torch.testing.assert_close(on_gpu.scores.cpu(), on_cpu.scores)
