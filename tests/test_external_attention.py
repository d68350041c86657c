"""external_attention: values, gradients of every order, transforms, compilation, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.benchmarks import bench_external_attention, harness
from fastmix.benchmarks.limits import Limits
from fastmix.reference import external_attention as reference
from fastmix.testing.cases import check_case
from fastmix.testing.external_attention import CASES, external_attention_case
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
NAMES = ("x", "mk", "mv")


def _inputs(batch=2, s=9, c=12, m=5, heads=2, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, s, c), (m, c // heads), (m, c // heads)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _leaves(tensors) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _output_and_grads(function, x, mk, mv, grad_output, **options):
    leaves = _leaves((x, mk, mv))
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def _attention(x, mk, mv):
    return fastmix.external_attention(x, mk, mv, num_heads=2)


def _reference(x, mk, mv):
    return reference.external_attention(x, mk, mv, num_heads=2)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, "external_attention", dtype)
    assert_kernel(ops, "external_attention_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, "external_attention", dtype, "cuda")
    assert_kernel(ops, "external_attention_bwd", dtype, "cuda")


def test_reference_is_the_papers_definition():
    x, mk, mv = _inputs(dtype=torch.float64)
    expected = torch.empty_like(x)
    for sample, out in zip(x, expected, strict=True):
        for channels in (slice(0, 6), slice(6, 12)):
            weights = (sample[:, channels] @ mk.T).exp()
            weights /= weights.sum(dim=0)  # over the tokens
            weights /= 1e-9 + weights.sum(dim=1, keepdim=True)  # over the memory
            out[:, channels] = weights @ mv
    torch.testing.assert_close(_reference(x, mk, mv), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=2)[..., 12:],
        lambda x: torch.cat([x, x], dim=1)[:, ::2],
        lambda x: x[:1].expand(2, 9, 12),
        lambda x: x[:, :1].expand(2, 9, 12),
        lambda x: x[..., :1].expand(2, 9, 12),
        lambda x: x.mT.contiguous().mT,
    ],
    ids=["channels", "tokens", "expanded batch", "expanded tokens", "expanded channels", "transposed"],
)
def test_strides(view, dtype, needs_kernels):
    """Of x, of the memory and of the output's gradient."""
    x, mk, mv = _inputs(dtype=dtype)
    strided, memory = view(x), mk.T.contiguous().T
    expected = _output_and_grads(_attention, strided.contiguous(), mk, mv, strided.contiguous())
    actual = _output_and_grads(_attention, strided, memory, mv, strided)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_half_precision_rounds_once(dtype):
    x, mk, mv = _inputs(s=100, dtype=dtype)
    exact = _reference(x.double(), mk.double(), mv.double())
    error = (_attention(x, mk, mv).double() - exact).abs()
    accumulated = 16 * torch.finfo(torch.float32).eps * exact.abs().amax()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + accumulated).all()


def test_nan_stays_in_its_sample_and_head():
    x, mk, mv = _inputs(batch=3)
    clean = _attention(x, mk, mv)
    x[1, 2, 3] = float("nan")
    output = _attention(x, mk, mv)
    assert output[1, :, :6].isnan().all()
    assert torch.equal(output[1, :, 6:], clean[1, :, 6:])
    assert torch.equal(output[::2], clean[::2])


