"""fourier_mixing and global_filter: values, gradients, errors, modules."""

from __future__ import annotations

import pytest
import torch

import fastmix
from fastmix import nn as fnn
from fastmix.reference import fft_mixing as reference
from fastmix.testing.cases import check_case
from fastmix.testing.fft_mixing import CASES
from fastmix.testing.parity import check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF = [torch.bfloat16, torch.float16]


def _randn(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _naive(x: torch.Tensor, lengths: torch.Tensor | None, norm: str) -> torch.Tensor:
    """One torch.fft.fft2 in float64 for each sample."""
    x = x.double()
    samples = x.reshape(-1, *x.shape[-2:])
    output = torch.zeros_like(samples)
    sizes = [x.shape[-2]] * len(samples) if lengths is None else lengths.reshape(-1).tolist()
    for sample, size, out in zip(samples, sizes, output, strict=True):
        if size:
            out[:size] = torch.fft.fft2(sample[:size], norm=norm).real
    return output.reshape(x.shape)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    op = case.function.__name__
    assert_kernel(ops, op, dtype)
    if op == "global_filter":
        assert_kernel(ops, "global_filter_bwd", dtype)
    elif ops:
        assert ops == ["fourier_mixing"] * 2  # forward and backward


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel, needs_cuda_kernels):
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, case.function.__name__, dtype, "cuda")


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((3, 14, 10), None),
        ((14, 10), None),
        ((9, 17, 6), [0, 1, 2, 3, 5, 8, 13, 16, 17]),
        ((2, 3, 12, 5), [[12, 11, 1], [0, 7, 4]]),
        ((14, 10), 9),
        ((2, 257, 3), [256, 251]),
    ],
)
def test_reference_is_a_transform_of_each_sample(shape, lengths, norm):
    x = _randn(*shape, dtype=torch.float64)
    lengths = None if lengths is None else torch.tensor(lengths)
    oracle = _naive(x, lengths, norm)
    actual = reference.fourier_mixing(x, norm=norm, lengths=lengths)
    # The chirps' angles are reduced exactly, so only the three FFTs of Bluestein's transform round.
    torch.testing.assert_close(actual, oracle, rtol=1e-13, atol=1e-13 * float(oracle.abs().max()))


def test_reference_global_filter_is_a_convolution():
    x, kernel = _randn(2, 4, 6, 3, dtype=torch.float64), _randn(4, 6, 3, dtype=torch.float64, seed=1)
    weight = torch.fft.rfft2(kernel, dim=(0, 1))
    expected = torch.zeros_like(x)
    for i in range(4):
        for j in range(6):
            expected += kernel[i, j] * x.roll((i, j), dims=(1, 2))
    torch.testing.assert_close(reference.global_filter(x, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8192, 4), (1, 4, 8192), (1, 4099, 3)])
def test_long(shape, dtype):
    x = _randn(*shape).to(dtype)
    check_parity(
        str(shape), fastmix.fourier_mixing(x), reference.fourier_mixing(x), _naive(x, None, "backward"), independent=1
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lengths", [None, [100, 61]])
def test_half_precision_rounds_once(dtype, lengths):
    """The output is the float32 transform's, rounded: to a neighbour of the exact value at most, in every element."""
    lengths = None if lengths is None else torch.tensor(lengths)
    x = _randn(2, 100, 48, dtype=dtype)
    exact = _naive(x, lengths, "ortho")
    error = (fastmix.fourier_mixing(x, norm="ortho", lengths=lengths).double() - exact).abs()
    accumulated = torch.finfo(torch.float32).eps * 8 * exact.abs().amax()
    half_ulp = torch.finfo(dtype).eps / 2
    assert (error <= half_ulp * exact.abs() + accumulated + torch.finfo(dtype).smallest_normal * half_ulp).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_never_read_and_comes_out_zero(dtype):
    lengths = torch.tensor([5, 0, 12, 1], dtype=torch.int32)
    x = _randn(4, 12, 9, dtype=dtype)
    outside = torch.arange(12) >= lengths[:, None]
    results = []
    for value in (0.0, float("nan"), float("inf")):
        padded = x.masked_fill(outside[..., None], value).requires_grad_()
        output = fastmix.fourier_mixing(padded, lengths=lengths)
        (grad,) = torch.autograd.grad(output, padded, torch.full_like(output, 0.5))
        assert (output[outside] == 0).all()
        assert (grad[outside] == 0).all()
        results.append((output, grad))
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_nan_stays_in_its_sample(needs_kernels):
    """And reaches every element of it; what MKL does with a NaN depends on the length."""
    x = _randn(3, 8, 6)
    clean = fastmix.fourier_mixing(x)
    x[1, 2, 3] = float("nan")
    output = fastmix.fourier_mixing(x)
    assert output[1].isnan().all()
    assert torch.equal(output[::2], clean[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 5, 4)])
