"""trie_beam_search: against brute force and a beam search in plain Python, its contract with step_fn, its modes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmix import Trie
from fastmix.generation import trie_beam_search

INF = math.inf
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Model:
    """Logits that depend on the sample and all its tokens; a step_fn that checks what it is given."""

    def __init__(self, batch: int, width: int, *, kind: str = "random", seed: int = 0, dtype=torch.float64):
        self.batch, self.width, self.kind, self.seed, self.dtype = batch, width, kind, seed, dtype
        self.calls: list[list[int]] = []  # the shape of the tokens of each
        self._rows: dict[tuple, torch.Tensor] = {}

    def row(self, b: int, prefix: tuple[int, ...]) -> torch.Tensor:
        if (b, prefix) not in self._rows:
            generator = torch.Generator().manual_seed(hash((self.seed, b, *prefix)) % 2**62)
            row = 3 * torch.randn(self.width, generator=generator, dtype=torch.float64)
            if self.kind == "ties":
                row = row.round() / 4
            elif self.kind == "masked":  # a third of the tokens, and now and then all
                share = torch.rand((), generator=generator) ** 2
                row[torch.rand(self.width, generator=generator) < share] = -INF
            self._rows[b, prefix] = row.to(self.dtype)
        return self._rows[b, prefix]

    def __call__(self, tokens, beam_index, state):
        if tokens is None:
            assert beam_index is None
            assert state is None
            assert not self.calls
            self.calls.append([])
            return torch.stack([self.row(b, ()) for b in range(self.batch)]), [[()] for _ in range(self.batch)]
        assert tokens.dtype == beam_index.dtype == torch.int64
        assert tokens.shape[:2] == beam_index.shape
        assert tokens.shape[0] == self.batch
        assert ((tokens >= 0) & (tokens < self.width)).all()
        self.calls.append(list(tokens.shape))
        logits = torch.empty(*tokens.shape, self.width, dtype=self.dtype)
        prefixes = []
        for b, k in itertools.product(range(self.batch), range(tokens.shape[1])):
            prefix = state[b][beam_index[b, k]]
            row = tokens[b, k].reshape(-1).tolist()
            flat = logits[b, k].view(-1, self.width)
            for i, token in enumerate(row):
                prefix = (*prefix, token)
                flat[i] = self.row(b, prefix)
            prefixes.append(prefix)
        beams = tokens.shape[1]
        return logits, [prefixes[b * beams : (b + 1) * beams] for b in range(self.batch)]


def log_probs(model, b, prefix, keys, eos, normalize) -> list[tuple[int, bool, float]]:
    """What may follow a prefix: (token, whether it ends the key, log-probability); by the definition, over the keys."""
    row = model.row(b, prefix).double()
    allowed = [(key[len(prefix)], False) for key in keys if key[: len(prefix)] == prefix and len(key) > len(prefix)]
    allowed = [*dict.fromkeys(allowed), *((token, True) for token in eos if prefix in keys)]
    values = torch.stack([row[token] for token, _ in allowed]) if allowed else row[:0]
    if normalize == "vocab":
        values = values - row.logsumexp(0)
    elif normalize == "allowed" and allowed:
        values = values - values.logsumexp(0)
    return [(*what, value) for what, value in zip(allowed, values.tolist(), strict=True) if value > -INF]


def every_key(model, b, keys, eos, normalize="vocab", length_penalty=1.0) -> list[tuple[float, tuple[int, ...]]]:
    """All keys with an EOS and their scores, best first."""
    found, open_ = [], [(0.0, ())]
    while open_:
        score, prefix = open_.pop()
        for token, is_end, value in log_probs(model, b, prefix, keys, eos, normalize):
            longer, total = (*prefix, token), score + value
            if is_end:
                found.append((total / len(longer) ** length_penalty, longer))
            else:
                open_.append((total, longer))
    return sorted(found, key=lambda item: -item[0])


def plain_search(
    model, b, keys, eos, num_beams, max_length, length_penalty, early_stopping, normalize
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search as transformers defines it, in lists."""
    kept = 1 if num_beams == 1 else (1 + len(eos)) * num_beams
    beams, finished = [(0.0, ())], []
    for length in range(1, max_length + 1):
        candidates = [
            (-(score + value), k, token, not is_end, prefix)
            for k, (score, prefix) in enumerate(beams)
            for token, is_end, value in log_probs(model, b, prefix, keys, eos, normalize)
        ]
        candidates = [(-score, (*prefix, t), goes_on) for score, _, t, goes_on, prefix in sorted(candidates)[:kept]]
        ended = [(score / length**length_penalty, row) for score, row, goes_on in candidates[:num_beams] if not goes_on]
        finished = sorted(finished + ended, key=lambda item: -item[0])[:num_beams]
        beams = [(score, row) for score, row, goes_on in candidates if goes_on][:num_beams]
        best_length = max_length if early_stopping == "never" and length_penalty > 0 else length
        if not beams:
            break
        if len(finished) == num_beams and (
            early_stopping is True or beams[0][0] / best_length**length_penalty <= finished[-1][0]
        ):
            break
    return finished


