"""T5, mT5 and RoFormer of transformers, accelerated in place: the same functions, with no bias of queries × keys."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from fastmix.integrations.transformers import accelerate, restore
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytest.importorskip("transformers")
import transformers
from transformers.models.roformer import modeling_roformer
from transformers.models.t5 import modeling_t5

B, T = 3, 11
VOCABULARY = 60
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 8, "decoder_start_token_id": 0}
ROFORMER = {"vocab_size": VOCABULARY, "hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2}
ROFORMER |= {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 32}
IDS = {"pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "roformer": ("RoFormerForMaskedLM", "RoFormerConfig", ROFORMER),
    "decoder": ("RoFormerForCausalLM", "RoFormerConfig", {**ROFORMER, "is_decoder": True}),
    "cross": ("RoFormerForCausalLM", "RoFormerConfig", {**ROFORMER, "is_decoder": True, "add_cross_attention": True}),
    "rotary value": ("RoFormerForMaskedLM", "RoFormerConfig", {**ROFORMER, "rotary_value": True}),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def _model(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model, config, sizes = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **IDS, **options})).eval()


class _Logits(nn.Module):
    """As the check of accelerated models calls it: 0 for padding."""

    def __init__(self, name: str, padded: bool, **options) -> None:
        super().__init__()
        self.model, self.kept = _model(name, **options), None
        mask = torch.ones(B, T, dtype=torch.int64)
        mask[0, 6:], mask[2, 2:] = 0, 0
        self.arguments = {"attention_mask": mask} if padded else {}
        if "t5" in name:
            self.arguments["decoder_input_ids"] = _ids(7)
        elif padded:
            self.kept = mask.bool()
        if "t5" in name and padded:
            self.kept = mask[:, :7].bool()
            self.arguments["decoder_attention_mask"] = mask[:, :7]
        if name == "cross":
            self.arguments["encoder_attention_mask"] = mask.flip(1)

    def forward(self, ids: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        arguments = self.arguments if states is None else self.arguments | {"encoder_hidden_states": states}
        logits = self.model(ids, **arguments).logits
        return logits if self.kept is None else logits * self.kept[:, :, None]


def _ids(length: int = T) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (B, length), generator=torch.Generator().manual_seed(length))


def _forbidden(*args, **kwargs):
    raise AssertionError("the model's own computation was called")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name, padded, check_accelerated, assert_kernel, monkeypatch):
    """T5's table gets its gradient; its bias of queries × keys is not computed."""
    model = _Logits(name, padded)
    inputs = (_ids(), torch.randn(B, T, 32)) if name == "cross" else (_ids(),)
    for layer in model.modules():
        if isinstance(layer, modeling_roformer.RoFormerSelfAttention):
            nn.init.normal_(layer.query.weight, std=0.3)
            layer.key.bias.requires_grad_(False)  # its gradient is zero, but for rounding
    ops = check_accelerated(_WithoutTheirOwn(monkeypatch), model, *inputs)
    assert_kernel(ops, "scaled_attention")
    assert_kernel(ops, "scaled_attention_bwd")


class _WithoutTheirOwn:
    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def accelerate(self, model):
        self.monkeypatch.setattr(modeling_t5.T5Attention, "compute_bias", _forbidden)
        self.monkeypatch.setattr(modeling_roformer.RoFormerSelfAttention, "forward", _forbidden)
        return accelerate(model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_generates_the_same_tokens(name, options):
    model = _model(name)
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, :5] = mask[2, :1] = 0
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(_ids(), attention_mask=mask, **lengths, **options)
    accelerate(model)
    assert torch.equal(model.generate(_ids(), attention_mask=mask, **lengths, **options), expected)


def test_report_and_restore():
    model = _model("t5")
    model.set_attn_implementation("eager")
    model.decoder.config._attn_implementation = "sdpa"  # as a user may have set it
    before = model(_ids(), decoder_input_ids=_ids(5)).logits
    keys = list(model.state_dict())
    report = accelerate(model)
    assert len(report.replaced) == 6
    what = "T5Attention → fastmix.scaled_attention with its RelativeBias"
    assert report.replaced["decoder.block.1.layer.1.EncDecAttention"] == what
    assert accelerate(model).replaced == report.replaced
    assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"fastmix"}
    accelerated = model(_ids(), decoder_input_ids=_ids(5)).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(_ids(), decoder_input_ids=_ids(5)).logits, accelerated)
        restore(other)
        assert torch.equal(other(_ids(), decoder_input_ids=_ids(5)).logits, before)
        assert [part.config._attn_implementation for part in (other, other.decoder)] == ["eager", "sdpa"]
        assert list(other.state_dict()) == keys
    assert not torch.equal(accelerated, before)


def test_restored_roformer_is_eager():
    model = _model("roformer")
    expected = model(_ids()).logits
    assert accelerate(model).replaced["roformer.encoder.layer.1.attention.self"].startswith("RoFormerSelfAttention →")
    assert model.config._attn_implementation == "fastmix"
    restore(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(_ids()).logits, expected)