def test_empty_batch(shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    for lengths in (None, torch.empty(shape[:-2], dtype=torch.int64)):
        output = fastmix.fourier_mixing(x, lengths=lengths)
        assert (output.shape, output.dtype) == (x.shape, dtype)
        assert torch.autograd.grad(output.sum(), x)[0].shape == x.shape


def test_input_and_lengths_are_left_as_they_were():
    x, lengths = _randn(2, 6, 5), torch.tensor([3, 6])
    before = x.clone(), lengths.clone()
    output = fastmix.fourier_mixing(x, lengths=lengths)
    assert torch.equal(x, before[0])
    assert torch.equal(lengths, before[1])
    assert output.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 100, 48), (1, 512, 768), (3, 37, 31)])
def test_thread_count_and_repetition_change_no_bit(shape, dtype):
    x = _randn(*shape, dtype=dtype)
    images = x[:, :36, :24].reshape(-1, 6, 6, 24)
    weight = _randn(6, 4, 24, 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = images.clone().requires_grad_(), weight.clone().requires_grad_()
            filtered = fastmix.global_filter(*leaves)
            grads = torch.autograd.grad(filtered, leaves, torch.ones_like(filtered))
            results.append([fastmix.fourier_mixing(x), filtered.detach(), *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got list", {"x": [[1.0]]}),
        (TypeError, "x must be float32, bfloat16, float16 or float64, got int64", {"x": torch.ones(2, 2).long()}),
        (TypeError, "x must be float32, .* got complex64", {"x": torch.ones(2, 2, dtype=torch.complex64)}),
        (ValueError, r"x must be \[\.\.\., S, H\], got \[4\]", {"x": torch.ones(4)}),
        (ValueError, r"at least one token and one channel, got \[2, 0, 3\]", {"x": torch.ones(2, 0, 3)}),
        (ValueError, r"at least one token and one channel, got \[2, 3, 0\]", {"x": torch.ones(2, 3, 0)}),
        (ValueError, "norm must be one of 'backward', 'ortho', 'forward', got 'orto'", {"norm": "orto"}),
        (TypeError, "lengths must be a Tensor, got list", {"lengths": [1, 2]}),
        (TypeError, "lengths must be int32 or int64, got float32", {"lengths": torch.ones(2)}),
        (TypeError, "lengths must be int32 or int64, got bool", {"lengths": torch.ones(2).bool()}),
        (ValueError, r"the shape x\.shape\[:-2\] = \[2\], got \[3\]", {"lengths": torch.ones(3).long()}),
        (ValueError, r"the shape x\.shape\[:-2\] = \[2\], got \[\]", {"lengths": torch.tensor(1)}),
        (ValueError, "device of x, cpu, got meta", {"lengths": torch.ones(2, device="meta").long()}),
        (ValueError, r"in 0\.\.S = 0\.\.4, got values from 3 to 5", {"lengths": torch.tensor([3, 5])}),
        (ValueError, r"in 0\.\.S = 0\.\.4, got values from -1 to 4", {"lengths": torch.tensor([-1, 4])}),
    ],
)
def test_fourier_mixing_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.fourier_mixing(**{"x": torch.ones(2, 4, 3), **arguments})


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got int", {"x": 1}),
        (TypeError, "x must be float32, .* got int64", {"x": torch.ones(2, 4, 6, 3).long()}),
        (ValueError, r"x must be \[B, h, w, C\] with h, w ≥ 1, got \[2, 24, 3\]", {"x": torch.ones(2, 24, 3)}),
        (ValueError, r"with h, w ≥ 1, got \[2, 0, 6, 3\]", {"x": torch.ones(2, 0, 6, 3)}),
        (ValueError, r"with h, w ≥ 1, got \[2, 4, 0, 3\]", {"x": torch.ones(2, 4, 0, 3)}),
        (TypeError, "weight must be a Tensor, got NoneType", {"weight": None}),
        (TypeError, "weight must be complex or floating point, got int64", {"weight": torch.ones(4, 4, 3, 2).long()}),
        (ValueError, r"w // 2 \+ 1, C, 2\] = \[4, 4, 3, 2\], got \[4, 6, 3, 2\]", {"weight": torch.ones(4, 6, 3, 2)}),
        (ValueError, r"w // 2 \+ 1, C\] = \[4, 4, 3\], got \[4, 4\]", {"weight": torch.ones(4, 4) * 1j}),
        (ValueError, "weight must be on the device of x, cpu, got meta", {"weight": torch.ones(4, 4, 3, 2).to("meta")}),
    ],
)
def test_global_filter_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.global_filter(**{"x": torch.ones(2, 4, 6, 3), "weight": torch.ones(4, 4, 3, 2), **arguments})


