"""Errors of trie_beam_search, trie_decode_fixed and lookahead_bias: they name the argument, the rule and the value."""

from __future__ import annotations

import pytest
import torch

from fastmix import Trie
from fastmix.generation import lookahead_bias, trie_beam_search, trie_decode_fixed

TRIE = Trie.from_sequences([[1, 2], [1, 3, 4]])


def _model(tokens, beam_index, state):
    return torch.zeros(2, 6) if tokens is None else torch.zeros(*tokens.shape, 6), None


def _search(**changes):
    arguments = {"step_fn": _model, "trie": TRIE, "num_beams": 2, "max_length": 5, "eos_token_id": 0} | changes
    return trie_beam_search(arguments.pop("step_fn"), arguments.pop("trie"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step_fn": 3}, TypeError, "step_fn must be callable, got int"),
        ({"trie": [[1, 2]]}, TypeError, "trie must be a fastmix.Trie, got list"),
        ({"trie": Trie.concat([TRIE] * 3)}, ValueError, "trie must hold one trie or .* 2 samples, got 3"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an int, got float"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"num_return_sequences": 3}, ValueError, r"num_return_sequences must be in 1\.\.2, got 3"),
        ({"num_return_sequences": True}, TypeError, "num_return_sequences must be an int, got bool"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty must be a finite number, got nan"),
        ({"early_stopping": "always"}, ValueError, "early_stopping must be True, False or \"never\", got 'always'"),
        ({"normalize": "none"}, ValueError, "normalize must be 'vocab', 'allowed' or None, got 'none'"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": 0.5}, ValueError, "temperature must be 1 without do_sample, got 0.5"),
        ({"generator": 1, "do_sample": True}, TypeError, "generator must be a torch.Generator, got int"),
        ({"eos_token_id": []}, ValueError, "eos_token_id must name at least one token"),
        ({"eos_token_id": 6}, ValueError, r"eos_token_id must be in .*0\.\.5, got 6"),
        ({"candidate_bias": [1.0]}, TypeError, "candidate_bias must be .*, got list"),
        ({"candidate_bias": torch.zeros(6, dtype=torch.int64)}, TypeError, "candidate_bias must be float32.*int64"),
        ({"candidate_bias": torch.zeros(2, 2, 6)}, ValueError, "candidate_bias must be broadcastable"),
        ({"candidate_bias": torch.zeros(2, 2, 6), "do_sample": True}, ValueError, "candidate_bias must be broad"),
        ({"step_fn": lambda *_: torch.zeros(2, 6)}, TypeError, r"step_fn must return \(logits, state\), got Tensor"),
        ({"step_fn": lambda *_: (None, None)}, TypeError, "step_fn's logits must be a Tensor, got NoneType"),
        ({"step_fn": lambda *_: (torch.zeros(2, 1, 6), 0)}, ValueError, r"must be \[B, V\], got \[2, 1, 6\]"),
        ({"step_fn": lambda *_: (torch.zeros(2, 6), 0)}, ValueError, r"= \[2, 2, 6\], got \[2, 6\]"),
        ({"step_fn": lambda *_: (torch.zeros(2, 6), 0), "fast_forward": True}, ValueError, r"= \[2, 2, 1, 6\], got"),
        ({"step_fn": lambda *_: (torch.zeros(2, 4), 0)}, ValueError, "vocabulary of 5, got V = 4"),
        (
            {"step_fn": lambda *a: (_model(*a)[0].half() if a[0] is None else _model(*a)[0], 0)},
            ValueError,
            "stay float16",
        ),
    ],
)
def test_search(changes, error, message):
    with pytest.raises(error, match=message):
        _search(**changes)


def test_the_search_of_these_arguments_works():
    output = _search()
    assert output.payloads == [[[0], [1]]] * 2
    assert not output.scores.requires_grad


def test_it_keeps_no_graph():
    weight = torch.ones(6, requires_grad=True)
    output = _search(step_fn=lambda *arguments: (_model(*arguments)[0] * weight, None))
    assert not output.scores.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 6)}, ValueError, r"logits must be \[B, L, V\], got \[2, 6\]"),
        ({"logits": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, "logits must be float32.*int64"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "vocabulary of 5, got V = 4"),
        ({"trie": None}, TypeError, "trie must be a fastmix.Trie, got NoneType"),
        ({"trie": Trie.concat([TRIE] * 3)}, ValueError, "trie must hold one trie or .* 2 samples, got 3"),
        ({"num_beams": -1}, ValueError, "num_beams must be at least 1, got -1"),
        ({"normalize": "all"}, ValueError, "normalize must be 'vocab', 'allowed' or None, got 'all'"),
    ],
)
def test_fixed(changes, error, message):
    arguments = {"logits": torch.zeros(2, 3, 6), "trie": TRIE, "num_beams": 2} | changes
    with pytest.raises(error, match=message):
        trie_decode_fixed(arguments.pop("logits"), arguments.pop("trie"), **arguments)


def test_look_ahead():
    with pytest.raises(TypeError, match=r"trie must be a fastmix\.Trie, got list"):
        lookahead_bias([], [[1]], sep_token_id=1)
    with pytest.raises(TypeError, match="sep_token_id must be an int, got NoneType"):
        lookahead_bias(TRIE, [[1]], sep_token_id=None)
    with pytest.raises(TypeError, match="question_tokens must be a list of ints for each sample, got"):
        lookahead_bias(TRIE, [1, 2], sep_token_id=1)
    with pytest.raises(ValueError, match="trie must hold one trie or one for each of the 3 questions, got 2"):
        lookahead_bias(Trie.concat([TRIE] * 2), [[1]] * 3, sep_token_id=1)
    with pytest.raises(ValueError, match="candidate_bias must have 2 questions, one a sample, got 3"):
        _search(candidate_bias=lookahead_bias(TRIE, [[1]] * 3, sep_token_id=1))
    other = Trie.from_sequences([[1]])
    with pytest.raises(ValueError, match="candidate_bias must have been made for the trie that is searched"):
        _search(candidate_bias=lookahead_bias(other, [[1]] * 2, sep_token_id=1))
