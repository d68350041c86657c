"""gradient_ratio: values, gradients of every order, strides, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.benchmarks import bench_gradient_ratio
from fastmix.testing.cases import check_case
from fastmix.testing.gradient_ratio import CASES

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
MODES = ["gn", "gran"]
OP = "gradient_ratio"


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, OP, dtype)
    assert_kernel(ops, f"{OP}_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    pytest.importorskip("triton")
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, OP, dtype, "cuda")


def test_the_papers_formulas():
    value, gradient = torch.randn(5).double(), torch.randn(5, 3, 4).double()
    norm = gradient.flatten(1).norm(dim=1)
    gn = fastmix.gradient_ratio(value, gradient)
    torch.testing.assert_close(gn, value / (norm + value.abs()))
    gran = fastmix.gradient_ratio(value, gradient, mode="gran")
    torch.testing.assert_close(gran, value * norm / (norm**2 + 0.1))


@pytest.mark.parametrize("value", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
def test_dtypes_may_differ(value, gradient):
    """Under autocast the value is a half and the gradient, of a float32 input, is not."""
    y, v = torch.randn(4).to(value).requires_grad_(), torch.randn(4, 9).to(gradient).requires_grad_()
    ratio = fastmix.gradient_ratio(y, v)
    assert ratio.dtype == (torch.float64 if torch.float64 in (value, gradient) else torch.float32)
    torch.testing.assert_close(ratio.double(), fastmix.gradient_ratio(y.double(), v.double()), rtol=1e-5, atol=1e-6)
    ratio.sum().backward()
    assert (y.grad.dtype, v.grad.dtype) == (value, gradient)


@pytest.mark.parametrize("eps", [None, 0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, eps):
    leaves = torch.randn(3, requires_grad=True).double(), torch.randn(3, 2, 3, requires_grad=True).double()
    assert gradcheck(lambda y, v: fastmix.gradient_ratio(y, v, mode=mode, eps=eps), leaves, check_forward_ad=True)
    assert gradgradcheck(lambda y, v: fastmix.gradient_ratio(y, v, mode=mode, eps=eps), leaves)


@pytest.mark.parametrize("mode", MODES)
def test_second_and_third_order_of_the_kernel(mode):
    """Through the registered backward, against float64."""

    def derivatives(value, gradient):
        value, gradient = value.requires_grad_(), gradient.requires_grad_()
        grads = torch.autograd.grad(fastmix.gradient_ratio(value, gradient, mode=mode).sum(), (value, gradient),
                                    create_graph=True)  # fmt: skip
        total = sum(grad.square().sum() for grad in grads)
        seconds = torch.autograd.grad(total, (value, gradient), create_graph=True)
        thirds = torch.autograd.grad(sum(grad.square().sum() for grad in seconds), (value, gradient))
        return *grads, *seconds, *thirds

    value, gradient = torch.randn(4), torch.randn(4, 3, 5)
    actual = derivatives(value.clone(), gradient.clone())
    expected = derivatives(value.double(), gradient.double())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_zero_over_zero_is_zero_at_every_order(mode, dtype):
    value, gradient = torch.zeros(3, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    leaves = value.requires_grad_(), gradient.requires_grad_()
    ratio = fastmix.gradient_ratio(value, gradient, mode=mode, eps=0.0)
    grads = torch.autograd.grad(ratio.sum(), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)
    assert all((tensor == 0).all() for tensor in (ratio, *grads, *seconds))


def test_bounds_of_gn():
    """In [−1, 1] whatever the sizes; a value without a gradient is its sign."""
    value = torch.tensor([1e30, -1e30, 1e-30, -3.0, 0.0])
    gradient = torch.tensor([[1e-3], [1e3], [1e18], [0.0], [1.0]])
    ratio = fastmix.gradient_ratio(value, gradient)
    assert (ratio.abs() <= 1).all()
    assert ratio[3] == -1
    assert ratio[4] == 0


# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=3)[..., ::2],
        lambda x: torch.cat([x, x], dim=1)[:, 2 : 2 + x.shape[1]],
        lambda x: torch.cat([x, x], dim=0)[::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :, :1].expand(x.shape),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x.to(memory_format=torch.channels_last),
    ],
    ids=["behind", "channels", "samples", "expanded batch", "expanded rows", "reversed", "channels last"],
)
def test_strides(view, dtype):
    value, gradient = torch.randn(8)[::2].requires_grad_(), view(torch.randn(4, 3, 6, 5).to(dtype)).requires_grad_()
    grad_output = torch.ones(1).expand(4)
    plain = gradient.detach().contiguous().requires_grad_()
    for gradients in zip(
        torch.autograd.grad(fastmix.gradient_ratio(value, gradient), (value, gradient), grad_output),
        torch.autograd.grad(fastmix.gradient_ratio(value, plain), (value, plain), grad_output),
        strict=True,
    ):
        torch.testing.assert_close(*gradients)


def test_a_dense_sample_is_not_copied(needs_kernels):
    """Channels last: the norm is read, and the gradient written, as the elements lie."""
    gradient = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.autograd.grad(fastmix.gradient_ratio(torch.ones(2), gradient).sum(), gradient)[0]
    assert grad.stride() == gradient.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["gn", "gran"])
def test_nan_stays_in_its_sample(mode, dtype):
    value, gradient = torch.randn(4, dtype=dtype), torch.randn(4, 9, dtype=dtype)
    clean = fastmix.gradient_ratio(value, gradient, mode=mode)
    gradient[1, 3] = float("nan")
    ratio = fastmix.gradient_ratio(value, gradient, mode=mode)
    assert ratio[1].isnan()
    assert torch.equal(ratio[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("shape", [(2, 100003), (40, 5000)], ids=str)
def test_thread_count_changes_no_bit(shape, ordinary_memory):
    value, gradient = torch.randn(shape[0], requires_grad=True), torch.randn(shape, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ratio = fastmix.gradient_ratio(value, gradient)
            results.append((ratio, *torch.autograd.grad(ratio.sum(), (value, gradient))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Transforms, the registered op, compilation


def test_transforms():
    value, gradient = torch.randn(4), torch.randn(4, 3, 5)
    leaf = gradient.clone().requires_grad_()
    grad = torch.autograd.grad(fastmix.gradient_ratio(value, leaf).sum(), leaf)[0]
    single = torch.func.grad(lambda v, y: fastmix.gradient_ratio(y[None], v[None]).sum())
    torch.testing.assert_close(torch.vmap(single)(gradient, value), grad)
    tangent = torch.randn_like(gradient)
    _, derivative = torch.func.jvp(lambda v: fastmix.gradient_ratio(value, v), (gradient,), (tangent,))
    torch.testing.assert_close(derivative, (grad * tangent).flatten(1).sum(1))


@pytest.mark.parametrize("gran", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, gran, needs_kernels):
    value, gradient = torch.randn(3, requires_grad=True), torch.randn(3, 8).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastmix.gradient_ratio.default, (value, gradient, gran, 0.1))
    norm = gradient.detach().float().norm(dim=1)
    arguments = torch.randn(3), value.detach(), gradient.detach(), norm, gran, 0.1
    torch.library.opcheck(torch.ops.fastmix.gradient_ratio_bwd.default, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_compile(mode):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda value, gradient: fastmix.gradient_ratio(value, gradient, mode=mode), fullgraph=True, backend="aot_eager"
    )
    for rows in (7, 9):
        leaves = torch.randn(rows, requires_grad=True), torch.randn(rows, 3, 4, requires_grad=True)
        expected = fastmix.gradient_ratio(*leaves, mode=mode)
        torch.testing.assert_close(compiled(*leaves), expected)
        grads = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), leaves))


def test_meta():
    value, gradient = torch.randn(3, device="meta"), torch.randn(3, 4, 5, device="meta", dtype=torch.bfloat16)
    ratio = fastmix.gradient_ratio(value, gradient)
    assert (ratio.shape, ratio.dtype) == ((3,), torch.float32)


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "value must be a Tensor, got float", {"value": 1.0}),
        (TypeError, "value must be float32, .* got int64", {"value": torch.ones(2).long()}),
        (TypeError, "gradient must be a Tensor, got NoneType", {"gradient": None}),
        (TypeError, "gradient must be float32, .* got complex64", {"gradient": torch.ones(2, 3).cfloat()}),
        (ValueError, r"value must be \[B\], got \[2, 1\]", {"value": torch.ones(2, 1)}),
        (ValueError, r"gradient must be \[B, …\] with B = 2, got \[3, 2\]", {"gradient": torch.ones(3, 2)}),
        (ValueError, r"gradient must be \[B, …\] with B = 2, got \[\]", {"gradient": torch.ones(())}),
        (ValueError, "gradient must be on the device of value, cpu, got meta",
         {"gradient": torch.ones(2, 3, device="meta")}),
        (ValueError, "mode must be one of 'gn', 'gran', got 'GN'", {"mode": "GN"}),
        (ValueError, "eps must be finite and at least 0, got -0.1", {"eps": -0.1}),
        (ValueError, "eps must be finite and at least 0, got nan", {"eps": float("nan")}),
        (TypeError, "eps must be a float or None, got str", {"eps": "0.1"}),
        (TypeError, "eps must be a float or None, got bool", {"eps": True}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.gradient_ratio(**({"value": torch.ones(2), "gradient": torch.ones(2, 3)} | arguments))


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    forward, backward = torch.ops.fastmix.gradient_ratio.default, torch.ops.fastmix.gradient_ratio_bwd.default
    value, gradient = torch.ones(2), torch.ones(2, 3)
    for wrong in (value[:1], value.double(), value[:, None]):
        with pytest.raises(ValueError, match="value must"):
            forward(wrong, gradient, False, 0.0)
        for name in ("grad_output", "value", "norm"):
            arguments = {"grad_output": value, "value": value, "gradient": gradient, "norm": value, name: wrong}
            with pytest.raises(ValueError, match=f"{name} must"):
                backward(**arguments, gran=False, eps=0.0)
    with pytest.raises(ValueError, match="gradient must"):
        forward(value, gradient[..., None], False, 0.0)
    with pytest.raises(ValueError, match="gradient must be float32, bfloat16 or float16"):
        forward(value, gradient.double(), False, 0.0)


def test_the_benchmarks_peer_computes_the_same():
    bench = bench_gradient_ratio._ratio((3, 4, 5), torch.float32)
    inputs = bench.case.inputs(torch.float32)
    torch.testing.assert_close(bench.peers[0].function(**inputs), bench.case.function(**inputs))