def test_the_ops_guard_memory_themselves(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op = torch.ops.fastmix.fourier_mixing.default
    x = torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"lengths must be in 0\.\.S = 0\.\.4, got 5"):
        op(x, torch.tensor([5, 1]), 0.0)
    with pytest.raises(ValueError, match="lengths must have 2 elements, got 3"):
        op(x, torch.tensor([1, 1, 1]), 0.0)
    with pytest.raises(ValueError, match="S, H >= 1"):
        op(torch.ones(3), None, 0.0)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        op(x.double(), None, 0.0)
    with pytest.raises(ValueError, match="weight"):
        torch.ops.fastmix.global_filter.default(torch.ones(2, 4, 6, 3), torch.ones(4, 6, 3, 2))
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16|weight must be float32"):
        torch.ops.fastmix.global_filter.default(torch.ones(2, 4, 6, 3).double(), torch.ones(4, 4, 3, 2).double())


# Modules


def test_fourier_mixing_module():
    x, lengths = _randn(2, 12, 8), torch.tensor([12, 5])
    module = fnn.FourierMixing()
    assert torch.equal(module(x), fastmix.fourier_mixing(x))
    assert module.state_dict() == {}
    module = fnn.FourierMixing("ortho")
    assert torch.equal(module(x, lengths), fastmix.fourier_mixing(x, norm="ortho", lengths=lengths))
    assert repr(module) == "FourierMixing(norm='ortho')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_global_filter_module(dtype, recorded, assert_kernel):
    module = fnn.GlobalFilter(dim=5, h=6, w=7).to(dtype)
    assert {name: list(value.shape) for name, value in module.state_dict().items()} == {"complex_weight": [6, 4, 5, 2]}
    assert 0.01 < module.complex_weight.std() < 0.03
    assert repr(module) == "GlobalFilter(dim=5, h=6, w=7)"
    x = _randn(3, 6, 7, 5, dtype=dtype)
    with recorded() as ops:
        output = module(x)
    assert_kernel(ops, "global_filter", dtype)
    tokens = module(x.reshape(3, 42, 5))
    assert torch.equal(tokens, output.reshape(3, 42, 5))
    check_parity(
        "module",
        output,
        reference.global_filter(x, module.complex_weight),
        reference.global_filter(x.double(), module.complex_weight.double()),
        independent=1,
    )
    output.sum().backward()
    assert module.complex_weight.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 7, 6, 5), (3, 41, 5), (3, 42, 4), (42, 5), (3, 2, 6, 7, 5)])
def test_global_filter_module_refuses_other_images(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 6, 7, 5\] or \[B, 42, 5\], got "):
        fnn.GlobalFilter(dim=5, h=6, w=7)(torch.ones(shape))
