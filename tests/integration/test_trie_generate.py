"""generate(custom_generate=generate_with_trie): sequence for sequence what transformers finds with an exact mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmix import Trie
from fastmix.integrations.transformers import generate_with_trie

pytest.importorskip("transformers")
from transformers import MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = [[5], [5, 6], [5, 6, 7, 8], [5, 9], [10, 5], [10, 11, 12]]
DENSE = [key for length in range(1, 6) for key in itertools.product(range(5, 10), repeat=length)]
PROMPT_LENGTH = {"gpt2": 7, "t5": 1}


def _prompts():
    ids = torch.randint(4, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(params=["gpt2", "t5"])
def kind(request):
    return request.param


@pytest.fixture
def model(request, kind):
    return request.getfixturevalue(kind)()


@pytest.fixture
def oracle(trie_oracle, unicode_names, kind):
    return trie_oracle.AllowedTokens(unicode_names, prompt_length=PROMPT_LENGTH[kind])


@pytest.fixture
def dense_oracle(trie_oracle, kind):
    return trie_oracle.AllowedTokens(DENSE, prompt_length=PROMPT_LENGTH[kind])


@pytest.fixture
def small_oracle(trie_oracle, kind):
    return trie_oracle.AllowedTokens(KEYS, prompt_length=PROMPT_LENGTH[kind])


def _both(model, trie, oracle, **options):
    """(fastmix's output, transformers'), with the same random numbers."""
    options = {**_prompts(), "max_new_tokens": 100, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    output = model.generate(**options, custom_generate=generate_with_trie, trie=trie)
    torch.manual_seed(0)
    return output, model.generate(**{**options, "output_scores": True}, prefix_allowed_tokens_fn=oracle)


def _assert_same(output, expected):
    assert torch.equal(_filled(output.sequences), _filled(expected.sequences))
    # transformers sums numbers rounded in other places: it writes log-probabilities down before it renormalizes them
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-4)


def _filled(sequences):
    """With one filling behind EOS: transformers takes EOS in place of a pad token 0."""
    ended = (sequences[:, 1:] == 1).cumsum(1) > 0
    return torch.cat([sequences[:, :1], sequences[:, 1:].masked_fill(ended, 1)], 1)


# Beam search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("early_stopping", "penalty"), [(True, 1.0), (False, 1.0), (False, -0.5), ("never", 0.0)])
def test_beams(request, kind, oracle, names_trie, recorded, assert_kernel, dtype, early_stopping, penalty):
    model = request.getfixturevalue(kind)(dtype)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": penalty, "early_stopping": early_stopping}
    with recorded() as ops:
        output, expected = _both(model, names_trie, oracle, **options)
    assert_kernel(ops, "trie_beam_step")
    _assert_same(output, expected)
    assert torch.equal(output.sequences[:, : oracle.prompt_length], expected.sequences[:, : oracle.prompt_length])
    oracle.answers(output.sequences)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_fused_step_gives_what_the_whole_distribution_does(model, dense_oracle, renormalize):
    options = {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 6, "renormalize_logits": renormalize}
    trie = Trie.from_sequences(DENSE)
    fused, expected = _both(model, trie, dense_oracle, **options)
    recorded, _ = _both(model, trie, dense_oracle, **options, output_scores=True)
    plain = model.generate(**_prompts(), **options, custom_generate=generate_with_trie, trie=trie)
    assert fused.scores is None
    assert torch.equal(plain, fused.sequences)
    for output in (fused, recorded):
        _assert_same(output, expected)


@pytest.mark.gpu
def test_on_a_gpu(model, dense_oracle):
    inputs = {name: value.cuda() for name, value in _prompts().items()}
    options = {**inputs, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6}
    trie = Trie.from_sequences(DENSE).to("cuda")
    output, expected = _both(model.cuda(), trie, dense_oracle, **options)
    _assert_same(output, expected)
    with pytest.raises(ValueError, match="trie must be on the device of the inputs, cuda:0, got cpu"):
        model.generate(**options, custom_generate=generate_with_trie, trie=trie.to("cpu"))


def test_padding_is_the_pad_token(model, small_oracle):
    output, _ = _both(model, Trie.from_sequences(KEYS), small_oracle, num_beams=6, num_return_sequences=6)
    for row, answer in zip(output.sequences.tolist(), small_oracle.answers(output.sequences), strict=True):
        assert row[small_oracle.prompt_length :] == [*answer, 1] + [0] * (4 - len(answer))


def test_several_eos_ids(model, kind, trie_oracle, unicode_names, names_trie):
    oracle = trie_oracle.AllowedTokens(unicode_names, eos=(1, 2), prompt_length=PROMPT_LENGTH[kind])
    options = {"eos_token_id": [2, 1], "num_beams": 4, "num_return_sequences": 4, "early_stopping": True}
    output, expected = _both(model, names_trie, oracle, **options)
    assert oracle.answers(output.sequences) == oracle.answers(expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)


def test_every_input_has_its_own_trie(model, kind, trie_oracle):
    keys = [[[5, 6], [5]], [[7], [7, 8], [11]], [[9, 5, 4]]]
    oracles = [trie_oracle.AllowedTokens(k, prompt_length=PROMPT_LENGTH[kind]) for k in keys]
    arena = Trie.concat([Trie.from_sequences(k) for k in keys])
    output, expected = _both(model, arena, lambda b, ids: oracles[b](b, ids), num_beams=2)
    _assert_same(output, expected)
    for num_beams in (1, 3):
        sequences = model.generate(
            **_prompts(),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=6,
            custom_generate=generate_with_trie,
            trie=arena,
        )
        for oracle, sample in zip(oracles, sequences.view(3, num_beams, -1), strict=True):
            count = min(num_beams, len(oracle.keys))
            assert len(set(oracle.answers(sample[:count]))) == count


def test_rows_that_do_not_exist(model, small_oracle):
    """More beams than keys: every key with its score, then pad with −inf."""
    output, expected = _both(
        model, Trie.from_sequences(KEYS), small_oracle, num_beams=9, num_return_sequences=9, max_new_tokens=9
    )
    sequences, scores = output.sequences.view(3, 9, -1), output.sequences_scores.view(3, 9)
    for sample in sequences.unbind():
        assert sorted(small_oracle.answers(sample[:6])) == small_oracle.keys
    assert (sequences[:, 6:, small_oracle.prompt_length :] == 0).all()
    torch.testing.assert_close(scores[:, :6], expected.sequences_scores.view(3, 9)[:, :6])
    assert scores[:, 6:].isneginf().all()
    assert (output.beam_indices.view(3, 9, -1)[:, 6:] == -1).all()


@pytest.mark.parametrize("num_beams", [1, 6])
def test_what_the_length_cuts_off_is_no_answer(model, small_oracle, num_beams):
    long = [[10, 11, 12]]
    options = {"max_new_tokens": 3, "num_beams": num_beams, "custom_generate": generate_with_trie}
    sequences = model.generate(**_prompts(), **options, trie=Trie.from_sequences(long))
    assert (sequences[:, small_oracle.prompt_length :] == 0).all()
    assert len(sequences) == 3
    if num_beams > 1:
        sequences = model.generate(**_prompts(), **options, num_return_sequences=4, trie=Trie.from_sequences(KEYS))
        short = sorted(tuple(key) for key in KEYS if len(key) < 3)
        assert sorted(small_oracle.answers(sequences[:4])) == short
        longer = {**options, "max_new_tokens": 4}
        sequences = model.generate(**_prompts(), **longer, trie=Trie.from_sequences(long))
        assert set(small_oracle.answers(sequences)) == {(10, 11, 12)}


# Logits processors


def _prefer_odd(input_ids, scores):
    """A processor of the caller's: a plain function."""
    bonus = torch.arange(scores.shape[1]) % 2 + 0.1 * input_ids.shape[1]
    return scores + bonus


