"""fastmix.nn's RoFormer against its formulas in plain PyTorch, values and gradients; masks, state, errors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from fastmix import nn
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

B, S, C, H, VOCAB = 3, 8, 24, 2, 19
SMALL = {"vocab_size": VOCAB, "embed_dim": C, "num_blocks": 2, "num_heads": H, "max_seq_len": 10}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}
LENGTHS = torch.tensor([S, 5, 1])


def _make(model=nn.RoFormerEncoder, **named):
    """With parameters that are neither 0 nor 1, so that none of them goes unnoticed."""
    model = model(**SMALL | STILL | named)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _ids():
    """Token ids, and token types: sources of 3, 1 and 0 tokens, each with its answer, and padding behind them."""
    tokens = torch.arange(S) < LENGTHS[:, None]
    types = (torch.arange(S) >= torch.tensor([[3], [1], [0]])) & tokens
    return torch.randint(1, VOCAB, (B, S)) * tokens, types.long(), tokens


# The formulas


def _linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def _norm(norm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-12)


def _turned(x):
    """[B, H, S, D]: the pair (2i, 2i + 1) at position p, as a complex number, times exp(√−1·p·10000^(−2i/D))."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    d = x.shape[3]
    angle = torch.arange(x.shape[2])[:, None] * 10000 ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.promote_types(x.dtype, torch.complex64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous()) * turn).flatten(3)


