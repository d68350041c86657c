"""fastmix.nn.RoFormerSim: vectors, logits and losses against its parts, padding, training, generation, errors."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from fastmix import Trie, nn
from fastmix.generation import trie_beam_search
from fastmix.losses import in_batch_similarity_loss

B, S, C, VOCAB, EOS = 3, 8, 16, 11, 10
SMALL = {"vocab_size": VOCAB, "embed_dim": C, "num_blocks": 2, "num_heads": 2, "max_seq_len": 16}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}
FIRST, LENGTHS = torch.tensor([3, 1, 5]), torch.tensor([S, 4, 6])  # of the first sentences, and of the pairs
POOLINGS = ("cls", "linear", "mean")


def _make(pooling="cls", **named):
    """With parameters that are neither 0 nor 1, so that none of them goes unnoticed."""
    model = nn.RoFormerSim(pooling=pooling, **SMALL | STILL | named)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _pairs():
    """Token ids and types, with padding behind the pairs, and labels of the second sentences."""
    place = torch.arange(S)
    tokens, types = place < LENGTHS[:, None], (place >= FIRST[:, None]) & (place < LENGTHS[:, None])
    ids = torch.randint(1, VOCAB, (B, S)) * tokens
    return ids, types.long(), ids.masked_fill(~types, -100)


def _pooled(model, x, chosen):
    """By the definition, of one sentence's tokens: x [S, C], chosen bool [S]."""
    x = x[chosen]
    pooled = x.mean(dim=0) if model.pooling == "mean" else x[0]
    return model.pooler.weight @ pooled + model.pooler.bias if model.pooling == "linear" else pooled


# One pass


@pytest.mark.parametrize("pooling", POOLINGS)
def test_forward(pooling):
    """Logits and loss of the sequence-to-sequence model, which sees UniLM's mask in full, and the pooled vectors."""
    model = _make(pooling).double()
    ids, types, labels = _pairs()
    output = model(ids, types, labels=labels)
    seq2seq = nn.RoFormerForSeq2Seq(**SMALL | STILL).double()
    seq2seq.load_state_dict({name: value for name, value in model.state_dict().items() if "pooler" not in name})
    logits, loss = seq2seq(ids, types, labels=labels)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, loss)
    assert model(ids, types).loss is None
    rows, columns = torch.arange(S)[:, None], torch.arange(S)
    for b in range(B):
        dense = ((columns <= rows) | (columns < FIRST[b]))[None, None]
        x = _encode_dense(model.roformer, ids[b : b + 1], types[b : b + 1], dense)[0]
        expected = _pooled(model, x, torch.arange(S) < FIRST[b])
        torch.testing.assert_close(output.vectors[b], expected / expected.norm())


def _encode_dense(encoder, ids, types, mask):
    x = encoder.embeddings(ids, types)
    rotary = encoder.encoder["embed_positions"](S)
    for block in encoder.encoder["layer"]:
        x = block(x, rotary, attn_mask=mask)
    return x


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_is_that_of_the_sentence_alone(pooling):
    """Whatever its partner and the padding are, given by lengths, by a mask, or by none."""
    model = _make(pooling).double()
    ids, types, _ = _pairs()
    alone = torch.cat([model.encode(ids[b : b + 1, :n]) for b, n in enumerate(FIRST)])
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(B).double())
    raw = model.encode(ids, lengths=FIRST, normalize=False)
    torch.testing.assert_close(F.normalize(raw), alone)
    assert not torch.allclose(raw, alone)
    other = torch.where(torch.arange(S) < FIRST[:, None], ids, VOCAB - 1)
    first = torch.arange(S) < FIRST[:, None]
    tokens = torch.arange(S) < LENGTHS[:, None]
    for vectors in (
        model(ids, types).vectors,
        model(other, types).vectors,
        model(ids, prefix_len=FIRST.int(), token_type_ids=types, lengths=LENGTHS.int()).vectors,
        model(ids, types, attention_mask=tokens).vectors,
        model(ids, torch.zeros_like(types), lengths=FIRST).vectors,  # no second sentence
        model.encode(other, lengths=FIRST),
        model.encode(other, attention_mask=first.int()),
        model.encode(F.pad(other, (2, 0)), attention_mask=F.pad(first, (2, 0))),
    ):
        torch.testing.assert_close(vectors, alone)