PROCESSORS = {
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "bad_words_ids": [[5], [8, 9], [9, 9]],
    "sequence_bias": [[[6], 30.0], [[6, 7], 5.0]],
    "min_new_tokens": 4,
    "suppress_tokens": [6, 7],
    "begin_suppress_tokens": [7, 8],
    "exponential_decay_length_penalty": (1, 4.0),
    "remove_invalid_values": True,
    "guidance_scale": 1.5,
    "renormalize_logits": True,
    "forced_bos_token_id": 9,
    "logits_processor": [_prefer_odd],
}
WITHOUT_EFFECT = {
    "gpt2": ("remove_invalid_values", "forced_bos_token_id"),
    "t5": ("remove_invalid_values", "min_new_tokens"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_honoured(kind, model, dense_oracle, name):
    if name == "guidance_scale" and kind == "t5":
        pytest.skip("transformers has it for decoder-only models")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "length_penalty": -1.0}
    trie = Trie.from_sequences(DENSE)
    output, expected = _both(model, trie, dense_oracle, **options, **{name: PROCESSORS[name]})
    _assert_same(output, expected)
    _, without = _both(model, trie, dense_oracle, **options)
    has_effect = not torch.equal(expected.sequences_scores, without.sequences_scores)
    assert has_effect == (name not in WITHOUT_EFFECT[kind])


def test_an_end_that_a_processor_forbids_is_no_answer(model, small_oracle):
    options = {"num_beams": 6, "num_return_sequences": 6, "min_new_tokens": 3, "max_new_tokens": 9}
    output, _ = _both(model, Trie.from_sequences(KEYS), small_oracle, **options)
    exists = output.sequences_scores > -torch.inf
    assert exists.tolist() == [True, True] + [False] * 4 + [True, True] + [False] * 4 + [True, True] + [False] * 4
    assert set(small_oracle.answers(output.sequences[exists])) == {(5, 6, 7, 8), (10, 11, 12)}


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_k": 0, "top_p": 0.5}, {"min_p": 0.2}, {"typical_p": 0.5}, {"epsilon_cutoff": 0.02}]
)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_sampling_is_legal_under_warpers(model, small_oracle, options, num_beams):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6, **options}
    options |= {"num_beams": num_beams, "num_return_sequences": num_beams, "custom_generate": generate_with_trie}
    for _ in range(4):
        sequences = model.generate(**_prompts(), **options, trie=Trie.from_sequences(KEYS))
        small_oracle.answers(sequences[::num_beams])


