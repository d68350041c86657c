"""token_conv: values, gradients of every order, transforms, compilation, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastmix
from fastmix.reference import token_conv as reference
from fastmix.testing.cases import check_case
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity
from fastmix.testing.token_conv import CASES, token_conv_case

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["depthwise", "lightweight", "dynamic"]


def _inputs(kind: str, dtype=torch.float32, shape=(2, 7, 6), taps=3, causal=False) -> dict:
    return token_conv_case("", shape, taps, kind=kind, heads=2, causal=causal).inputs(dtype)


def _tensors(kind: str, dtype=torch.float32, **options):
    """(function of x and kernel, x, kernel) with gradients."""
    x, kernel, kind, causal = _inputs(kind, dtype, **options).values()
    leaves = x.requires_grad_(), kernel.requires_grad_()
    return (lambda x, kernel: fastmix.token_conv(x, kernel, kind=kind, causal=causal)), *leaves


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, "token_conv", dtype)
    assert_kernel(ops, "token_conv_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    pytest.importorskip("triton")
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, "token_conv", dtype, "cuda")
    assert_kernel(ops, "token_conv_bwd", dtype, "cuda")


def test_every_kind_has_its_default_of_one_call():
    x, kernel = _tensors("depthwise")[1:]
    assert torch.equal(fastmix.token_conv(x, kernel), fastmix.token_conv(x, kernel, kind="depthwise", causal=False))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES[:3]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80)),
    heads=st.integers(1, 3),
    channels=st.integers(1, 19),
    taps=st.integers(1, 20),
)
def test_any_options(kind, causal, dtype, shape, heads, channels, taps):
    case = token_conv_case("any", (*shape, heads * channels), taps, kind=kind, heads=heads, causal=causal)
    check_case(case, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("taps", [1, 4, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_documented_convolution(kind, taps, causal):
    x, kernel, *_ = _inputs(kind, torch.float64, taps=taps).values()
    actual = reference.token_conv(x, kernel, kind=kind, causal=causal)
    offset = taps - 1 if causal else (taps - 1) // 2
    padded = F.pad(x.mT, (offset, taps - 1 - offset))
    if kind == "dynamic":
        weights = kernel.softmax(-1).repeat_interleave(3, 2)  # [B, S, C, K]
        expected = torch.einsum("bcsk,bsck->bsc", padded.unfold(2, taps, 1), weights)
    else:
        w = kernel if kind == "depthwise" else kernel.softmax(-1).repeat_interleave(3, 0)
        expected = F.conv1d(padded, w[:, None], groups=6).mT
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_output_sees_no_later_token(kind):
    x, kernel, *_ = _inputs(kind, shape=(1, 9, 6), taps=5).values()
    before = fastmix.token_conv(x, kernel, kind=kind, causal=True)
    x[:, 4:] += 1
    after = fastmix.token_conv(x, kernel, kind=kind, causal=True)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_receptive_field(kind, value):
    """A register tile holds eight tokens or taps, whose fields differ."""
    x, kernel, *_ = _inputs(kind, shape=(2, 90, 8), taps=5).values()
    x[1, 40, 1] = value
    y = fastmix.token_conv(x, kernel, kind=kind)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 38:43, 1] = True
    assert torch.equal(~y.isfinite(), reached)
    function, x, kernel = _tensors(kind, shape=(2, 90, 8), taps=5)
    grad_output = torch.ones(2, 90, 8)
    grad_output[1, 40, 1] = value
    dx, dkernel = torch.autograd.grad(function(x, kernel), (x, kernel), grad_output)
    assert torch.equal(~dx.isfinite(), reached)
    expected = torch.autograd.grad(reference.token_conv(x, kernel, kind=kind), kernel, grad_output)[0]
    assert torch.equal(dkernel.isfinite(), expected.isfinite())


@pytest.mark.parametrize("kind", ["lightweight", "dynamic"])
def test_masked_and_nan_logits_as_in_the_reference(kind):
    x, kernel, *_ = _inputs(kind, taps=9).values()
    kernel.view(-1, 9)[0, 3:] = -float("inf")
    torch.testing.assert_close(fastmix.token_conv(x, kernel, kind=kind), reference.token_conv(x, kernel, kind=kind))
    for value in (float("nan"), float("inf")):
        kernel.view(-1, 9)[1, 4] = value
        assert fastmix.token_conv(x, kernel, kind=kind).isnan().any()
        expected = reference.token_conv(x, kernel, kind=kind).isnan()
        assert torch.equal(fastmix.token_conv(x, kernel, kind=kind).isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_and_repetition_change_no_bit(kind, dtype):
    function, x, kernel = _tensors(kind, dtype, shape=(3, 700, 64), taps=7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            y = function(x, kernel)
            results.append([y.detach(), *torch.autograd.grad(y, (x, kernel), torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_are_left_as_they_were():
    x, kernel, *_ = _inputs("dynamic").values()
    before = x.clone(), kernel.clone()
    fastmix.token_conv(x, kernel, kind="dynamic")
    assert torch.equal(x, before[0])
    assert torch.equal(kernel, before[1])


# Gradients and transforms


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, causal):
    function, *leaves = _tensors(kind, torch.float64, shape=(2, 4, 4), taps=3, causal=causal)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(kind, dtype):
    def second_order(function, x, kernel):
        x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        y = function(x, kernel, kind=kind)
        grads = torch.autograd.grad((y * y).mean(), (x, kernel), create_graph=True)
        return torch.autograd.grad(sum((grad * grad).sum() for grad in grads), (x, kernel))

    x, kernel, *_ = _inputs(kind, dtype).values()
    runs = [
        second_order(function, *tensors)
        for function, tensors in [
            (fastmix.token_conv, (x, kernel)),
            (reference.token_conv, (x, kernel)),
            (reference.token_conv, (x.double(), kernel.double())),
        ]
    ]
    for name, *grads in zip(("x", "kernel"), *runs, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_only_where_it_is_asked_for(kind):
    x, kernel, *_ = _inputs(kind).values()
    assert not fastmix.token_conv(x, kernel, kind=kind).requires_grad
    for of_x, of_kernel in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(of_x), kernel.clone().requires_grad_(of_kernel)
        fastmix.token_conv(a, b, kind=kind).sum().backward()  # of an expanded gradient
        assert (a.grad is not None, b.grad is not None) == (of_x, of_kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_and_vmap(kind):
    function, x, kernel = _tensors(kind)
    x, kernel = x.detach(), kernel.detach()
    tangent = torch.randn_like(x)
    expected = function(tangent, kernel)
    torch.testing.assert_close(torch.func.jvp(lambda x: function(x, kernel), (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), kernel))
    torch.testing.assert_close(output.tangent, expected)
    stacked = torch.vmap(function)(torch.stack([x, tangent]), torch.stack([kernel, kernel]))
    torch.testing.assert_close(stacked, torch.stack([function(x, kernel), expected]))
    per_sample = torch.vmap(torch.func.grad(lambda k, x: function(x[None], k).square().sum()), in_dims=(None, 0))
    if kind != "dynamic":
        leaf = kernel.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, leaf).square().sum(), leaf)
        torch.testing.assert_close(per_sample(kernel, x).sum(0), grad)


# The registered ops


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, needs_kernels):
    x, kernel, *options = _inputs(kind).values()
    grad_output = torch.ones_like(x)
    leaves = x.requires_grad_(), kernel.requires_grad_()
    # Dynamic shapes take seconds, and do not differ by kind.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    all_checks = [*checks, "test_aot_dispatch_dynamic"] if kind == "dynamic" else checks
    torch.library.opcheck(torch.ops.fastmix.token_conv.default, (*leaves, *options), test_utils=all_checks)
    torch.library.opcheck(torch.ops.fastmix.token_conv_bwd.default, (grad_output, *leaves, *options), test_utils=checks)


def test_the_ops_guard_memory_themselves(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op, op_bwd = torch.ops.fastmix.token_conv.default, torch.ops.fastmix.token_conv_bwd.default
    x = torch.ones(2, 7, 6)
    for match, arguments in [
        (r"x must be \[B, S, C\]", (torch.ones(6), torch.ones(6, 3), "depthwise", False)),
        ("kind must be depthwise, lightweight or dynamic, got wide", (x, torch.ones(6, 3), "wide", False)),
        ("of H heads that divide x's 6 channels, got 4", (x, torch.ones(4, 3), "lightweight", False)),
        ("of H heads that divide x's 6 channels, got 0", (x, torch.ones(0, 3), "lightweight", False)),
        ("of H heads that divide x's 6 channels, got 3", (x, torch.ones(3, 3), "depthwise", False)),
        ("with K >= 1", (x, torch.ones(6, 0), "depthwise", False)),
        ("of x's dtype", (x, torch.ones(6, 3).half(), "depthwise", False)),
        ("x's batch and tokens", (x, torch.ones(2, 6, 3, 3), "dynamic", False)),
        ("x must be float32, bfloat16 or float16", (x.double(), torch.ones(6, 3).double(), "depthwise", False)),
    ]:
        with pytest.raises(ValueError, match=match):
            op(*arguments)
        with pytest.raises(ValueError, match=match):
            op_bwd(arguments[0], *arguments)
    with pytest.raises(ValueError, match="grad_output must have x's shape and dtype"):
        op_bwd(torch.ones(2, 7, 5), x, torch.ones(6, 3), "depthwise", False)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.token_conv, fullgraph=True, backend="aot_eager")
    for shape in ((2, 7, 6), (3, 9, 6), (2, 12, 6)):
        _, x, kernel = _tensors(kind, shape=shape)
        outputs = [f(x, kernel, kind=kind, causal=True) for f in (compiled, fastmix.token_conv)]
        assert torch.equal(*outputs)
        grads = [torch.autograd.grad(y.square().sum(), (x, kernel)) for y in outputs]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compile_with_inductor():
    torch._dynamo.reset()
    function, *leaves = _tensors("lightweight")
    compiled = torch.compile(lambda x, kernel: function(x * 2, kernel).relu(), fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), function(leaves[0] * 2, leaves[1]).relu())


def test_fake_tensors_and_meta():
    with torch._subclasses.FakeTensorMode():
        assert fastmix.token_conv(torch.empty(2, 7, 6), torch.empty(6, 3)).shape == (2, 7, 6)
    x = torch.empty(2, 7, 6, device="meta", dtype=torch.bfloat16)
    y = fastmix.token_conv(x, x.new_empty(2, 7, 3, 4), kind="dynamic")
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, recorded, assert_kernel):
    _, x, kernel = _tensors("lightweight")
    with torch.autocast("cpu", dtype), recorded() as ops:
        y = fastmix.token_conv(x, kernel.to(dtype), kind="lightweight")
    assert_kernel(ops, "token_conv", dtype)
    assert torch.equal(y, fastmix.token_conv(x.to(dtype), kernel.to(dtype), kind="lightweight"))
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got list", {"x": [[1.0]]}),
        (TypeError, "x must be float32, bfloat16, float16 or float64, got int64", {"x": torch.ones(2, 7, 6).long()}),
        (TypeError, "kernel must be a Tensor, got NoneType", {"kernel": None}),
        (TypeError, "kernel must be float32, .* got complex64", {"kernel": torch.ones(6, 3) * 1j}),
        (TypeError, "kernel must have the dtype of x, float32, got float64", {"kernel": torch.ones(6, 3).double()}),
        (TypeError, "causal must be a bool, got int", {"causal": 1}),
        (ValueError, r"x must be \[B, S, C\], got \[7, 6\]", {"x": torch.ones(7, 6)}),
        (ValueError, "kind must be one of 'depthwise', 'lightweight', 'dynamic', got 'deep'", {"kind": "deep"}),
        (ValueError, r"kernel must be \[C, K\] = \[6, K\] with K ≥ 1 .* got \[5, 3\]", {"kernel": torch.ones(5, 3)}),
        (ValueError, r"kernel must be \[C, K\] = \[6, K\] with K ≥ 1 .* got \[6, 0\]", {"kernel": torch.ones(6, 0)}),
        (ValueError, r"if kind is 'depthwise', got \[6, 1, 3\]", {"kernel": torch.ones(6, 1, 3)}),
        (ValueError, r"\[H, K\] with K ≥ 1 .* got \[3\]", {"kernel": torch.ones(3), "kind": "lightweight"}),
        (ValueError, "with C = 6 a multiple of H ≥ 1, got 4", {"kernel": torch.ones(4, 3), "kind": "lightweight"}),
        (ValueError, "with C = 6 a multiple of H ≥ 1, got 0", {"kernel": torch.ones(0, 3), "kind": "lightweight"}),
        (
            ValueError,
            r"\[B, S, H, K\] = \[2, 7, H, K\] with K ≥ 1 if kind is 'dynamic', got \[2, 6, 3, 3\]",
            {"kernel": torch.ones(2, 6, 3, 3), "kind": "dynamic"},
        ),
        (ValueError, "kernel must be on the device of x, cpu, got meta", {"kernel": torch.ones(6, 3, device="meta")}),
    ],
)
def test_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.token_conv(**{"x": torch.ones(2, 7, 6), "kernel": torch.ones(6, 3), **arguments})