def test_padding_reaches_nothing():
    """Neither loss, vectors, nor gradients."""
    model = _make("mean").double()
    ids, types, labels = _pairs()

    def run(ids):
        output = model(ids, types, labels=labels, lengths=LENGTHS)
        loss = output.loss + in_batch_similarity_loss(output.vectors, torch.tensor([1, 2, 0]))
        return output.vectors, loss, torch.autograd.grad(loss, list(model.parameters()))

    other = torch.where(torch.arange(S) < LENGTHS[:, None], ids, 5)
    torch.testing.assert_close(run(other), run(ids))


def test_every_parameter_gets_a_gradient():
    model = _make("linear")
    ids, types, labels = _pairs()
    output = model(ids, types, labels=labels)
    (output.loss + in_batch_similarity_loss(output.vectors, torch.tensor([1, 2, 0]))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_row_without_a_first_sentence():
    """Its vector is 0, and gradients are finite; so it is with an empty batch."""
    model = _make()
    ids, types, labels = _pairs()
    output = model(ids, types, torch.tensor([3, 0, 5]), labels)
    assert not output.vectors[1].any()
    in_batch_similarity_loss(output.vectors, torch.tensor([1, 2, 0])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    output = model(ids[:0], types[:0])
    assert output.logits.shape == (0, S, VOCAB)
    assert output.vectors.shape == model.encode(ids[:0]).shape == (0, C)


def test_training_lowers_both_losses():
    model = nn.RoFormerSim(**SMALL | STILL | {"embed_dim": 32, "num_blocks": 1})
    sentences = torch.tensor([[1, 2, 3], [3, 2, 1], [4, 5, 6], [6, 5, 4], [7, 8, 9], [9, 8, 7]])
    ids = torch.cat([sentences, sentences[torch.arange(6) ^ 1]], dim=1)  # pairs in both orders
    types = (torch.arange(6) >= 3).long().expand(6, 6)
    labels = ids.masked_fill(types == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(50):
        output = model(ids, types, labels=labels)
        losses = output.loss, in_batch_similarity_loss(output.vectors)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([loss.item() for loss in losses])
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.1 * history[0][1]
    # What it writes is the partner, and the nearest sentence is it too.
    written = model.eval().generate(sentences, max_length=3, eos_token_id=EOS)
    assert torch.equal(written[:, 0], ids[:, 3:])
    vectors = model.encode(sentences).detach()
    nearest = (vectors @ vectors.mT).fill_diagonal_(-1).argmax(dim=1)
    assert torch.equal(nearest, torch.arange(6) ^ 1)


# Modules


def test_calls_its_op(recorded, assert_kernel):
    model = _make()
    ids, types, _ = _pairs()
    with recorded() as ops:
        model(ids, types)
    assert_kernel(ops, "scaled_attention")
    assert len(ops) in (0, len(model.roformer.encoder["layer"]))  # one pass for both


def test_state_dict():
    """That of the sequence-to-sequence model; a linear pooling adds a layer, and nothing else does."""
    seq2seq = nn.RoFormerForSeq2Seq(**SMALL)
    assert nn.RoFormerSim(**SMALL).load_state_dict(seq2seq.state_dict()) == ([], [])
    model = nn.RoFormerSim(pooling="linear", **SMALL)
    missing, unexpected = model.load_state_dict(seq2seq.state_dict(), strict=False)
    assert (missing, unexpected) == (["pooler.weight", "pooler.bias"], [])
    assert not model.pooler.bias.any()
    other = nn.RoFormerSim(pooling="linear", **SMALL)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.pooler.weight, model.pooler.weight)


def test_compile():
    """Both losses in one graph, forward and backward."""
    model = _make("linear", num_blocks=1)
    ids, types, labels = _pairs()

    def call():
        output = model(ids, types, labels=labels, lengths=LENGTHS)
        return output.loss + in_batch_similarity_loss(output.vectors, torch.tensor([1, 2, 0]))

    found, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(), call()
    parameters = list(model.parameters())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision(pooling):
    """Vectors are float32, under autocast and of a bfloat16 model, and near those of float32."""
    model = _make(pooling)
    ids, types, labels = _pairs()
    expected = model(ids, types).vectors
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, types, labels=labels)
    (output.loss + output.vectors.sum()).backward()
    for vectors in (output.vectors, model.bfloat16()(ids, types).vectors):
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(B))
        assert (F.cosine_similarity(vectors, expected) > 0.99).all()


