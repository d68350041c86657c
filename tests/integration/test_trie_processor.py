"""TrieLogitsProcessor: against an exact function in plain Python, alone and inside generate()."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastmix import Trie
from fastmix.integrations.transformers import TrieLogitsProcessor

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = [[5], [5, 6], [5, 6, 7, 8], [5, 9], [10, 5], [10, 11, 12]]  # keys that are prefixes of others
WIDTH = 16


def _processor(keys=KEYS, **options):
    return TrieLogitsProcessor(Trie.from_sequences(keys), **{"eos_token_id": 1, "pad_token_id": 0, **options})


def _scores(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


def _expected(scores, allowed):
    expected = torch.full_like(scores, -torch.inf)
    for row, tokens in enumerate(allowed):
        expected[row, tokens] = scores[row, tokens]
    return expected


def _random_keys(generator) -> list[list[int]]:
    lengths = torch.randint(1, 6, (40,), generator=generator).tolist()
    return [torch.randint(4, 9, (length,), generator=generator).tolist() for length in lengths]


# The mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prompt_length", [None, 2])
def test_rows_that_grow_and_change_places(trie_oracle, dtype, prompt_length):
    """Random walks: mostly along the trie, sometimes out of it, on after EOS, with rows copied and dropped."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        keys = _random_keys(generator)
        oracle = trie_oracle.AllowedTokens(keys, eos=(1, 2), prompt_length=2)
        processor = _processor(keys, eos_token_id=[1, 2], prompt_length=prompt_length)
        rows = torch.randint(0, WIDTH, (6, 2), generator=generator)
        for _ in range(9):
            scores = _scores(6, dtype)
            before = scores.clone()
            allowed = [oracle(0, row) for row in rows]
            assert torch.equal(processor(rows, scores), _expected(scores, allowed))
            assert torch.equal(scores, before)
            parents = torch.randint(0, 6, (6,), generator=generator)
            stray = torch.rand(6, generator=generator) < 0.1
            tokens = [7 if stray[i] else allowed[p][i % len(allowed[p])] for i, p in enumerate(parents)]
            rows = torch.cat([rows[parents], torch.tensor(tokens)[:, None]], 1)


def test_nodes_are_not_walked_to_again():
    processor = _processor()
    walked = []
    reader = processor.trie.readers[0]
    walk = reader.walk
    reader.walk = lambda tokens: walked.append(tokens) or walk(tokens)
    rows = torch.tensor([[3], [3]])
    for token in (5, 6, 7, 8, 1, 0):
        processor(rows, _scores(2))
        rows = torch.cat([rows.flip(0), torch.tensor([[token], [5]])], 1)
    assert walked == [[], []]


@pytest.mark.parametrize("fill", [{"pad_token_id": 0}, {"pad_token_id": None}])
def test_ended_and_stray_rows_have_one_token_with_a_finite_score(fill):
    processor = _processor(eos_token_id=[1, 2], prompt_length=1, **fill)
    rows = torch.tensor([[3, 5, 6, 2], [3, 5, 1, 1], [3, 5, 1, 0], [3, 9, 9, 9], [3, 5, 6, 1]])
    token = 0 if fill["pad_token_id"] == 0 else 1
    for value in (0.25, -torch.inf, torch.nan):
        masked = processor(rows, torch.full((5, WIDTH), value))
        assert (masked.isfinite().nonzero()[:, 1] == token).all()
        assert masked[:, token].tolist() == [0.25 if value == 0.25 else 0.0] * 5
        assert masked.isneginf().sum() == 5 * (WIDTH - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_trie_stays_when_others_exclude_all_of_its_tokens(dtype):
    scores = _scores(2, dtype)
    scores[0, [5, 10]] = -torch.inf
    masked = _processor()(torch.tensor([[3], [3]]), scores)
    assert masked[0, [5, 10]].isfinite().all()
    assert (masked[0, [5, 10]] < -500).all()
    assert masked.isneginf().sum() == 2 * (WIDTH - 2)
    assert torch.equal(masked[1, [5, 10]], scores[1, [5, 10]])
    assert (masked / 0.1).softmax(-1).isfinite().all()


def test_prompt_length_counts_what_is_before_the_key():
    processor = _processor(prompt_length=2)
    scores = _scores(1)
    assert torch.equal(processor(torch.tensor([[3]]), scores), scores)
    assert processor(torch.tensor([[3, 7]]), scores).isfinite().nonzero()[:, 1].tolist() == [5, 10]
    assert processor(torch.tensor([[3, 7, 5, 6]]), scores).isfinite().nonzero()[:, 1].tolist() == [1, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        [[3, 4], [3, 5]],  # as long as the last one
        [[3, 4]],  # shorter
        [[3, 4, 10, 11], [3, 4, 5, 7]],  # longer by one, other rows
        [[3, 4, 10, 5, 6], [3, 4, 10, 5, 7]],  # longer by two
        [[3, 4, 10, 5]] * 3,  # longer by one, the same rows, but more of them
    ],
)
def test_a_new_generation_has_its_own_prompt(prompt):
    processor = _processor()
    processor(torch.tensor([[3, 4], [3, 4]]), _scores(2))
    processor(torch.tensor([[3, 4, 10], [3, 4, 10]]), _scores(2))
    prompt = torch.tensor(prompt)
    first = processor(prompt, _scores(len(prompt)))
    assert first.isfinite().nonzero()[:, 1].tolist() == [5, 10] * len(prompt)
    second = processor(torch.cat([prompt, prompt.new_full((len(prompt), 1), 5)], 1), _scores(len(prompt)))
    assert second.isfinite().nonzero()[:, 1].tolist() == [1, 6, 9] * len(prompt)