def check_output(output, expected: list[list[tuple[float, tuple[int, ...]]]], payloads, rows: int, **tolerance):
    """The rows of each sample, best first, then rows that do not exist."""
    assert output.sequences.dtype == torch.int64
    length = max((len(sequence) for found in expected for _, sequence in found[:rows]), default=0)
    assert list(output.sequences.shape) == [len(expected), rows, length]
    assert list(output.scores.shape) == [len(expected), rows]
    for b, found in enumerate(expected):
        found = found[:rows] + [(-INF, ())] * (rows - len(found))
        sequences = [[*sequence, *[-1] * (length - len(sequence))] for _, sequence in found]
        assert output.sequences[b].tolist() == sequences
        scores = torch.tensor([score for score, _ in found], dtype=torch.float64)
        torch.testing.assert_close(output.scores[b].double(), scores, **(tolerance or EXACT))
        assert output.payloads[b] == [payloads(b, sequence[:-1]) if sequence else [] for _, sequence in found]


keys_strategy = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), max_size=5),
        # Few beginnings with a long tail: forced chains, and keys that are prefixes of others.
        st.builds(lambda start, end: [*[2, 3, 4, 5, 4, 3][: end + start], start], st.integers(0, 2), st.integers(0, 5)),
    ),
    max_size=12,
)


@st.composite
def searches(draw):
    batch = draw(st.integers(1, 3))
    tries = draw(
        st.lists(keys_strategy, min_size=batch, max_size=batch) | st.lists(keys_strategy, min_size=1, max_size=1)
    )
    return {
        "batch": batch,
        "tries": tries,
        "width": draw(st.sampled_from([6, 9])),
        "kind": draw(st.sampled_from(["random", "ties", "masked"])),
        "eos": draw(st.sampled_from([[0], [1, 5], [0, 2, 4]])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 1000)),
    }


def _build(case) -> tuple[Trie, list[list[tuple[int, ...]]], object, Model]:
    tries = [Trie.from_sequences(keys, vocab_size=6) for keys in case["tries"]]
    trie = Trie.concat(tries) if len(tries) > 1 else tries[0]
    keys = [sorted({tuple(key) for key in case["tries"][b % len(tries)]}) for b in range(case["batch"])]
    model = Model(case["batch"], case["width"], kind=case["kind"], seed=case["seed"], dtype=case["dtype"])

    def payloads(b, key):
        return [i for i, other in enumerate(case["tries"][b % len(tries)]) if tuple(other) == key]

    return trie, keys, payloads, model


@settings(max_examples=100, deadline=None, derandomize=True)
@given(searches(), st.sampled_from(["vocab", "allowed", None]), st.sampled_from([0.0, 1.0, -0.5]), st.booleans())
def test_enough_beams_return_every_key(case, normalize, length_penalty, fast_forward):
    case["kind"] = "random" if case["kind"] == "ties" else case["kind"]
    trie, keys, payloads, model = _build(case)
    num_beams = max(1, max(map(len, keys)) * len(case["eos"]))
    if num_beams == 1:
        num_beams = 2
    output = trie_beam_search(
        model,
        trie,
        num_beams=num_beams,
        max_length=20,
        eos_token_id=case["eos"],
        length_penalty=length_penalty,
        normalize=normalize,
        fast_forward=fast_forward,
    )
    assert output.scores.dtype == case["dtype"]
    expected = [every_key(model, b, keys[b], case["eos"], normalize, length_penalty) for b in range(case["batch"])]
    tolerance = EXACT if case["dtype"] == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    check_output(output, expected, payloads, num_beams, **tolerance)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    searches(),
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from([0.0, 1.0, 2.0, -1.0]),
    st.sampled_from([False, True, "never"]),
    st.sampled_from(["vocab", "allowed", None]),
)
def test_is_plain_beam_search(case, num_beams, max_length, length_penalty, early_stopping, normalize):
    # Scores that tie are quarters, whose sums are exact.
    case["dtype"], normalize = torch.float64, None if case["kind"] == "ties" else normalize
    trie, keys, payloads, model = _build(case)
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "normalize": normalize}
    arguments = {"num_beams": num_beams, "max_length": max_length, "eos_token_id": case["eos"]} | options
    output = trie_beam_search(model, trie, **arguments)
    plain = [
        plain_search(model, b, keys[b], case["eos"], num_beams, max_length, **options) for b in range(case["batch"])
    ]
    check_output(output, plain, payloads, num_beams)
    assert output.num_model_calls == len(model.calls)
    assert model.calls == [[], *[[case["batch"], num_beams]] * (output.num_model_calls - 1)]

    model.calls.clear()
    forward = trie_beam_search(model, trie, **arguments, fast_forward=True)
    assert torch.equal(forward.sequences, output.sequences)
    assert torch.equal(forward.scores, output.scores)
    assert forward.payloads == output.payloads
    assert forward.num_model_calls == len(model.calls) <= output.num_model_calls
    assert sum(shape[2] for shape in model.calls[1:]) + 1 <= max_length


