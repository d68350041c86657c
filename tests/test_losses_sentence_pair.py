"""fastmix.losses on sentence pairs, against the formulas written out; groups, autocast, compilation, errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from fastmix.losses import SentencePairHead, in_batch_similarity_loss, similarity_distillation_loss

B, D = 6, 5
GROUP = torch.tensor([0, 1, 1, 0, 1, 0])
LABELS = torch.tensor([1, 2, 4, 0, 3, 1])  # columns 0–1 of group 0, 2–4 of group 1


def _vectors(*shape, **named):
    return torch.randn(*shape, dtype=torch.float64, **named)


# The head


def test_head():
    head = SentencePairHead(D).double()
    u, v = _vectors(B, D), _vectors(B, D)
    weight = head.dense.weight
    expected = u @ weight[:, :D].T + v @ weight[:, D : 2 * D].T + (u - v).abs() @ weight[:, 2 * D :].T
    torch.testing.assert_close(head(u, v), expected)
    assert list(head.state_dict()) == ["dense.weight"]
    assert weight.shape == (5, 3 * D)


def test_cross_entropy_of_the_row_is_that_of_the_group():
    """Value and gradients."""
    head = SentencePairHead(D).double()
    u, v = _vectors(B, D, requires_grad=True), _vectors(B, D, requires_grad=True)
    inputs = [u, v, head.dense.weight]
    loss = F.cross_entropy(head(u, v, GROUP), LABELS)
    logits = head(u, v)
    picked = [
        F.cross_entropy(logits[i, :2] if g == 0 else logits[i, 2:], label if g == 0 else label - 2)
        for i, (g, label) in enumerate(zip(GROUP, LABELS, strict=True))
    ]
    expected = torch.stack(picked).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_the_columns_of_other_groups():
    """−1e12 where they were, the rest as without groups; any number of groups, of any size."""
    head = SentencePairHead(D, [1, 3, 2])
    u, v = torch.randn(3, D), torch.randn(3, D)
    mine = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    for dtype in (torch.int32, torch.int64):
        expected = head(u, v).masked_fill(~mine, -1e12)
        assert torch.equal(head(u, v, torch.tensor([2, 0, 1], dtype=dtype)), expected)


@pytest.mark.parametrize(("dtype", "low"), [(torch.bfloat16, -1e12), (torch.float16, -65504.0)])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, low, autocast):
    """Finite, and with no share in the softmax."""
    head, u, v = SentencePairHead(D), torch.randn(B, D), torch.randn(B, D)
    if not autocast:
        head, u, v = head.to(dtype), u.to(dtype), v.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        logits = head(u, v, GROUP)
        loss = F.cross_entropy(logits, LABELS)
    assert logits.dtype == dtype
    assert torch.equal(logits.min(), torch.tensor(low, dtype=dtype))
    assert loss.isfinite()
    assert not logits.softmax(dim=1)[GROUP == 0, 2:].any()


def test_empty_batch():
    head, empty = SentencePairHead(D), torch.randn(0, D)
    assert head(empty, empty, torch.zeros(0).long()).shape == (0, 5)
    assert in_batch_similarity_loss(empty).isnan()
    assert similarity_distillation_loss(empty, empty).isnan()


# Similarities


def _cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("partner", [None, torch.tensor([3, 5, 0, 1, 2, 4])])
def test_in_batch_similarity(partner):
    vectors = _vectors(B, D)
    rows = vectors.tolist()
    places = [1, 0, 3, 2, 5, 4] if partner is None else partner.tolist()
    expected = 0.0
    for i, place in enumerate(places):
        scores = [math.exp(7 * _cosine(rows[i], rows[j])) for j in range(B) if j != i]
        expected -= math.log(math.exp(7 * _cosine(rows[i], rows[place])) / sum(scores)) / B
    found = in_batch_similarity_loss(vectors, partner, scale=7.0)
    torch.testing.assert_close(found, torch.tensor(expected).double())
    torch.testing.assert_close(in_batch_similarity_loss(3 * vectors, partner, scale=7.0), found)
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: in_batch_similarity_loss(x, partner), vectors)


def test_two_vectors_have_no_negatives():
    torch.testing.assert_close(in_batch_similarity_loss(_vectors(2, D)), torch.tensor(0.0).double())


def test_distillation():
    """The sizes of the vectors may differ; no gradient reaches the teacher."""
    student, teacher = _vectors(B, D, requires_grad=True), _vectors(B, 3, requires_grad=True)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    pairs = [_cosine(s, other_s) - _cosine(t, other_t) for s, t in rows for other_s, other_t in rows]
    loss = similarity_distillation_loss(student, teacher)
    torch.testing.assert_close(loss.detach(), torch.tensor(100 * sum(p * p for p in pairs) / B**2).double())
    torch.testing.assert_close(similarity_distillation_loss(student, teacher, scale=1.0), loss / 100)
    loss.backward()
    assert student.grad.any()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: similarity_distillation_loss(x, teacher.detach()), student)
    torch.testing.assert_close(similarity_distillation_loss(student, 2 * student.detach()).item(), 0.0)


def _losses():
    teacher = torch.randn(B, 3)
    return [in_batch_similarity_loss, lambda x: similarity_distillation_loss(x, teacher.to(x.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_of_zeros(dtype):
    """Similar to none, themselves included, with finite gradients."""
    vectors = torch.randn(B, D).to(dtype)
    vectors[2] = 0
    for loss in _losses():
        x = vectors.clone().requires_grad_()
        loss(x).backward()
        assert x.grad.isfinite().all()
    zeros = torch.zeros(B, D, dtype=dtype)
    torch.testing.assert_close(in_batch_similarity_loss(zeros).item(), math.log(B - 1))
    torch.testing.assert_close(similarity_distillation_loss(zeros, torch.eye(B)).item(), 100 / B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_are_float32(dtype):
    """For half vectors, and under autocast: as computed of the same vectors in float32."""
    vectors = torch.randn(B, D).to(dtype)
    for loss in _losses():
        expected = loss(vectors.float())
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(loss(vectors.float()), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        found = in_batch_similarity_loss(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, in_batch_similarity_loss(vectors.float()), rtol=0, atol=0)


def test_compile():
    """All of them in one graph, forward and backward; similarities in float32 under autocast too."""
    head = SentencePairHead(D)
    u, v = torch.randn(B, D, requires_grad=True), torch.randn(B, D, requires_grad=True)

    def call(u, v):
        classes = F.cross_entropy(head(u, v, GROUP), LABELS)
        return classes + in_batch_similarity_loss(u) + similarity_distillation_loss(u, v)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(u, v), call(u, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [u, v]), torch.autograd.grad(expected, [u, v]))
    expected = similarity_distillation_loss(u, v)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(similarity_distillation_loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(u, v), expected)


def test_meta():
    with torch.device("meta"):
        head = SentencePairHead(D)
        assert head(torch.randn(B, D), torch.randn(B, D)).shape == (B, 5)
    head.load_state_dict(SentencePairHead(D).state_dict(), assign=True)
    assert head(torch.randn(B, D), torch.randn(B, D), GROUP).shape == (B, 5)


# Wrong input


@pytest.mark.parametrize("sizes", [(), (2, 0), (2.0, 3)])
def test_wrong_group_sizes(sizes):
    with pytest.raises(ValueError, match="group_sizes must be one or more positive ints, got"):
        SentencePairHead(D, sizes)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"u": torch.ones(B, 4)}, ValueError, "u must be [B, 5], got [6, 4]"),
        ({"u": torch.ones(D)}, ValueError, "u must be [B, 5], got [5]"),
        ({"u": torch.ones(B, D).long()}, TypeError, "u must be float32, bfloat16, float16 or float64, got int64"),
        ({"v": torch.ones(1, D)}, ValueError, "v must be shaped as u, [6, 5], got [1, 5]"),
        ({"v": torch.ones(B, D).double()}, TypeError, "v must be float32 as u is, got float64"),
        ({"v": None}, TypeError, "v must be a Tensor, got NoneType"),
        ({"group": torch.ones(B)}, TypeError, "group must be int32 or int64, got float32"),
        ({"group": [0] * B}, TypeError, "group must be a Tensor, got list"),
        ({"group": torch.tensor([0, 1])}, ValueError, "group must be [6], got [2]"),
        ({"group": torch.tensor([0, 1, 2, 0, 0, 0])}, ValueError, "group must be in 0..1, got values from 0 to 2"),
        ({"group": torch.tensor([0, 1, -1, 0, 0, 0])}, ValueError, "group must be in 0..1, got values from -1 to 1"),
    ],
)
def test_wrong_pairs(named, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SentencePairHead(D)(**{"u": torch.ones(B, D), "v": torch.ones(B, D)} | named)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([torch.ones(B)], ValueError, "vectors must be [B, D], got [6]"),
        ([torch.ones(B, D).int()], TypeError, "vectors must be float32, bfloat16, float16 or float64, got int32"),
        ([torch.ones(3, D)], ValueError, "vectors must be an even number without partner, got [3, 5]"),
        ([torch.ones(2, D), torch.tensor([1, 2])], ValueError, "partner must be in 0..1, got values from 1 to 2"),
        (
            [torch.ones(3, D), torch.tensor([1, 1, 0])],
            ValueError,
            "partner must be another than the vector itself, got 1 for vector 1",
        ),
        ([torch.ones(2, D), torch.tensor([1.0, 0.0])], TypeError, "partner must be int32 or int64, got float32"),
    ],
)
def test_wrong_vectors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        in_batch_similarity_loss(*arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.ones(B), torch.ones(B, D), ValueError, "student must be [B, D], got [6]"),
        (torch.ones(B, D), torch.ones(1, B, D), ValueError, "teacher must be [B, D], got [1, 6, 5]"),
        (torch.ones(B, D), torch.ones(2, D), ValueError, "teacher must be [6, D], one row for each of student, got"),
        (torch.ones(B, D), torch.ones(B, D).long(), TypeError, "teacher must be float32, bfloat16, float16 or float64"),
        (torch.ones(B, D), torch.ones(B, D, device="meta"), ValueError, "teacher must be on the device of student"),
    ],
)
def test_wrong_teacher(student, teacher, error, message):
    with pytest.raises(error, match=re.escape(message)):
        similarity_distillation_loss(student, teacher)