def test_reset_begins_a_generation():
    processor = _processor()
    processor(torch.tensor([[3]]), _scores(1))
    processor.reset()
    assert processor(torch.tensor([[3, 5]]), _scores(1)).isfinite().nonzero()[:, 1].tolist() == [5, 10]


def test_each_sample_has_its_own_trie(trie_oracle):
    keys = [[[5, 6]], [[7], [7, 8]], [[9, 5]]]
    arena = Trie.concat([Trie.from_sequences(k, vocab_size=16) for k in keys])
    processor = TrieLogitsProcessor(arena, eos_token_id=1)
    rows = torch.full((6, 2), 3)
    for _ in range(3):
        scores = _scores(6)
        oracles = [trie_oracle.AllowedTokens(keys[i // 2], prompt_length=2) for i in range(6)]
        allowed = [oracle.after(row[2:].tolist()) or [1] for oracle, row in zip(oracles, rows, strict=True)]
        assert torch.equal(processor(rows, scores), _expected(scores, allowed))
        rows = torch.cat([rows, torch.tensor([tokens[-1:] for tokens in allowed])], 1)
    with pytest.raises(ValueError, match="rows must be a multiple of the 3 tries, got 4"):
        processor(rows[:4], _scores(4))


def test_empty_trie_empty_key_empty_batch_and_substrings():
    rows = torch.full((2, 1), 3)
    assert _processor([])(rows, _scores(2)).isfinite().nonzero()[:, 1].tolist() == [0, 0]
    assert _processor([[], [5]])(rows, _scores(2)).isfinite().nonzero()[:, 1].tolist() == [1, 5, 1, 5]
    assert _processor()(rows[:0], _scores(0)).shape == (0, WIDTH)
    substrings = TrieLogitsProcessor(Trie.from_substrings([5, 6, 5, 7]), eos_token_id=1, prompt_length=1)
    assert substrings(rows, _scores(2))[0].isfinite().nonzero()[:, 0].tolist() == [5, 6, 7]
    assert substrings(torch.tensor([[3, 5]]), _scores(1)).isfinite().nonzero()[:, 1].tolist() == [1, 6, 7]


@pytest.mark.gpu
def test_on_a_gpu():
    rows, scores = torch.tensor([[3, 5], [3, 9], [3, 10]]), _scores(3)
    on_cpu = _processor(prompt_length=1)(rows, scores)
    on_gpu = _processor(prompt_length=1)(rows.cuda(), scores.cuda())
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_remembered_tokens_are_bounded():
    keys = [[4 + i, 4 + j] for i in range(40) for j in range(40)]
    processor = _processor(keys, prompt_length=0)
    for i in range(40):
        for j in range(40):
            processor(torch.tensor([[4 + i, 4 + j]]), torch.zeros(1, 48))
    assert len(processor._tokens) <= 1024


def test_pickle():
    processor = _processor()
    processor(torch.tensor([[3]]), _scores(1))
    rows, scores = torch.tensor([[3, 5]]), _scores(1)
    assert torch.equal(pickle.loads(pickle.dumps(processor))(rows, scores), processor(rows, scores))


# Errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"trie": {5: {}}}, TypeError, r"trie must be a fastmix\.Trie, got dict"),
        ({"eos_token_id": 6}, ValueError, r"eos_token_id must not occur in the trie's keys, got \[6\]"),
        ({"eos_token_id": [1, 10]}, ValueError, r"eos_token_id must not occur in the trie's keys, got \[10\]"),
        ({"eos_token_id": []}, ValueError, "eos_token_id must be a token or a list of tokens"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id must be .* at least 0, got -1"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": 0.5}, TypeError, "pad_token_id must be an int or None, got float"),
        ({"prompt_length": -1}, ValueError, "prompt_length must be at least 0, got -1"),
        ({"prompt_length": "3"}, TypeError, "prompt_length must be an int or None, got str"),
    ],
)
def test_wrong_arguments(options, error, text):
    options = {"trie": Trie.from_sequences(KEYS), "eos_token_id": 1, **options}
    with pytest.raises(error, match=text):
        TrieLogitsProcessor(options.pop("trie"), **options)