def test_fast_forward_takes_a_forced_tail_in_one_call():
    keys = [[1, *range(10, 20)], [2, *range(20, 30)], [2, 20, 22, *range(30, 38)], [3]]
    trie, model = Trie.from_sequences(keys), Model(2, 40)
    slow = trie_beam_search(model, trie, num_beams=4, max_length=12, eos_token_id=0)
    assert slow.num_model_calls == 12
    model.calls.clear()
    fast = trie_beam_search(model, trie, num_beams=4, max_length=12, eos_token_id=0, fast_forward=True)
    # [3] ends, then 20 is forced, then a choice, then eight more tokens are forced.
    assert model.calls == [[], [2, 4, 1], [2, 4, 1], [2, 4, 9]]
    assert torch.equal(fast.sequences, slow.sequences)
    assert torch.equal(fast.scores, slow.scores)


def test_substrings():
    passages = [[2, 3, 2, 3, 4], [3, 4, 5]]
    trie = Trie.from_substrings(passages)
    substrings = sorted({tuple(p[i:j]) for p in passages for i in range(len(p)) for j in range(i + 1, len(p) + 1)})

    def payloads(b, key):
        return [n for n, p in enumerate(passages) if any(tuple(p[i : i + len(key)]) == key for i in range(len(p)))]

    for fast_forward in (False, True):
        model = Model(2, 7)
        output = trie_beam_search(
            model, trie, num_beams=len(substrings), max_length=9, eos_token_id=0, fast_forward=fast_forward
        )
        expected = [every_key(model, b, substrings, [0]) for b in range(2)]
        check_output(output, expected, payloads, len(substrings))


def test_nothing_is_forced_where_a_substring_may_end():
    model = Model(1, 7)
    trie_beam_search(
        model, Trie.from_substrings([[2, 3, 4, 5]]), num_beams=1, max_length=9, eos_token_id=0, fast_forward=True
    )
    assert len(model.calls) > 1
    assert {shape[2] for shape in model.calls[1:]} == {1}


def test_num_return_sequences_are_the_best_rows():
    trie, model = Trie.from_sequences([[1], [1, 2], [3, 2, 1, 2, 3]]), Model(2, 5)
    every = trie_beam_search(model, trie, num_beams=4, max_length=9, eos_token_id=0)
    model.calls.clear()
    one = trie_beam_search(model, trie, num_beams=4, max_length=9, eos_token_id=0, num_return_sequences=1)
    length = int((every.sequences[:, 0] >= 0).any(0).sum())
    assert torch.equal(one.sequences, every.sequences[:, :1, :length])
    assert torch.equal(one.scores, every.scores[:, :1])
    assert one.payloads == [rows[:1] for rows in every.payloads]


def test_beams_that_max_length_cuts_are_dropped():
    trie, model = Trie.from_sequences([[1, 2, 3], [2, 3], [3]]), Model(1, 5)
    for max_length, count in ((1, 0), (2, 1), (3, 2), (4, 3)):
        model.calls.clear()
        output = trie_beam_search(model, trie, num_beams=3, max_length=max_length, eos_token_id=0)
        assert int((output.scores > -INF).sum()) == count
        assert output.sequences.shape[2] == (max_length if count else 0)
        assert output.num_model_calls == max_length