def _block(block, x, allowed, rotary_value):
    attention = block.attention["self"]
    query, key, value = (
        _linear(layer, x).unflatten(2, (H, -1)).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    scores = _turned(query) @ _turned(key).mT / (C // H) ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    mixed = (weights @ (_turned(value) if rotary_value else value)).transpose(1, 2).flatten(2)
    output = block.attention["output"]
    x = _norm(output.LayerNorm, x + _linear(output.dense, mixed))
    hidden = F.gelu(_linear(block.intermediate["dense"], x))
    return _norm(block.output.LayerNorm, x + _linear(block.output.dense, hidden))


def _encoder(model, ids, types, allowed, rotary_value=False):
    parts = model.embeddings
    x = F.embedding(ids, parts.word_embeddings.weight, padding_idx=0) + parts.token_type_embeddings.weight[types]
    x = _norm(parts.LayerNorm, x)
    for block in model.encoder["layer"]:
        x = _block(block, x, allowed, rotary_value)
    return x


def _unilm(prefix_len):
    """[B, 1, S, S]: the mask in full."""
    rows, columns = torch.arange(S)[:, None], torch.arange(S)
    return ((columns <= rows) | (columns < prefix_len[:, None, None]))[:, None]


def _run(function, model):
    values = function(model)
    draw = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return values.detach(), torch.autograd.grad(values, list(model.parameters()), draw.to(values.dtype))


def _check(model, function, formula):
    values, grads = _run(function, model)
    expected, expected_grads = _run(formula, model)
    with torch.autocast("cpu", enabled=False):
        oracle, oracle_grads = _run(formula, copy.deepcopy(model).double())
    named = {"independent": min(1, values.ndim), "factor": FORWARD_FACTOR}
    check_parity("values", values, expected, oracle, **named)
    # In one vector: the error of a few elements that all but cancel has no measure of its own.
    joined = (torch.cat([grad.flatten() for grad in found]) for found in (grads, expected_grads, oracle_grads))
    check_parity("gradients", *joined, factor=GRADIENT_FACTOR)


# Values


@pytest.mark.parametrize("rotary_value", [False, True])
def test_encoder(rotary_value):
    """Full, padded, and with UniLM's mask, which equals the dense one."""
    model = _make(rotary_value=rotary_value)
    ids, types, tokens = _ids()
    everything, padded, prefix_len = torch.ones(1, 1, S, S).bool(), tokens[:, None, None], torch.tensor([3, 0, 7])
    for named, allowed in (
        ({}, everything),
        ({"attention_mask": tokens.int()}, padded),
        ({"prefix_len": prefix_len.int()}, _unilm(prefix_len)),
        ({"prefix_len": prefix_len, "attention_mask": tokens}, _unilm(prefix_len) & padded),
    ):
        _check(
            model,
            lambda m, named=named: m(ids, token_type_ids=types, **named),
            lambda m, allowed=allowed: _encoder(m, ids, types, allowed, rotary_value),
        )


@pytest.mark.parametrize("prefix_len", [None, torch.tensor([4, 5, 1])])
def test_lengths(prefix_len):
    """As an attention_mask where there are tokens; padding reaches nothing there, nor any gradient."""
    model = _make()
    ids, _, tokens = _ids()
    _check(
        model,
        lambda m: m(ids, lengths=LENGTHS.int(), prefix_len=prefix_len) * tokens[..., None],
        lambda m: m(ids, tokens, prefix_len=prefix_len) * tokens[..., None],
    )
    other = torch.where(tokens, ids, VOCAB - 1)
    outputs = (model(given, lengths=LENGTHS, prefix_len=prefix_len)[tokens] for given in (ids, other))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    # Nor do the tokens reach the padding, on which no time is spent.
    other = torch.where(tokens, ids % (VOCAB - 1) + 1, ids)
    outputs = (model(given, lengths=LENGTHS, prefix_len=prefix_len)[~tokens] for given in (ids, other))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_positions_are_relative_and_order_counts():
    """What stands behind padding on the left is encoded as alone."""
    model = _make().double()
    ids = torch.randint(1, VOCAB, (1, 5))
    shifted, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(model(shifted, mask)[:, 3:], model(ids))
    assert not torch.allclose(model(ids.flip(1)).flip(1), model(ids), rtol=1e-3)


def test_seq2seq():
    """Logits, with the embedding's weight for the classifier's; prefixes from token types; loss of the answers."""
    model = _make(nn.RoFormerForSeq2Seq)
    ids, types, tokens = _ids()
    labels = ids.masked_fill(types == 0, -100)

    def logits(model):
        x = _encoder(model.roformer, ids, types, _unilm(torch.tensor([3, 1, 0])))
        head = model.cls["predictions"]
        x = _norm(head.transform["LayerNorm"], F.gelu(_linear(head.transform["dense"], x)))
        return x @ model.roformer.embeddings.word_embeddings.weight.mT + head.bias

    def loss(model):
        losses = [
            -logits(model)[b, i - 1].log_softmax(dim=-1)[ids[b, i]]
            for b, i in types.nonzero().tolist()
            if i > 0  # nothing stands before the first token to predict it
        ]
        return torch.stack(losses).mean()

    _check(model, lambda m: m(ids, types)[0], logits)
    _check(model, lambda m: m(ids, types, labels=labels)[1], loss)
    assert model(ids, types)[1] is None
    # Padding behind an answer is seen by none of its tokens, with lengths or without.
    given = model(ids, types, torch.tensor([3, 1, 0]), labels.int(), lengths=LENGTHS)
    torch.testing.assert_close(given[0][tokens], model(ids, types)[0][tokens])
    torch.testing.assert_close(given[1], model(ids, types, labels=labels)[1])


def test_an_answer_sees_only_what_is_before_it():
    model = _make(nn.RoFormerForSeq2Seq)
    ids = torch.randint(1, VOCAB, (1, S))
    prefix_len = torch.tensor([3])
    logits = model(ids, prefix_len=prefix_len)[0][0]
    for place, unchanged in ((2, []), (5, [0, 1, 2, 3, 4]), (7, [0, 1, 2, 3, 4, 5, 6])):
        other = ids.clone()
        other[0, place] = ids[0, place] % (VOCAB - 1) + 1
        same = torch.isclose(model(other, prefix_len=prefix_len)[0][0], logits).all(dim=-1)
        assert same.nonzero().flatten().tolist() == unchanged


# Modules


def test_calls_its_op(recorded, assert_kernel):
    model = _make()
    with recorded() as ops:
        model(_ids()[0])
    assert_kernel(ops, "scaled_attention")
    assert len(ops) in (0, len(model.encoder["layer"]))


def test_starts_as_transformers_does():
    model = nn.RoFormerForSeq2Seq(**SMALL | {"vocab_size": 500, "embed_dim": 64})
    block, head = model.roformer.encoder["layer"][0], model.cls["predictions"]
    words = model.roformer.embeddings.word_embeddings.weight
    assert not words[0].any()
    for weight in (
        words[1:],
        block.attention["self"].key.weight,
        block.output.dense.weight,
        head.transform["dense"].weight,
    ):
        assert abs(float(weight.detach().std()) / 0.02 - 1) < 5 / (2 * weight.numel()) ** 0.5
    for bias in (block.attention["self"].key.bias, block.intermediate["dense"].bias, head.bias):
        assert not bias.any()
    table = model.roformer.encoder["embed_positions"].weight
    angle = torch.tensor(9.0).double() * 10000 ** (-torch.arange(16).double() / 16)
    torch.testing.assert_close(table[9].double(), torch.cat([angle.sin(), angle.cos()]), rtol=0, atol=1e-7)


def test_state_dict_round_trip():
    ids, types, _ = _ids()
    for make in (nn.RoFormerEncoder, nn.RoFormerForSeq2Seq):
        model, other = _make(make, embedding_size=6), _make(make, embedding_size=6)
        other.load_state_dict(model.state_dict())
        copied = copy.deepcopy(model)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)
            assert torch.equal(copied.state_dict()[name], value)
    output = model(ids, types)[0]
    assert torch.equal(other(ids, types)[0], output)
    assert torch.equal(copied(ids, types)[0], output)
    with torch.device("meta"):
        assert {value.device.type for value in _make(make).state_dict().values()} == {"meta"}
    with torch.device("meta"):
        empty = make(**SMALL | STILL, embedding_size=6)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(ids, types)[0], output)