# Greedy search and sampling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.2, "renormalize_logits": True},
    ],
)
def test_without_beams(model, dense_oracle, options):
    output, expected = _both(
        model, Trie.from_sequences(DENSE), dense_oracle, **options, max_new_tokens=6, output_scores=True
    )
    assert torch.equal(output.sequences, expected.sequences)
    dense_oracle.answers(output.sequences)
    for scores, expected_scores in zip(output.scores, expected.scores, strict=True):
        assert torch.equal(scores, expected_scores)


def test_stopped_without_beams(model, small_oracle):
    sequences = model.generate(
        **_prompts(),
        max_new_tokens=9,
        stopping_criteria=[MaxTimeCriteria(-1.0)],
        custom_generate=generate_with_trie,
        trie=Trie.from_sequences([[10, 11, 12]]),
    )
    assert (sequences[:, small_oracle.prompt_length :] == 0).all()


# Outputs


def test_all_that_is_recorded(model, kind, dense_oracle):
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6}
    options |= {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}
    model.set_attn_implementation("eager")
    output, expected = _both(model, Trie.from_sequences(DENSE), dense_oracle, **options)
    _assert_same(output, expected)
    assert type(output) is type(expected)
    assert set(output) == set(expected)
    assert torch.equal(output.beam_indices, expected.beam_indices)
    assert output.beam_indices.dtype == expected.beam_indices.dtype
    compared = set(output) - {"sequences", "sequences_scores", "beam_indices", "past_key_values"}
    assert len(compared) == (4 if kind == "gpt2" else 7)
    for name in compared:
        torch.testing.assert_close(_flat(output[name]), _flat(expected[name]))
    assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    transitions = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    lengths = (output.beam_indices >= 0).sum(1)
    torch.testing.assert_close(transitions.sum(1) / lengths, output.sequences_scores)


def _flat(values):
    """Tuples of tuples of tensors as a list."""
    return [values] if isinstance(values, torch.Tensor) else [tensor for value in values for tensor in _flat(value)]


# Inputs