def _by_last_token(keys, rows: list[list[float]], **options):
    """The search by two beams with logits that depend on the last token; the first row is that of the first token."""
    table = torch.tensor(rows)

    def step_fn(tokens, beam_index, state):
        return (table[:1] if tokens is None else table[tokens]), None

    arguments = {"num_beams": 2, "max_length": 9, "eos_token_id": 0, "normalize": None} | options
    return trie_beam_search(step_fn, Trie.from_sequences(keys), **arguments)


@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_a_tie_of_the_best_beam_with_the_worst_result_ends_the_search(early_stopping):
    rows = [[0.0, 0, 0], [0, 0, 0], [5, 0, 0]]  # (1, 2) would gain 5
    output = _by_last_token([(), (1,), (1, 2)], rows, length_penalty=0.0, early_stopping=early_stopping)
    assert output.payloads == [[[0], [1]]]
    assert output.num_model_calls == 2


def test_a_negative_penalty_never_favours_the_longest():
    # −1.5 · 2 beats −4, −1.5 · 9 would not.
    rows = [[-4.0, -1, 0], [-1, 0, -0.5], [1, 0, 0]]
    output = _by_last_token([(), (1,), (1, 2)], rows, length_penalty=-1.0, early_stopping="never")
    assert output.payloads == [[[2], [0]]]
    assert output.scores.tolist() == [[-1.5, -4]]


def test_many_ends_do_not_crowd_out_the_beams():
    # Behind 1 and 2 all three EOS tokens are better than going on by 5, which is better in the end.
    rows = torch.tensor([[0.0] * 6, *[[-1, 0, 0, -1, -1, -1.2]] * 2, *[[0] * 6] * 2, [0, 0, 0, -9, -9, 0]])
    keys = [(1,), (2,), (1, 5), (2, 5)]
    output = _by_last_token(keys, rows.tolist(), eos_token_id=[0, 3, 4], early_stopping="never")
    assert output.sequences.tolist() == [[[1, 5, 0], [2, 5, 0]]]
    torch.testing.assert_close(output.scores, torch.tensor([[-0.4, -0.4]]))


def test_empty_batch():
    output = trie_beam_search(
        lambda *_: (torch.empty(0, 5), None), Trie.from_sequences([[1]]), num_beams=2, max_length=3, eos_token_id=0
    )
    assert output.sequences.shape == (0, 2, 0)
    assert output.payloads == []
    assert output.num_model_calls == 1


def test_candidate_bias_is_added_to_every_step():
    keys, bias = [(1, 2), (2, 1), (2,)], torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    model = Model(2, 4)
    plain = trie_beam_search(model, Trie.from_sequences(keys), num_beams=3, max_length=5, eos_token_id=0)
    model.calls.clear()
    biased = trie_beam_search(
        model,
        Trie.from_sequences(keys),
        num_beams=3,
        max_length=5,
        eos_token_id=0,
        length_penalty=0.0,
        candidate_bias=bias.expand(2, 1, 4),
    )
    expected = {
        (b, tuple(row[row >= 0].tolist())): float(score * (row >= 0).sum() + bias[row[row >= 0]].sum())
        for b in range(2)
        for row, score in zip(plain.sequences[b], plain.scores[b], strict=True)
    }
    for b in range(2):
        for row, score in zip(biased.sequences[b], biased.scores[b], strict=True):
            assert float(score) == pytest.approx(expected[b, tuple(row[row >= 0].tolist())], rel=1e-12)


@pytest.mark.gpu
def test_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(50, (length,), generator=generator).tolist() for length in range(9) for _ in range(40)]
    table = torch.randn(9, 60, 60, generator=generator)
    trie = Trie.from_sequences(keys)

    def step_fn(tokens, beam_index, state):
        if tokens is None:
            return device_table[:2, 0], 0
        steps = tokens.shape[2]
        return torch.stack([device_table[state + i][tokens[..., i]] for i in range(steps)], 2), state + steps

    outputs = []
    for device in ("cpu", "cuda"):
        device_table = table.to(device)
        outputs.append(
            trie_beam_search(step_fn, trie.to(device), num_beams=7, max_length=9, eos_token_id=55, fast_forward=True)
        )
    assert outputs[0].payloads == outputs[1].payloads
    assert torch.equal(outputs[0].sequences, outputs[1].sequences.cpu())
    torch.testing.assert_close(outputs[0].scores, outputs[1].scores.cpu())
