"""State dicts of transformers' RoFormer and T5 attention load unchanged, both ways, and give the same values and
gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from fastmix import nn
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

transformers = pytest.importorskip("transformers")

B, S, VOCAB = 3, 9, 29
# Our name → theirs.
NAMES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_blocks": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embedding_size": "embedding_size",
    "max_seq_len": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
    "rotary_value": "rotary_value",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
SMALL = {"vocab_size": VOCAB, "embed_dim": 24, "num_blocks": 2, "num_heads": 3, "max_seq_len": 16}
VARIANTS = {
    "plain": {},
    "rotary_value": {"rotary_value": True},
    "factorised": {"embedding_size": 10, "activation": "gelu_tanh", "mlp_ratio": 2.5, "pad_token_id": None},
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def _config(sizes):
    mlp = {"intermediate_size": round(sizes["embed_dim"] * sizes.get("mlp_ratio", 4.0))}
    act = {"hidden_act": ACTIVATIONS[sizes.get("activation", "gelu")]}
    named = {theirs: sizes[ours] for ours, theirs in NAMES.items() if ours in sizes}
    return transformers.RoFormerConfig(**named, **mlp, **act, attn_implementation="eager")


def _pair(theirs, ours, **variant):
    """transformers' model, away from its initialisation, and ours with its parameters, without dropout."""
    sizes = SMALL | variant
    theirs, ours = theirs(_config(sizes)).eval(), ours(**sizes).eval()
    _draw(theirs)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    return theirs, ours


def _draw(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _run(model, call):
    """The values of call(model), and the parameters' gradients, from the same random state."""
    torch.manual_seed(1)
    values = call(model)
    values = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(value.shape, generator=generator).bfloat16().to(value.dtype) for value in values]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(values, list(parameters.values()), draws, allow_unused=True)
    found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return [value.detach() for value in values], found


def _check(theirs, ours, call_theirs, call_ours):
    oracle, oracle_grads = _run(copy.deepcopy(theirs).double(), call_theirs)
    expected, expected_grads = _run(theirs, call_theirs)
    values, grads = _run(ours, call_ours)
    for i, value in enumerate(values):
        named = {"independent": min(value.ndim, 1), "factor": FORWARD_FACTOR}
        check_parity(f"value {i}", value, expected[i], oracle[i], **named)
    assert grads.keys() == expected_grads.keys()
    # In one vector: the error of a few elements that all but cancel has no measure of its own.
    joined = (torch.cat([found[name].flatten() for name in grads]) for found in (grads, expected_grads, oracle_grads))
    check_parity("gradients", *joined, factor=GRADIENT_FACTOR)


def _ids():
    input_ids = torch.randint(1, VOCAB, (B, S))
    attention_mask = (torch.arange(S) < torch.tensor([[S], [5], [1]])).long()
    return input_ids * attention_mask, attention_mask, torch.randint(0, 2, (B, S))


# RoFormer


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_roformer_model(variant):
    """Padded on the right and full, with and without token types."""
    theirs, ours = _pair(transformers.RoFormerModel, nn.RoFormerEncoder, **variant)
    input_ids, mask, types = _ids()
    # What comes out at padding counts, too: it attends to the tokens as they do.
    _check(theirs, ours, lambda m: m(input_ids, mask, types)[0], lambda m: m(input_ids, mask, types))
    _check(theirs, ours, lambda m: m(input_ids, torch.ones_like(mask))[0], lambda m: m(input_ids))


def test_bfloat16():
    theirs, ours = (m.bfloat16() for m in _pair(transformers.RoFormerModel, nn.RoFormerEncoder, rotary_value=True))
    input_ids, mask, types = _ids()
    _check(theirs, ours, lambda m: m(input_ids, mask, types)[0], lambda m: m(input_ids.int(), mask, types.int()))


def test_dropout_at_the_same_places():
    """But of the attention's weights, which are drawn otherwise."""
    theirs, ours = _pair(transformers.RoFormerModel, nn.RoFormerEncoder, dropout=0.3, attention_dropout=0.0)
    input_ids, mask, types = _ids()
    _check(theirs.train(), ours.train(), lambda m: m(input_ids, mask, types)[0], lambda m: m(input_ids, mask, types))


def test_padding_at_any_place_and_lengths():
    theirs, ours = _pair(transformers.RoFormerModel, nn.RoFormerEncoder)
    input_ids, mask, _ = _ids()
    left = mask.flip(1)
    _check(theirs, ours, lambda m: m(input_ids, left)[0], lambda m: m(input_ids, left.bool()))
    tokens, lengths = mask[..., None], mask.sum(dim=1)
    _check(theirs, ours, lambda m: m(input_ids, mask)[0] * tokens, lambda m: m(input_ids, lengths=lengths) * tokens)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_masked_lm_head(variant):
    """With a prefix of all tokens nothing is causal: then it is transformers' masked language model."""
    theirs, ours = _pair(transformers.RoFormerForMaskedLM, nn.RoFormerForSeq2Seq, **variant)
    input_ids, mask, types = _ids()
    everything = torch.full((B,), S)
    _check(
        theirs,
        ours,
        lambda m: m(input_ids, mask, types).logits,
        lambda m: m(input_ids, types, everything, attention_mask=mask)[0],
    )