def test_users_may_set_another_implementation():
    model = _model("t5")
    expected = model(_ids(), decoder_input_ids=_ids(5)).logits
    accelerate(model)
    for part in (model, model.encoder, model.decoder):
        part.config._attn_implementation = "sdpa"
    assert torch.equal(model(_ids(), decoder_input_ids=_ids(5)).logits, expected)


class _OwnT5Attention(modeling_t5.T5Attention):
    """Somebody's subclass: it gets the masks that it would get without fastmix."""

    def forward(self, hidden_states, mask=None, **kwargs):
        assert mask is None or mask.dtype.is_floating_point
        return super().forward(hidden_states, mask, **kwargs)


class _OwnRoFormerAttention(modeling_roformer.RoFormerSelfAttention):
    forward = modeling_roformer.RoFormerSelfAttention.forward


def test_a_layer_that_is_left_alone_keeps_its_masks():
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 4:] = 0
    model = _model("t5")
    model.set_attn_implementation("eager")
    model.encoder.config._attn_implementation = "eager"
    model.encoder.block[1].layer[0].SelfAttention.__class__ = _OwnT5Attention
    expected = model.encoder(_ids(), attention_mask=mask).last_hidden_state
    report = accelerate(model)
    assert "encoder.block.1.layer.0.SelfAttention" in report.kept
    assert [part.config._attn_implementation for part in (model.encoder, model.decoder)] == ["eager", "fastmix"]
    assert torch.equal(model.encoder(_ids(), attention_mask=mask).last_hidden_state, expected)

    model = _model("roformer")
    oracle = copy.deepcopy(model).double()(_ids(), attention_mask=mask).logits
    expected = model(_ids(), attention_mask=mask).logits
    model.roformer.encoder.layer[0].attention.self.__class__ = _OwnRoFormerAttention
    assert len(accelerate(model).replaced) == len(accelerate(model).kept) == 1
    assert model.config._attn_implementation == "eager"
    check_parity("logits", model(_ids(), attention_mask=mask).logits, expected, oracle, independent=1)


# What users do with a model


def test_projections_are_called():
    """With hooks, and as what LoRA puts in their place."""
    for name, inner in (("t5", "encoder.block.0.layer.0.SelfAttention.v"), ("roformer", "roformer.encoder.layer.0")):
        model = _model(name)
        accelerate(model)
        inner += ".attention.self.value" if name == "roformer" else ""
        arguments = {"decoder_input_ids": _ids(5)} if name == "t5" else {}
        before = model(_ids(), **arguments).logits
        projection = model.get_submodule(inner)
        called = []
        with projection.register_forward_hook(lambda *_, called=called: called.append(1)):
            assert torch.equal(model(_ids(), **arguments).logits, before)
        assert called == [1]
        added = nn.Linear(32, 32)
        model.set_submodule(inner, nn.Sequential(projection, added))
        assert not torch.equal(model(_ids(), **arguments).logits, before)


def test_a_hooked_table_is_called():
    model = _Logits("t5", padded=True)
    expected = model(_ids())
    oracle = copy.deepcopy(model).double()(_ids())
    accelerate(model)
    called = []
    table = model.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    table.register_forward_hook(lambda *_: called.append(1))
    check_parity("logits", model(_ids()), expected, oracle)
    assert called == [1]


def test_attention_weights_of_roformer():
    """Asked for, they are those of its own forward, padding and all; a hooked dropout is called."""
    model = _Logits("roformer", padded=True).model
    mask = _Logits("roformer", padded=True).arguments
    expected = model(_ids(), **mask, output_attentions=True)
    accelerate(model)
    got = model(_ids(), **mask, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, expected.attentions, strict=True))
    called = []
    model.roformer.encoder.layer[0].attention.self.dropout.register_forward_hook(lambda *_: called.append(1))
    model(_ids(), **mask)
    assert called == [1]


@pytest.mark.parametrize(
    ("name", "options"),
    [("t5", {"dropout_rate": 0.3}), ("roformer", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0})],
)
def test_dropout_is_active_in_training_only(name, options):
    model = _Logits(name, padded=True, **options)
    accelerate(model)
    expected = model(_ids())
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(_ids()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """The table goes from layer to layer, around the recomputed blocks."""
    gradients = []
    for checkpointing, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        model = _Logits("t5", padded=True, dropout_rate=0.0).train().to(dtype)
        accelerate(model)
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(_ids()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        check_parity(name, gradient, *(others[name] for others in gradients[1:]), factor=GRADIENT_FACTOR)


def test_compiled_without_graph_breaks():
    model = _Logits("t5", padded=True, num_layers=1).requires_grad_(False)
    accelerate(model)
    expected = model(_ids())
    assert torch.equal(torch.compile(model, fullgraph=True, backend=aot_eager)(_ids()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["t5", "roformer"])
def test_other_dtypes(name, dtype):
    model = _Logits(name, padded=True)
    oracle = copy.deepcopy(model).double()(_ids())
    model.to(dtype)
    expected = model(_ids())
    accelerate(model)
    check_parity("logits", model(_ids()), expected, oracle)