def test_weights_that_are_not_shared_do_not_load():
    model = torch.nn.ModuleDict({"model": _make(nn.RoFormerForSeq2Seq)})
    state = model.state_dict()
    model.load_state_dict(state)
    state["model.cls.predictions.decoder.weight"] = torch.zeros(VOCAB, C)
    message = "model.cls.predictions.decoder.weight must equal model.roformer.embeddings.word_embeddings.weight"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_every_parameter_gets_a_gradient():
    model = _make(nn.RoFormerForSeq2Seq, embedding_size=6)
    ids, types, _ = _ids()
    model(ids, types, labels=ids)[1].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_compile():
    """In one graph, forward and backward."""
    model = _make(nn.RoFormerForSeq2Seq, rotary_value=True)
    ids, types, _ = _ids()

    def call(model):
        return model(ids, types, labels=ids, lengths=LENGTHS)[1]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_run(compiled, model), _run(call, model))


def test_autocast():
    """Products are bfloat16; the norms and what follows them stay float32, and so do the parameters' gradients."""
    model = _make(rotary_value=True)
    ids, types, tokens = _ids()
    padded = tokens[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        _check(model, lambda m: m(ids, tokens, types), lambda m: _encoder(m, ids, types, padded, rotary_value=True))
        assert model(ids).dtype == torch.float32


def test_dropout():
    """Behind the embeddings and the sublayers, of the attention's weights, and only in training."""
    ids, _, _ = _ids()
    for named in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        model = _make(**named)
        assert not torch.allclose(model(ids), model(ids), rtol=1e-3)
        assert torch.equal(model.eval()(ids), model(ids))


# Wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.RoFormerEncoder(embed_dim=20, num_heads=3), "num_heads must divide the 20 channels, got 3"),
        (
            lambda: nn.RoFormerEncoder(embed_dim=9, num_heads=3),
            "embed_dim must be an even multiple of num_heads = 3, got 9",
        ),
        (lambda: nn.RoFormerBlock(8, 2, activation="tanh"), "activation must be one of 'gelu', 'gelu_tanh', "),
        (lambda: nn.RoFormerBlock(8, 3), "num_heads must divide the 8 channels, got 3"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"input_ids": torch.ones(S).long()}, ValueError, "input_ids must be [B, S], got [8]"),
        ({"input_ids": torch.ones(B, S)}, TypeError, "input_ids must be int32 or int64, got float32"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a Tensor, got list"),
        (
            {"input_ids": torch.ones(1, 11).long()},
            ValueError,
            "input_ids must be [B, S] with S ≤ max_seq_len = 10, got [1, 11]",
        ),
        (
            {"attention_mask": torch.ones(B, 4)},
            ValueError,
            "attention_mask must be shaped as input_ids, [3, 8], got [3, 4]",
        ),
        ({"token_type_ids": torch.ones(B, 4).int()}, ValueError, "token_type_ids must be shaped as input_ids, [3, 8]"),
        ({"token_type_ids": torch.ones(B, S)}, TypeError, "token_type_ids must be int32 or int64, got float32"),
        ({"prefix_len": torch.tensor([1, 2])}, ValueError, "prefix_len must be [3]"),
        ({"prefix_len": torch.tensor([1, 2, 9])}, ValueError, "prefix_len must be in 0..8"),
        (
            {"attention_mask": torch.ones(B, S), "lengths": LENGTHS},
            ValueError,
            "attention_mask must be None where lengths are given",
        ),
    ],
)
def test_wrong_input(named, error, message):
    model = _make()
    with pytest.raises(error, match=re.escape(message)):
        model(**{"input_ids": torch.ones(B, S).long()} | named)


def test_seq2seq_needs_to_know_the_source():
    model, ids = _make(nn.RoFormerForSeq2Seq), torch.ones(B, S).long()
    with pytest.raises(ValueError, match="prefix_len must be given where token_type_ids is None, got None"):
        model(ids)
    with pytest.raises(ValueError, match=re.escape("labels must be shaped as input_ids, [3, 8], got [3, 7]")):
        model(ids, ids, labels=ids[:, 1:])