def test_causal_lm():
    """With a prefix of nothing it is transformers' causal language model, loss and all."""
    config = _config(SMALL)
    config.is_decoder = True
    theirs, ours = transformers.RoFormerForCausalLM(config).eval(), nn.RoFormerForSeq2Seq(**SMALL).eval()
    _draw(theirs)
    ours.load_state_dict(theirs.state_dict())
    input_ids, mask, _ = _ids()
    labels = input_ids.masked_fill(mask == 0, -100)

    def call_theirs(model):
        output = model(input_ids, mask, labels=labels, use_cache=False)
        return output.logits, output.loss

    nothing = torch.zeros(B, dtype=torch.int32)
    _check(
        theirs,
        ours,
        call_theirs,
        lambda m: m(input_ids, prefix_len=nothing, labels=labels, attention_mask=mask),
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (transformers.RoFormerModel, nn.RoFormerEncoder),
        (transformers.RoFormerForMaskedLM, nn.RoFormerForSeq2Seq),
    ],
    ids=["encoder", "seq2seq"],
)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_same_names_shapes_and_constants(theirs, ours, variant):
    sizes = SMALL | variant
    theirs, ours = theirs(_config(sizes)), ours(**sizes)
    shapes = [{name: list(value.shape) for name, value in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    name = next(name for name in shapes[0] if name.endswith("embed_positions.weight"))
    torch.testing.assert_close(ours.state_dict()[name], theirs.state_dict()[name], rtol=0, atol=1e-6)
    assert theirs.load_state_dict(ours.state_dict(), strict=True) == ([], [])


def test_the_default_sizes_are_the_base_models():
    with torch.device("meta"):
        theirs = transformers.RoFormerModel(transformers.RoFormerConfig()).state_dict()
        ours = nn.RoFormerEncoder().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_saved_files_load(tmp_path):
    """They hold the parameters that are shared once."""
    from safetensors.torch import load_file

    theirs, ours = _pair(transformers.RoFormerForMaskedLM, nn.RoFormerForSeq2Seq)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in saved
    fresh = nn.RoFormerForSeq2Seq(**SMALL)
    assert fresh.load_state_dict(saved, strict=True) == ([], [])
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


# T5


def _t5_pair(*, is_decoder, own_table):
    config = transformers.T5Config(d_model=20, d_kv=8, num_heads=3, relative_attention_num_buckets=10)
    config.relative_attention_max_distance = 17
    config.is_decoder, config._attn_implementation = is_decoder, "eager"
    module = transformers.models.t5.modeling_t5.T5Attention
    theirs = module(config, has_relative_attention_bias=own_table, layer_idx=0).eval()
    sizes = {"num_buckets": 10, "max_distance": 17, "has_relative_attention_bias": own_table}
    ours = nn.T5Attention(20, 3, 8, is_decoder=is_decoder, **sizes).eval()
    _draw(theirs)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    assert theirs.load_state_dict(ours.state_dict(), strict=True) == ([], [])
    return theirs, ours


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_self_attention(is_decoder):
    """In the encoder with padding; in the decoder causal, with buckets for the past only."""
    theirs, ours = _t5_pair(is_decoder=is_decoder, own_table=True)
    lengths = torch.tensor([24, 11, 1])
    rows, columns = torch.arange(24)[:, None], torch.arange(24)
    allowed = columns < lengths[:, None, None]
    if is_decoder:
        allowed = allowed & (columns <= rows)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    x = torch.randn(B, 24, 20)
    _check(
        theirs,
        ours,
        lambda m: m(x.to(m.q.weight.dtype), mask=added.to(m.q.weight.dtype))[0],
        lambda m: m(x, key_lengths=lengths),
    )


def test_t5_shared_table_and_cross_attention():
    x, states = torch.randn(B, 7, 20), torch.randn(B, 12, 20)
    first, ours_first = _t5_pair(is_decoder=False, own_table=True)
    second, ours_second = _t5_pair(is_decoder=False, own_table=False)
    pair, ours_pair = torch.nn.ModuleList([first, second]), torch.nn.ModuleList([ours_first, ours_second])

    def call_theirs(model):
        output, bias, _ = model[0](x.to(model[0].q.weight.dtype))
        return model[1](output, position_bias=bias)[0]

    _check(pair, ours_pair, call_theirs, lambda m: m[1](m[0](x), relative_bias=m[0].relative_bias))
    cross, ours_cross = _t5_pair(is_decoder=True, own_table=False)
    _check(
        cross,
        ours_cross,
        lambda m: m(x.to(m.q.weight.dtype), key_value_states=states.to(m.q.weight.dtype))[0],
        lambda m: m(x, states),
    )