@pytest.mark.parametrize(
    ("shapes", "options", "text"),
    [
        (((2,), (2, WIDTH)), {}, r"input_ids must be \[rows, length\] and scores \[rows, V\], got \[2\] and"),
        (((2, 3), (3, WIDTH)), {}, r"got \[2, 3\] and \[3, 16\]"),
        (((2, 3), (2, 12)), {}, r"scores must have at least 13 columns .*, got 12"),
        (((2, 3), (2, WIDTH)), {"eos_token_id": 20}, r"scores must have at least 21 columns .*, got 16"),
        (((2, 3), (2, WIDTH)), {"pad_token_id": 16}, r"scores must have at least 17 columns .*, got 16"),
    ],
)
def test_wrong_calls(shapes, options, text):
    ids, scores = shapes
    with pytest.raises(ValueError, match=text):
        _processor(**options)(torch.zeros(ids, dtype=torch.int64), torch.zeros(scores))


# Inside generate(), with all names of Unicode's characters as keys


def _prompts():
    ids = torch.randint(4, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "temperature": 1.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generate_as_with_an_exact_function(request, trie_oracle, unicode_names, names_trie, kind, search, dtype):
    model = request.getfixturevalue(kind)(dtype)
    oracle = trie_oracle.AllowedTokens(unicode_names, eos=(1, 2), prompt_length=7 if kind == "gpt2" else 1)
    processor = TrieLogitsProcessor(names_trie, eos_token_id=[1, 2], pad_token_id=0)
    options = {"max_new_tokens": 100, "eos_token_id": [1, 2], "early_stopping": True, **SEARCHES[search]}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    if search in ("greedy", "sampling"):
        del options["early_stopping"]
    torch.manual_seed(0)
    expected = model.generate(**_prompts(), **options, prefix_allowed_tokens_fn=oracle)
    for _ in range(2):  # one processor for several calls
        torch.manual_seed(0)
        output = model.generate(**_prompts(), **options, logits_processor=[processor])
        assert torch.equal(output.sequences, expected.sequences)
        oracle.answers(output.sequences)
        if "num_beams" in options:
            assert torch.equal(output.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_fewer_keys_than_beams(request, trie_oracle, kind, early_stopping):
    """Finished beams are fed again and again; the keys come out, the rest is transformers' filling."""
    model = request.getfixturevalue(kind)()
    oracle = trie_oracle.AllowedTokens(KEYS, prompt_length=7 if kind == "gpt2" else 1)
    options = {"num_beams": 9, "num_return_sequences": 9, "max_new_tokens": 7, "early_stopping": early_stopping}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**_prompts(), **options, prefix_allowed_tokens_fn=oracle)
    output = model.generate(**_prompts(), **options, logits_processor=[_processor()])
    assert torch.equal(output.sequences_scores, expected.sequences_scores)
    found = output.sequences_scores > -1e6
    assert torch.equal(output.sequences[found], expected.sequences[found])
    for sample in output.sequences.view(3, 9, -1).unbind() if early_stopping is not True else ():
        assert sorted(oracle.answers(sample[: len(KEYS)])) == oracle.keys


def test_forced_bos_before_the_keys(t5, trie_oracle, unicode_names, names_trie):
    oracle = trie_oracle.AllowedTokens(unicode_names, prompt_length=2)
    processor = TrieLogitsProcessor(names_trie, eos_token_id=1, pad_token_id=0, prompt_length=2)
    options = {"forced_bos_token_id": 3, "num_beams": 3, "max_new_tokens": 100, "early_stopping": True}
    sequences = t5().generate(**_prompts(), **options, logits_processor=[processor])
    assert (sequences[:, 1] == 3).all()
    oracle.answers(sequences)


def test_sampling_when_an_end_is_forbidden(gpt2):
    """At a leaf only EOS is left, which min_new_tokens forbids: the key ends all the same."""
    options = {"do_sample": True, "min_new_tokens": 6, "max_new_tokens": 8, "temperature": 0.5}
    sequences = gpt2().generate(**_prompts(), **options, logits_processor=[_processor()])
    longest = {(5, 6, 7, 8), (5, 9), (10, 5), (10, 11, 12)}
    assert {tuple(row[: row.index(1)]) for row in sequences[:, 7:].tolist()} <= longest