# Generation


@torch.no_grad()
def _score(model, source, answer):
    """Σ log p of an answer, by the model's own forward."""
    ids = torch.tensor([[*source, *answer]])
    types = (torch.arange(ids.shape[1]) >= len(source)).long()[None]
    log_probs = model(ids, types).logits[0].log_softmax(dim=1)
    return sum(float(log_probs[len(source) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("fast_forward", [False, True])
def test_beam_search_over_a_trie(fast_forward):
    """Every key's score is that of the model's forward, for sources of any length behind each other."""
    model = _make().double().eval()
    ids, _, _ = _pairs()
    keys = [[1, 2, 3], [1, 4], [5], [6, 7, 8, 9]]
    step = model.step_fn(ids.int(), FIRST.int())
    named = {"num_beams": len(keys), "max_length": 5, "eos_token_id": EOS, "length_penalty": 0.0}
    found = trie_beam_search(step, Trie.from_sequences(keys), **named, fast_forward=fast_forward)
    for b, length in enumerate(FIRST):
        source = ids[b, :length].tolist()
        expected = sorted(((_score(model, source, [*key, EOS]), key) for key in keys), reverse=True)
        torch.testing.assert_close(found.scores[b].tolist(), [score for score, _ in expected])
        for row, (_, key) in zip(found.sequences[b].tolist(), expected, strict=True):
            assert row[: len(key) + 1] == [*key, EOS]


def test_greedy_generation():
    """The likeliest token each time, up to EOS; padding changes nothing."""
    model = _make().double().eval()
    ids, _, _ = _pairs()
    written = model.generate(ids, FIRST, max_length=6, eos_token_id=EOS)
    assert written.dtype == torch.int64
    for b, length in enumerate(FIRST):
        answer = []
        while len(answer) < written.shape[2] and (not answer or answer[-1] != EOS):
            row = torch.tensor([[*ids[b, :length].tolist(), *answer]])
            types = (torch.arange(row.shape[1]) >= length).long()[None]
            answer.append(int(model(row, types).logits[0, -1].argmax()))
        assert written[b, 0].tolist() == answer + [EOS] * (written.shape[2] - len(answer))
    other = torch.where(torch.arange(S) < FIRST[:, None], ids, 5)
    assert torch.equal(model.generate(other, FIRST, max_length=6, eos_token_id=EOS), written)
    assert model.generate(ids[:0], max_length=6, eos_token_id=EOS).shape == (0, 1, 1)


def test_generation_stops_at_eos():
    model = _make()
    with torch.no_grad():
        model.cls["predictions"].bias[EOS] = 100.0
    ids, _, _ = _pairs()
    assert torch.equal(model.generate(ids, max_length=6, eos_token_id=EOS), torch.full((B, 1, 1), EOS))


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 0.7), (0.6, 1.0)])
def test_sampling(top_p, temperature):
    """The shares of 4,000 answers of two tokens are their probabilities; the seed decides."""
    model, num = _make().double().eval(), 4000
    source = torch.tensor([[3, 1]])
    named = {"max_length": 2, "eos_token_id": EOS, "num_return_sequences": num, "do_sample": True}
    named |= {"top_p": top_p, "temperature": temperature}

    def draw():
        return model.generate(source, **named, generator=torch.Generator().manual_seed(0))[0]

    written = draw()
    assert torch.equal(draw(), written)

    @torch.no_grad()
    def probs(answer):
        row = torch.tensor([[3, 1, *answer]])
        types = (torch.arange(row.shape[1]) >= 2).long()[None]
        values, order = (model(row, types).logits[0, -1] / temperature).softmax(dim=0).sort(descending=True)
        kept = next(n for n in itertools.count(1) if n == VOCAB or values[:n].sum() >= top_p)
        return {
            int(token): float(value / values[:kept].sum())
            for token, value in zip(order[:kept], values[:kept], strict=True)
        }

    expected = torch.zeros(VOCAB, VOCAB)
    for first, share in probs([]).items():
        following = {EOS: 1.0} if first == EOS else probs([first])
        for second, other in following.items():
            expected[first, second] = share * other
    shares = torch.bincount(written[:, 0] * VOCAB + written[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB) / num
    assert not shares[expected == 0].any()
    deviation = (expected * (1 - expected) / num).sqrt()
    assert ((shares - expected).abs() <= 5 * deviation + 1 / num).all()


# Wrong input


def test_wrong_pooling():
    with pytest.raises(ValueError, match=r"pooling must be one of 'cls', 'linear', 'mean', got 'max'"):
        nn.RoFormerSim(pooling="max", **SMALL)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({}, ValueError, "prefix_len must be given where token_type_ids is None"),
        ({"token_type_ids": torch.ones(B, 2).long()}, ValueError, "token_type_ids must be shaped as input_ids, [3, 8]"),
        ({"token_type_ids": torch.ones(B, S)}, TypeError, "token_type_ids must be int32 or int64, got float32"),
        (
            {"prefix_len": FIRST, "attention_mask": torch.ones(B, S), "lengths": LENGTHS},
            ValueError,
            "attention_mask must be None where lengths are given",
        ),
        ({"prefix_len": FIRST, "labels": torch.ones(B, 2).long()}, ValueError, "labels must be shaped as input_ids"),
    ],
)
def test_wrong_pairs(named, error, message):
    with pytest.raises(error, match=re.escape(message)):
        _make()(torch.ones(B, S).long(), **named)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"input_ids": torch.ones(B, S)}, TypeError, "input_ids must be int32 or int64, got float32"),
        ({"lengths": torch.tensor([3, 0, 2])}, ValueError, "lengths must be in 1..8, got values from 0 to 3"),
        ({"lengths": torch.tensor([3, 9, 2])}, ValueError, "lengths must be in 1..8, got values from 2 to 9"),
        ({"lengths": torch.tensor([3])}, ValueError, "lengths must be [3], got [1]"),
        ({"lengths": torch.ones(B)}, TypeError, "lengths must be int32 or int64, got float32"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length must be an int, got float"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences must be 1 without do_sample, got 2"),
        ({"eos_token_id": VOCAB}, ValueError, "eos_token_id must be in 0..10, got 11"),
        ({"top_p": 0.0}, ValueError, "top_p must be in (0, 1], got 0.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"max_length": 10, "eos_token_id": 0}, ValueError, "[B, S] with S ≤ max_seq_len = 16, got [3, 17]"),
    ],
)
def test_wrong_generation(named, error, message):
    model = _make()
    with torch.no_grad():
        model.cls["predictions"].bias[0] = -100.0  # never drawn
    with pytest.raises(error, match=re.escape(message)):
        model.generate(**{"input_ids": torch.ones(B, S).long(), "max_length": 3, "eos_token_id": EOS} | named)
