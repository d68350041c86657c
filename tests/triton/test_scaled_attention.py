"""Scaled attention in Triton's interpreter, which serves fp32 and fp16 (its bfloat16 arithmetic is wrong)."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import fastmix
from fastmix.ops import scaled_attention as ops
from fastmix.reference import scaled_attention as reference
from fastmix.testing import scaled_attention as shared
from fastmix.testing.cases import check_case
from fastmix.testing.scaled_attention import PACKED, changed, scaled_attention_case
from tritonkernels import scaled_attention as kernels
from tritonkernels._attention_call import MAX_HEAD_SIZE

INPUTS = ("query", "key", "value")


class _Attention(torch.autograd.Function):
    """What the op does on a GPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = ops._scaled_attention_cuda(*inputs)
        ops._save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return ops._backward(ctx, *grads)


def _call(op, *arguments):
    if op is torch.ops.fastmix.scaled_attention_bwd.default:
        return ops._scaled_attention_bwd_cuda(*arguments)
    return _Attention.apply(*arguments)


@pytest.fixture(autouse=True)
def _kernels_answer(monkeypatch):
    monkeypatch.setattr(ops, "kernel_answers", lambda *_: True)
    monkeypatch.setattr(ops, "call", _call)
    empty = torch.empty

    def filled(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", filled)
    matmul = np.matmul

    def exact(a, b, dtype):
        """In what order a GPU adds a product's terms is its own affair."""
        return matmul(a, b, dtype=np.float64).astype(dtype)

    monkeypatch.setattr(np, "matmul", exact)


def _quarters(x):
    return (4 * x).round() / 4


def _exact(x):
    """What has float32 products, all 1024 larger by the first channel: then all rounding is that of the softmax."""
    return torch.cat([torch.full_like(x[..., :1], 32), _quarters(x[..., 1:])], dim=3)


EXACT = {"query": _exact, "key": _exact}
BOTTOM = {"causal_alignment": "bottom_right"}
# Of 150 queries and 200 keys some tiles are skipped, some whole, some masked.
CASES = [
    scaled_attention_case("plain", (2, 4, 37, 70, 24), kv_heads=2, value_size=20, return_lse=True),
    scaled_attention_case("causal, rotary", (1, 1, 150, 200, 8), is_causal=True, rotary=6, **BOTTOM),
    scaled_attention_case("prefix, query_scale", (2, 1, 150, 150, 8), prefix_len=[40, 131], query_scale="BT"),
    scaled_attention_case("padding", (3, 1, 40, 150, 8), is_causal=True, key_start=[0, 120, 60],
                          key_lengths=[150, 130, 70], query_lengths=[40, 30, 0], return_lse=True, **BOTTOM),
    scaled_attention_case("window", (1, 1, 150, 200, 8), window_size=(90, 60), scale=-0.3),
    scaled_attention_case("relative bias", (1, 1, 150, 200, 8), buckets=8, max_distance=9, return_lse=True,
                          **BOTTOM),
    scaled_attention_case("relative bias, lengths", (2, 2, 70, 40, 8), buckets=8, bidirectional=False, max_distance=20,
                          is_causal=True, key_lengths=[40, 25], query_lengths=[33, 70], **BOTTOM),
    scaled_attention_case("mask, dropout", (2, 2, 33, 70, 8), mask="-inf", mask_shape=(2, 33, 70), dropout_p=0.3,
                          dropout_seed=2**40 + 3, return_lse=True),
    scaled_attention_case("bool mask", (2, 2, 33, 70, 8), mask="bool", mask_shape=(2, 1, 1, 70)),
    scaled_attention_case("packed", (1, 2, 67, 120, 8), kv_heads=1, **PACKED, **BOTTOM, is_causal=True,
                          prefix_len=[4, 3, 0, 60, 11], rotary=8, interleaved=False, positions=True, buckets=8,
                          query_scale="T", dropout_p=0.1, dropout_seed=-7),
    scaled_attention_case("packed, mask", (1, 2, 20, 50, 8), cu_seqlens_q=[0, 7, 19], cu_seqlens_k=[0, 11, 50],
                          mask="-inf", mask_shape=(2, 20, 50), dropout_p=0.1, dropout_seed=9, window_size=(5, 20)),
]  # fmt: skip
SMALL_CASES = [
    *(
        scaled_attention_case(f"mask {shape}", (2, 2, 20, 40, 8), mask="float", mask_shape=shape, fixed=INPUTS,
                              return_lse=True)
        for shape in [(20, 1), (2, 1, 1, 40), (1,)]
    ),
    scaled_attention_case("one query", (2, 4, 1, 700, 16), kv_heads=2, fixed=INPUTS),
    scaled_attention_case("few queries", (2, 4, 3, 600, 16), kv_heads=2, fixed=(*INPUTS, "bias_weight", "attn_mask"),
                          rotary=16, buckets=8, mask="-inf", mask_shape=(2, 1, 3, 600), dropout_p=0.2, dropout_seed=3,
                          key_lengths=[600, 30], window_size=(580, -1), query_scale="BT", return_lse=True, **BOTTOM),
    scaled_attention_case("few queries, exact", (1, 2, 2, 600, 8), scale=1.0, change=changed(**EXACT)),
    scaled_attention_case("exact", (1, 2, 70, 40, 8), scale=1.0, change=changed(**EXACT)),
    scaled_attention_case("exact, mask", (1, 2, 20, 40, 8), scale=1.0, mask="float", mask_shape=(20, 40),
                          change=changed(**EXACT, attn_mask=_quarters)),
    scaled_attention_case("one channel", (1, 2, 5, 3, 1)),
    scaled_attention_case("scale 0", (1, 2, 5, 9, 3), scale=0.0, is_causal=True),
    scaled_attention_case("expanded", (2, 2, 20, 40, 8), kv_heads=1, return_lse=True, change=changed(
        query=lambda x: x[:1, :1, :1].expand(x.shape), value=lambda x: x.mT.contiguous().mT)),
    scaled_attention_case("no keys", (2, 2, 5, 0, 8), buckets=8, mask="float", mask_shape=(2, 1, 1), return_lse=True),
    scaled_attention_case("no queries", (2, 2, 0, 5, 8), return_lse=True),
    scaled_attention_case("empty batch", (0, 2, 5, 7, 8), query_scale="T", return_lse=True),
    scaled_attention_case("no sequence", (1, 2, 33, 70, 8), cu_seqlens_q=[0, 0], cu_seqlens_k=[0, 0], return_lse=True),
]  # fmt: skip


# A third of the cases that all kernels share, and those where rounding of the log-sum-exp shows most.
ROUNDED = ("one key", "3x200x16", "large logits")
SHARED_CASES = [
    case
    for i, case in enumerate(shared.CASES)
    if (i % 3 == 1 or case.name.endswith(ROUNDED)) and not case.name.endswith("x300")
]


@pytest.mark.parametrize("case", CASES + SMALL_CASES, ids=str)
def test_parity(case):
    check_case(case, torch.float32)


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_parity_of_shared_cases(case):
    check_case(case, torch.float32)


@pytest.mark.parametrize("case", [*CASES[::3], *SMALL_CASES[1:4]], ids=str)
def test_parity_in_float16(case):
    check_case(case, torch.float16)


def _draw(*sizes):
    return [torch.randn(size, requires_grad=True) for size in sizes]


def _with_nan(x, *places):
    x = x.detach().clone()
    for place in places:
        x[place] = float("nan")
    return x.requires_grad_()


def test_nan_of_padding_reaches_nothing():
    lengths = {"query_lengths": torch.tensor([30, 9]), "key_lengths": torch.tensor([40, 17])}
    mask = torch.ones(40, dtype=torch.bool)
    mask[5] = False
    inputs = _draw((2, 2, 30, 8), (2, 1, 40, 8), (2, 1, 40, 8))
    keys = ((1, slice(None), slice(17, None)), (slice(None), slice(None), 5))
    poisoned = [_with_nan(inputs[0], (1, slice(None), slice(9, None))), *(_with_nan(x, *keys) for x in inputs[1:])]
    results = []
    for tensors in (inputs, poisoned):
        output = fastmix.scaled_attention(*tensors, mask, is_causal=True, **lengths)
        grad = torch.ones_like(output)
        grad[1, :, 9:] = float("nan")
        results.append([output, *torch.autograd.grad(output, tensors, grad)])
    for clean, other in zip(*results, strict=True):
        assert other.isfinite().all()
        assert torch.equal(clean, other)


def test_nan_of_a_value_reaches_the_rows_that_attend_to_it():
    query, key, value = _draw((1, 1, 150, 8), (1, 1, 150, 8), (1, 1, 150, 8))
    clean = fastmix.scaled_attention(query, key, value, is_causal=True)
    output = fastmix.scaled_attention(query, key, _with_nan(value, (0, 0, 100)), is_causal=True)
    assert torch.equal(output[:, :, :100], clean[:, :, :100])
    assert output[:, :, 100:].isnan().all()


def test_rows_of_nothing():
    inputs = _draw((1, 2, 6, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    mask = torch.zeros(6, 9).index_fill(0, torch.tensor([0, 4]), -torch.inf).requires_grad_()
    output, lse = fastmix.scaled_attention(*inputs, mask, return_lse=True)
    grads = torch.autograd.grad(output.sum() + lse[lse.isfinite()].sum(), [*inputs, mask])
    assert (output[:, :, [0, 4]] == 0).all()
    assert (lse[:, :, [0, 4]] == -torch.inf).all()
    assert (grads[0][:, :, [0, 4]] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_results_lie_as_the_op_promises():
    query, key, value = _draw((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3))
    output = fastmix.scaled_attention(query, key, value)
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_fake_gives_the_kernels_shapes(dtype):
    sizes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)]
    arguments = reference.op_arguments(*(torch.ones(size, dtype=dtype) for size in sizes), None, 0.0, False, None)
    results = ops._scaled_attention_cuda(*arguments)
    with FakeTensorMode():
        inputs = [torch.empty(size, dtype=dtype, device="cuda") for size in sizes]
        fakes = torch.ops.fastmix.scaled_attention(*inputs, *arguments[3:])
    for result, fake in zip(results, fakes, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_the_limit_is_the_ops():
    assert MAX_HEAD_SIZE == ops._GPU_MAX_HEAD_SIZE
    x = torch.ones(1, 1, 2, MAX_HEAD_SIZE + 1)
    with pytest.raises(ValueError, match="at most 256 channels, got 257 and 257"):
        fastmix.scaled_attention(x, x, x)


def test_splits_of_keys():
    """Enough to fill a GPU, but none of less than 256 keys, and all keys once."""
    assert kernels.splits_of_keys(8, 4096, 64) == (16, 256)
    assert kernels.splits_of_keys(100, 4096, 64) == (3, 1408)
    assert kernels.splits_of_keys(1000, 4096, 64)[0] == 1
    assert kernels.splits_of_keys(1, 200, 64)[0] == 1
    assert kernels.splits_of_keys(1, 0, 64)[0] == 1
