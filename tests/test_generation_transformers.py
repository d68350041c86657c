"""trie_beam_search gives the sequences and scores of transformers' beam search under an exact mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmix import Trie
from fastmix.generation import trie_beam_search

transformers = pytest.importorskip("transformers")

VOCAB, EOS = 30, [0, 29]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def _sparse_keys() -> list[tuple[int, ...]]:
    """Many ways from the first nodes, then few, then forced tails."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 5, (300,), generator=generator).tolist()
    keys = {tuple(torch.randint(1, 29, (size,), generator=generator).tolist()) for size in sizes}
    return sorted(keys | {(*key, 7, 8, 9) for key in keys if len(key) == 3})


def _dense_keys() -> list[tuple[int, ...]]:
    return [key for size in (2, 3, 4) for key in itertools.product((3, 7, 12, 21, 28), repeat=size)]


def _ours(model, prompts: torch.Tensor, trie: Trie, eos: list[int], **options):
    def step_fn(tokens, beam_index, state):
        if tokens is None:
            rows = prompts
        else:
            state = state.view(len(prompts), -1, state.shape[-1])
            kept = state.gather(1, beam_index[..., None].expand(-1, -1, state.shape[2]))
            rows = torch.cat([kept, tokens.view(*kept.shape[:2], -1)], 2).flatten(0, 1)
        logits = model(rows).logits
        count = 1 if tokens is None else tokens[0, 0].numel()
        logits = logits[:, -count:]
        return (logits[:, 0] if tokens is None else logits.reshape(*tokens.shape, VOCAB)), rows

    return trie_beam_search(step_fn, trie, eos_token_id=eos, **options)


def _theirs(model, prompts: torch.Tensor, keys, eos: list[int], max_length: int, num_beams: int, **options):
    children: dict[tuple[int, ...], set[int]] = {key: set(eos) for key in keys}
    for key in keys:
        for i, token in enumerate(key):
            children.setdefault(key[:i], set()).add(token)
    start = prompts.shape[1]

    def allowed(_, ids):  # beams that have finished are asked again
        return sorted(children.get(tuple(ids[start:].tolist()), eos))

    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        prefix_allowed_tokens_fn=allowed,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_length,
        eos_token_id=eos,
        pad_token_id=EOS[0],
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "eos"),
    [
        (0.0, False, EOS[:1]),
        (1.0, False, EOS),
        (-1.0, False, EOS[:1]),
        (0.0, True, EOS[:1]),
        (1.0, True, EOS),
        (2.0, "never", EOS[:1]),
        (0.5, "never", EOS),
    ],
)
def test_same_results(model, length_penalty, early_stopping, eos):
    # Where ways run out, transformers carries on with copies of beams at −1e9. They fill up its finished rows, and
    # early_stopping=True then ends the search before keys that are still open.
    keys, prompts = _dense_keys() if early_stopping is True else _sparse_keys(), torch.randint(1, 29, (2, 5))
    options = {"num_beams": 4, "max_length": 9, "length_penalty": length_penalty, "early_stopping": early_stopping}
    theirs = _theirs(model, prompts, keys, eos, **options)
    for fast_forward in (False, True):
        ours = _ours(model, prompts, Trie.from_sequences(keys), eos, **options, fast_forward=fast_forward)
        assert (ours.scores > -torch.inf).all()
        torch.testing.assert_close(ours.scores.flatten(), theirs.sequences_scores, rtol=1e-5, atol=1e-5)
        _check_sequences(ours.sequences.flatten(0, 1), theirs.sequences[:, prompts.shape[1] :])


def test_one_beam_is_greedy_search(model):
    keys, prompts = _sparse_keys(), torch.randint(1, 29, (4, 3))
    ours = _ours(model, prompts, Trie.from_sequences(keys), EOS, num_beams=1, max_length=9)
    theirs = _theirs(model, prompts, keys, EOS, max_length=9, num_beams=1)
    _check_sequences(ours.sequences[:, 0], theirs.sequences[:, 3:])


def _check_sequences(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same, but for what pads them."""
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        tokens = [token for token in mine if token >= 0]
        assert tokens
        assert other[: len(tokens)] == tokens
        assert set(other[len(tokens) :]) <= {EOS[0]}
