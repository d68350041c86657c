"""What several tests share: the check of a model before and after `accelerate`; and models, keys and the plain-Python
oracle of those that decode under a trie inside transformers."""

from __future__ import annotations

import contextlib
import copy
import unicodedata
from bisect import bisect_left
from types import SimpleNamespace

import pytest
import torch

from fastmix import Trie
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

PAD, EOS, EOS_2, START = 0, 1, 2, 3
FIRST = 4  # the smallest token of a key
VOCABULARY = 48


class AllowedTokens:
    """An exact `prefix_allowed_tokens_fn`: bisection over the sorted keys, pad for what has ended or is no prefix."""

    def __init__(self, keys, eos=(EOS,), prompt_length=1):
        self.keys, self.eos, self.prompt_length = sorted({tuple(key) for key in keys}), list(eos), prompt_length

    def after(self, prefix) -> list[int]:
        prefix = tuple(prefix)
        i = bisect_left(self.keys, prefix)
        allowed = []
        if i < len(self.keys) and self.keys[i] == prefix:
            allowed, i = list(self.eos), i + 1
        while i < len(self.keys) and self.keys[i][: len(prefix)] == prefix:
            allowed.append(self.keys[i][len(prefix)])
            i = bisect_left(self.keys, (*prefix, allowed[-1] + 1), i)
        return allowed

    def __call__(self, batch_id, input_ids) -> list[int]:
        return self.after(input_ids[self.prompt_length :].tolist()) or [PAD]

    def answers(self, sequences) -> list[tuple[int, ...]]:
        """The rows' tokens between the prompt and EOS, which must be there: whole keys."""
        rows = [row[self.prompt_length :] for row in sequences.tolist()]
        answers = [tuple(row[: next(i for i, token in enumerate(row) if token in self.eos)]) for row in rows]
        assert all(self.eos[0] in self.after(answer) for answer in answers)
        return answers


@pytest.fixture
def one_thread():
    """Models as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trie_oracle():
    """AllowedTokens and the ids that the tests share."""
    return SimpleNamespace(
        AllowedTokens=AllowedTokens, PAD=PAD, EOS=EOS, EOS_2=EOS_2, START=START, FIRST=FIRST, VOCABULARY=VOCABULARY
    )


@pytest.fixture(scope="session")
def unicode_names() -> list[list[int]]:
    """The names of all Unicode characters, about 138,000, by letter; many are prefixes of others."""
    names = sorted(name for point in range(0x110000) if (name := unicodedata.name(chr(point), None)))
    token = {letter: FIRST + i for i, letter in enumerate(sorted(set("".join(names))))}
    return [[token[letter] for letter in name] for name in names]


@pytest.fixture(scope="session")
def names_trie(unicode_names) -> Trie:
    return Trie.from_sequences(unicode_names)


@pytest.fixture(scope="session")
def gpt2():
    """gpt2(dtype): a small decoder-only model with random weights, large enough that logits differ."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    config = transformers.GPT2Config(**sizes, initializer_range=0.5, bos_token_id=START, eos_token_id=EOS)
    return _models(lambda: transformers.GPT2LMHeadModel(config))


@pytest.fixture(scope="session")
def t5():
    """t5(dtype): a small encoder-decoder model, likewise."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START}
    config = transformers.T5Config(**sizes, **ids, initializer_factor=2.0, tie_word_embeddings=False)
    return _models(lambda: transformers.T5ForConditionalGeneration(config))


def _models(build):
    def model(dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        model = build().eval().to(dtype)
        model.generation_config.pad_token_id = PAD
        return model

    return model


@pytest.fixture
def check_accelerated(recorded):
    """check_accelerated(integration, model, *inputs): accelerates the model in place, compares values and gradients,
    with the same random state, and returns the fastmix ops that it called."""

    def check(integration, model, *inputs, context=contextlib.nullcontext):
        exact = copy.deepcopy(model).double()
        oracle = _values_and_gradients(exact, [x.double() if x.is_floating_point() else x for x in inputs])
        with context():
            plain = _values_and_gradients(model, inputs)
            integration.accelerate(model)
            with recorded() as ops:
                fast = _values_and_gradients(model, inputs)
        assert fast.keys() == plain.keys() == oracle.keys()
        for name, value in fast.items():
            of_output = name == "output"
            options = {"independent": 1} if of_output else {"factor": GRADIENT_FACTOR}
            check_parity(name, value, plain[name], oracle[name], **options)
        return ops

    return check


def _values_and_gradients(model, inputs) -> dict[str, torch.Tensor]:
    leaves = {str(i): x.detach().requires_grad_() for i, x in enumerate(inputs) if x.is_floating_point()}
    leaves |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(0)
    output = model(*(leaves.get(str(i), x) for i, x in enumerate(inputs)))
    draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(output, list(leaves.values()), draw.to(output.dtype), allow_unused=True)
    gradients = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"output": output.detach(), **gradients}
