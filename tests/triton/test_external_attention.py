"""External attention in Triton's interpreter, which serves fp32 and fp16 (its bfloat16 arithmetic is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

from fastmix.ops import external_attention as ops
from fastmix.reference import external_attention as reference
from fastmix.testing.cases import check_case
from fastmix.testing.external_attention import external_attention_case
from tritonkernels import external_attention as kernels

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


class _Attention(torch.autograd.Function):
    """What the op does on a GPU."""

    @staticmethod
    def forward(ctx, x, mk, mv, num_heads):
        y, statistics = ops._external_attention_cuda(x, mk, mv, num_heads, True)
        ctx.save_for_backward(x, mk, mv, statistics)
        ctx.num_heads = num_heads
        return y

    @staticmethod
    def backward(ctx, grad_output):
        return *ops._external_attention_bwd_cuda(grad_output, *ctx.saved_tensors, ctx.num_heads), None


def attention(x, mk, mv, num_heads=1):
    if x.dtype == torch.float64:
        return reference.external_attention(x, mk, mv, num_heads=num_heads)
    return _Attention.apply(x, mk, mv, num_heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "memory", "num_heads"),
    [
        ((1, 1, 1), 1, 1),
        ((2, 7, 5), 3, 1),
        ((2, 49, 24), 17, 2),
        ((1, 65, 12), 1, 4),
        ((1, 20, 70), 16, 1),
        ((1, 40, 8), 200, 1),
        ((0, 6, 8), 4, 2),
        ((2, 0, 8), 4, 2),
    ],
)
def test_sizes(shape, memory, num_heads, dtype):
    check_case(external_attention_case(str(shape), shape, memory, num_heads), dtype, function=attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 30.0, 3e4])
def test_large_and_equal_logits(size, dtype):
    check_case(external_attention_case(f"size {size}", (2, 70, 16), 8, 2, size=size), dtype, function=attention)


def test_strides():
    x = torch.randn(2, 20, 24)[:, ::2, 12:]
    mk, mv = torch.randn(2, 6, 7).mT
    leaves = [t.detach().requires_grad_() for t in (x, mk, mv)]
    expected = [t.detach().contiguous().requires_grad_() for t in (x, mk, mv)]
    grad = torch.randn(2, 1, 12).expand(2, 10, 12)
    outputs = [attention(*tensors, 2) for tensors in (leaves, expected)]
    assert torch.equal(*outputs)
    for a, b in zip(
        *(torch.autograd.grad(y, t, grad) for y, t in zip(outputs, (leaves, expected), strict=True)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("programs", "splits", "parts"), [(512, 3, 6), (4, 2, 3), (1, 1, 1)])
def test_splits_and_parts(programs, splits, parts, monkeypatch):
    """Of few heads and of many, up to one each, as where heads fill a GPU."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    kernels._plan.cache_clear()
    plan = kernels._plan(2, 130, 8, 8, False)
    assert (plan.splits, plan.parts) == (splits, parts)
    check_case(external_attention_case("splits", (1, 130, 16), 8, 2), torch.float32, function=attention)
    kernels._plan.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_stays_in_its_sample_and_head():
    x, mk, mv = torch.randn(3, 9, 12), torch.randn(5, 6), torch.randn(5, 6)
    clean = attention(x, mk, mv, 2)
    x[1, 2, 3] = float("nan")
    output = attention(x, mk, mv, 2)
    assert output[1, :, :6].isnan().all()
    assert torch.equal(output[1, :, 6:], clean[1, :, 6:])
    assert torch.equal(output[::2], clean[::2])


def test_nothing_is_kept_without_a_gradient():
    x, mk = torch.randn(2, 9, 12), torch.randn(5, 12)
    assert ops._external_attention_cuda(x, mk, mk, 1, False)[1].numel() == 0
    assert list(ops._external_attention_cuda(x, mk, mk, 1, True)[1].shape) == [2, 1, 2, 5]


def test_deterministic():
    x, mk = torch.randn(2, 70, 12), torch.randn(5, 12)
    y, statistics = kernels.external_attention(x, mk, mk, 1)
    first, second = (kernels.external_attention_bwd(x, x, mk, mk, statistics, 1) for _ in range(2))
    assert torch.equal(y, kernels.external_attention(x, mk, mk, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_limit_is_the_ops():
    assert kernels.MAX_MEMORY == ops._GPU_MAX_MEMORY