def test_ways_to_give_the_inputs(gpt2, trie_oracle):
    model, trie = gpt2(), Trie.from_sequences(DENSE)
    oracle = trie_oracle.AllowedTokens(DENSE, prompt_length=7)
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"attention_mask": None},
        {"position_ids": torch.arange(7).expand(3, 7)},
    ):
        _assert_same(*_both(model, trie, oracle, num_beams=3, max_new_tokens=6, **options))

    oracle.prompt_length = 0
    embeds = model.get_input_embeddings()(_prompts()["input_ids"])
    options = {"input_ids": None, "inputs_embeds": embeds, "num_beams": 3, "max_new_tokens": 6}
    output, expected = _both(model, trie, oracle, **options)
    assert oracle.answers(output.sequences) == oracle.answers(expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)


def test_ways_to_give_the_decoder_inputs(t5, trie_oracle):
    model, trie = t5(), Trie.from_sequences(DENSE)
    oracle = trie_oracle.AllowedTokens(DENSE, prompt_length=3)
    options = {"num_beams": 3, "max_new_tokens": 6}
    start = {"decoder_input_ids": torch.tensor([[3, 11, 12]] * 3)}
    _assert_same(*_both(model, trie, oracle, **options, **start))
    oracle.prompt_length = 1
    output, expected = _both(model, trie, oracle, **options, use_cache=False)
    _assert_same(output, expected)
    encoded = {**_prompts(), "input_ids": None, "encoder_outputs": model.get_encoder()(**_prompts())}
    sequences = model.generate(**encoded, **options, custom_generate=generate_with_trie, trie=trie)
    assert torch.equal(output.sequences, sequences)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"trie": {5: {}}}, TypeError, r"trie must be a fastmix\.Trie, got dict"),
        ({"eos_token_id": 7}, ValueError, r"eos_token_id must not occur in the trie's keys, got \[7\]"),
        ({"eos_token_id": None}, ValueError, "eos_token_id must be set"),
        ({"trie": [KEYS, KEYS]}, ValueError, "one trie or one for each of the 3 inputs, got 2"),
        ({"trie": [[[60]]]}, ValueError, "vocabulary"),
        ({"trie": [[[60]]], "num_beams": 1}, ValueError, "vocabulary"),
        ({"low_memory": True}, ValueError, "low_memory must not be set"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0}, ValueError, "got group_beam_search"),
        ({"force_words_ids": [[5]]}, ValueError, "got constrained_beam_search"),
        ({"num_beams": 1, "penalty_alpha": 0.6, "top_k": 4}, ValueError, "got contrastive_search"),
        ({"max_time": 9.0}, ValueError, "stopping_criteria with beams must be .*, got MaxTimeCriteria"),
        ({"stopping_criteria": [EosTokenCriteria(9)]}, ValueError, "stopping_criteria .*, got EosTokenCriteria"),
    ],
)
def test_refused(gpt2, options, error, text):
    model = gpt2()
    if options.get("eos_token_id", 1) is None:
        model.generation_config.eos_token_id = None
    trie = options.get("trie", [KEYS])
    if isinstance(trie, list):
        trie = Trie.concat([Trie.from_sequences(keys) for keys in trie])
    options = {"num_beams": 2, "max_new_tokens": 6, **options, "trie": trie}
    with pytest.raises(error, match=text):
        model.generate(**_prompts(), **options, custom_generate=generate_with_trie)


def test_forced_bos_that_is_not_in_the_keys(t5):
    with pytest.raises(ValueError, match="forced_bos_token_id must be a first token of the trie's keys, got 3"):
        t5().generate(
            **_prompts(),
            forced_bos_token_id=3,
            max_new_tokens=6,
            custom_generate=generate_with_trie,
            trie=Trie.from_sequences(KEYS),
        )


def test_no_trie(gpt2):
    with pytest.raises(TypeError, match="'trie'"):
        gpt2().generate(**_prompts(), custom_generate=generate_with_trie)


def test_a_shorter_length_criterion_counts(model, small_oracle):
    shorter = StoppingCriteriaList([MaxLengthCriteria(small_oracle.prompt_length + 2)])
    options = {"num_beams": 6, "stopping_criteria": shorter, "max_new_tokens": 9}
    output, _ = _both(model, Trie.from_sequences(KEYS), small_oracle, **options)
    assert set(small_oracle.answers(output.sequences)) == {(5,)}