def test_infinite_logits():
    """−inf everywhere but in one token: all of a slot's weight is there; a slot of nothing but −inf is NaN."""
    x, mk, mv = torch.full((1, 300, 1), -float("inf")), torch.ones(1, 1), torch.full((1, 1), 2.0)
    assert fastmix.external_attention(x, mk, mv).isnan().all()
    x[0, 299] = 1.0
    output = fastmix.external_attention(x, mk, mv)
    expected = reference.external_attention(x, mk, mv)
    assert torch.equal(output, expected)
    assert output[0, 299] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 700, 48, 20, 1), (3, 300, 64, 70, 1), (5, 200, 32, 16, 8), (1, 400, 16, 8, 2)],
)
def test_thread_count_and_repetition_change_no_bit(sizes, dtype, needs_kernels):
    inputs = _inputs(*sizes, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(_output_and_grads(fastmix.external_attention, *inputs, inputs[0], num_heads=sizes[4]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("shape", "memory", "num_heads"), [((1, 3000, 64), 64, 1), ((3, 1100, 32), 64, 4), ((40, 50, 32), 16, 1)]
)
def test_work_for_several_threads(shape, memory, num_heads, ordinary_memory):
    """Sizes that are cut within a head, and more heads than there are sums for the gradients of the memory."""
    check_case(external_attention_case(str(shape), shape, memory, num_heads), torch.float32)


# Gradients


@pytest.mark.parametrize("num_heads", [1, 2])
def test_gradcheck(num_heads):
    inputs = _leaves(_inputs(s=4, c=4, m=3, heads=num_heads, dtype=torch.float64))

    def function(*inputs):
        return fastmix.external_attention(*inputs, num_heads=num_heads)

    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_double_backward(dtype):
    inputs = _inputs(dtype=dtype)

    def order_two(function, *inputs):
        inputs = _leaves(inputs)
        grads = torch.autograd.grad(function(*inputs).square().mean(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    runs = [order_two(_attention, *inputs), order_two(_reference, *inputs)]
    runs.append(order_two(_reference, *(value.double() for value in inputs)))
    for name, *grads in zip(NAMES, *runs, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


def test_gradient_only_where_it_is_asked_for(recorded):
    inputs = _inputs()
    assert not _attention(*inputs).requires_grad
    expected = _output_and_grads(_attention, *inputs, inputs[0])[1:]
    for i in range(3):
        arguments = [value.clone().requires_grad_(i == j) for j, value in enumerate(inputs)]
        _attention(*arguments).backward(inputs[0])
        assert [argument.grad is not None for argument in arguments] == [i == j for j in range(3)]
        torch.testing.assert_close(arguments[i].grad, expected[i])


def test_nothing_is_kept_without_a_gradient(needs_kernels):
    op = torch.ops.fastmix.external_attention.default
    x, mk, mv = _inputs()
    assert op(x, mk, mv, 2, False)[1].numel() == 0
    assert list(op(x, mk, mv, 2, True)[1].shape) == [2, 2, 9, 16]
    assert torch.equal(op(x, mk, mv, 2, False)[0], op(x, mk, mv, 2, True)[0])


# Transforms, the registered ops, compilation, autocast


def test_jvp_and_vmap():
    inputs = _inputs(dtype=torch.float64)
    tangents = [value.roll(1, dims=0) for value in inputs]
    actual = torch.func.jvp(_attention, tuple(inputs), tuple(tangents))
    expected = torch.func.jvp(_reference, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(actual, expected)
    x, mk, mv = _inputs()
    mapped = torch.vmap(_attention, in_dims=(None, 0, None))(x, torch.stack([mk, 2 * mk]), mv)
    torch.testing.assert_close(mapped, torch.stack([_attention(x, mk, mv), _attention(x, 2 * mk, mv)]))


def test_per_sample_gradients():
    x, mk, mv = _inputs()

    def loss(mk, sample):
        return _attention(sample[None], mk, mv).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(mk, x)
    for sample, grad in zip(x, per_sample, strict=True):
        leaf = mk.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(loss(leaf, sample), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs_kernels):
    inputs = _leaves(_inputs(dtype=dtype))
    op = torch.ops.fastmix.external_attention.default
    for save in (True, False):
        tests = ("test_schema", "test_faketensor") if not save else None
        arguments = (*inputs, 2, save)
        torch.library.opcheck(op, arguments, **({"test_utils": tests} if tests else {}))
    saved = op(*inputs, 2, True)[1]
    arguments = (inputs[0].detach(), *(value.detach() for value in inputs), saved, 2)
    torch.library.opcheck(torch.ops.fastmix.external_attention_bwd.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compile(dtype):
    torch._dynamo.reset()
    function = torch.compile(_attention, fullgraph=True, backend="aot_eager")
    for s in (9, 11):
        inputs = _inputs(s=s, dtype=dtype)
        actual = _output_and_grads(function, *inputs, inputs[0])
        expected = _output_and_grads(_attention, *inputs, inputs[0])
        torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(function(*inputs), expected[0])


def test_fake_tensors_and_meta():
    with torch._subclasses.FakeTensorMode():
        assert _attention(torch.empty(2, 9, 12), torch.empty(5, 6), torch.empty(5, 6)).shape == (2, 9, 12)
    x, mk, mv = (value.to("meta") for value in _inputs(dtype=torch.bfloat16))
    output = _attention(x, mk, mv)
    assert (output.shape, output.dtype, output.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast):
    inputs = _inputs()
    expected = _attention(*(value.to(autocast) for value in inputs))
    leaves = _leaves(inputs)
    with torch.autocast("cpu", autocast):
        output = _attention(*leaves)
        assert _attention(*(value.double() for value in inputs)).dtype == torch.float64
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(grad.dtype == torch.float32 for grad in grads)


# Benchmarks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_compute_the_same(dtype):
    bench = bench_external_attention._external_attention((2, 20, 24, 3), dtype)
    assert harness.failure_of(bench, "cpu") is None
    outcome = harness.run_case(bench, "cpu", Limits(copy_gbps=10.0, product_gflops=100.0), 0.0)
    assert {entry["reason"] for entry in outcome.not_run} == {"only with --full"}
    assert len(outcome.figures) == 2 * 3  # modes × providers


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got list", {"x": [[1.0]]}),
        (TypeError, "x must be float32, .* got int64", {"x": torch.ones(2, 9, 12).long()}),
        (TypeError, "mk must be a Tensor, got NoneType", {"mk": None}),
        (TypeError, "mv must be float32, .* got bool", {"mv": torch.ones(5, 6).bool()}),
        (TypeError, "mk must have the dtype of x, float32, got float64", {"mk": torch.ones(5, 6).double()}),
        (TypeError, "mv must have the dtype of x, float32, got bfloat16", {"mv": torch.ones(5, 6).bfloat16()}),
        (TypeError, "num_heads must be an int, got float", {"num_heads": 2.0}),
        (ValueError, r"x must be \[B, S, C\] with C ≥ 1, got \[9, 12\]", {"x": torch.ones(9, 12)}),
        (ValueError, r"x must be \[B, S, C\] with C ≥ 1, got \[2, 9, 0\]", {"x": torch.ones(2, 9, 0)}),
        (ValueError, "num_heads must be a divisor of C = 12, got 5", {"num_heads": 5}),
        (ValueError, "num_heads must be a divisor of C = 12, got 0", {"num_heads": 0}),
        (ValueError, r"mk must be \[M, C/num_heads\] = \[M, 6\] with M ≥ 1, got \[5, 12\]", {"mk": torch.ones(5, 12)}),
        (ValueError, r"mk must be \[M, C/num_heads\] = \[M, 6\] with M ≥ 1, got \[0, 6\]", {"mk": torch.ones(0, 6)}),
        (ValueError, r"mv must be \[M, C/num_heads\] = \[M, 6\] with M ≥ 1, got \[6\]", {"mv": torch.ones(6)}),
        (ValueError, r"mv must have as many rows as mk, 5, got \[4, 6\]", {"mv": torch.ones(4, 6)}),
        (ValueError, "mk must be on the device of x, cpu, got meta", {"mk": torch.ones(5, 6, device="meta")}),
    ],
)
def test_errors(error, match, arguments):
    valid = {"x": torch.ones(2, 9, 12), "mk": torch.ones(5, 6), "mv": torch.ones(5, 6), "num_heads": 2}
    with pytest.raises(error, match=match):
        fastmix.external_attention(**(valid | arguments))


def test_the_ops_guard_memory_themselves(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op, bwd = torch.ops.fastmix.external_attention.default, torch.ops.fastmix.external_attention_bwd.default
    x, mk, mv = _inputs()
    _, saved = op(x, mk, mv, 2, True)
    for heads in (0, 5, 13):
        with pytest.raises(ValueError, match="C a multiple of num_heads"):
            op(x, mk, mv, heads, False)
    with pytest.raises(ValueError, match="C a multiple of num_heads"):
        op(x[0], mk, mv, 2, False)
    for wrong in (mk[:4], mk[:, :4], mk.double(), mk[0]):
        with pytest.raises(ValueError, match="mk and mv must be"):
            op(x, mk, wrong, 2, False)
        with pytest.raises(ValueError, match="mk and mv must be"):
            bwd(x, x, wrong, mv, saved, 2)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        op(x.double(), mk.double(), mv.double(), 2, False)
    for wrong in (x[:1], x.double()):
        with pytest.raises(ValueError, match="grad_output must have x's shape and dtype"):
            bwd(wrong, x, mk, mv, saved, 2)
    for wrong in (saved[:1], saved.double(), saved.mT, saved[..., :5].contiguous()):
        with pytest.raises(ValueError, match="saved must be what the forward kept"):
            bwd(x, x, mk, mv, wrong, 2)
