"""The route's decision, and the private PyTorch behaviour that it stands on."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import fastmix
from fastmix import _library
from fastmix.ops import _route


@pytest.fixture
def scratch():
    """An op of its own: (name, library). The op's name is new for each test; its registrations end with it."""
    name = f"scratch_{uuid.uuid4().hex[:8]}"
    with torch.library._scoped_library("fastmix", "FRAGMENT") as library:
        library.define(f"{name}(Tensor x) -> Tensor")
        yield name, library
    _route.kernels.pop(name, None)


# Which kernels there are


def test_the_ops_have_the_kernels_of_this_build():
    for op in ("fourier_mixing", "global_filter", "global_filter_bwd"):
        devices = {"cpu"} if _library.cpu_level else set()
        assert _route.kernels[op] == devices | ({"cuda"} if _library.cuda_loaded else set())


@pytest.mark.kernel
@pytest.mark.skipif(os.environ.get("FASTMIX_NO_EXT") == "1", reason="asked for without compiled kernels")
def test_the_build_is_not_broken():
    """Without this, a library that can't be loaded would turn the kernels' tests into tests of the reference."""
    assert _library.missing_reason is None


def test_one_reason_or_one_level():
    assert (_library.missing_reason is None) == (_library.cpu_level is not None)
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")
    assert _library.cpu_level in (None, expected)


def test_note_kernels_sees_registrations(scratch):
    name, library = scratch
    _route.note_kernels(name)
    assert _route.kernels[name] == frozenset()
    library.impl(name, lambda x: x.clone(), "CPU")
    _route.note_kernels(name)
    assert _route.kernels[name] == {"cpu"}
    assert _route.kernel_answers(name, torch.ones(2))


def test_a_fake_a_gradient_or_a_composite_is_no_kernel(scratch):
    name, library = scratch
    torch.library.register_fake(f"fastmix::{name}", lambda x: torch.empty_like(x), lib=library)
    torch.library.register_autograd(f"fastmix::{name}", lambda ctx, grad: grad, lib=library)
    _route.note_kernels(name)
    assert _route.kernels[name] == frozenset()


# Who answers


@pytest.fixture
def answers(monkeypatch):
    """answers(x): does the kernel answer for x, in a build that has one for the CPU?"""
    monkeypatch.setitem(_route.kernels, "fourier_mixing", frozenset({"cpu"}))
    return lambda x: _route.kernel_answers("fourier_mixing", x)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float64, False),
    ],
)
def test_by_dtype_and_device(answers, dtype, expected):
    assert answers(torch.ones(2, 2, dtype=dtype)) is expected
    assert not answers(torch.ones(2, 2, dtype=dtype, device="meta"))
    assert answers(torch.ones(2, 2, dtype=dtype, requires_grad=True)) is expected


def test_not_inside_functorch_transforms(answers):
    seen = []

    def function(x):
        seen.append(answers(x))
        return x.sum()

    x = torch.ones(2, 2)
    torch.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.func.vjp(function, x)
    torch.func.jvp(function, (x,), (x,))
    torch.func.jacrev(function)(x)
    torch.func.jacfwd(function)(x)
    torch.func.hessian(function)(x)
    torch.vmap(torch.func.grad(function))(x)
    assert len(seen) >= 8
    assert not any(seen)
    assert answers(x)


def test_not_where_the_op_closes_over_a_transformed_tensor(answers):
    """Any active transform counts, also for a tensor that is not transformed."""
    constant, seen = torch.ones(2, 2), []
    torch.vmap(lambda x: (seen.append(answers(constant)), x)[1])(constant)
    assert seen == [False]


def test_not_inside_forward_mode(answers):
    x = torch.ones(2, 2)
    with forward_ad.dual_level():
        assert not answers(x)
        with pytest.raises(RuntimeError, match="Nested"), forward_ad.dual_level():
            pass
    assert answers(x)


def test_in_the_other_modes(answers):
    x = torch.ones(2, 2)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert answers(x)
    with torch._subclasses.FakeTensorMode():
        assert answers(torch.empty(2, 2))


def test_backward_of_the_op_routes_again():
    """Gradients of torch.func over a function whose forward is a kernel's, taken by ordinary autograd outside."""
    x = torch.randn(2, 6, 5, requires_grad=True)
    inner = torch.func.grad(lambda x: fastmix.fourier_mixing(x).square().sum())(x)
    torch.testing.assert_close(inner, 2 * fastmix.fourier_mixing(fastmix.fourier_mixing(x)))
    (outer,) = torch.autograd.grad(inner.sum(), x)
    ones = torch.ones_like(x)
    torch.testing.assert_close(outer, 2 * fastmix.fourier_mixing(fastmix.fourier_mixing(ones)))


# Whether values may be read


def test_visible_data():
    x = torch.ones(2)
    assert _route.data_is_visible(x)
    assert not _route.data_is_visible(torch.ones(2, device="meta"))
    seen = []
    torch.vmap(lambda x: (seen.append(_route.data_is_visible(x)), x)[1])(x)
    with torch._subclasses.FakeTensorMode() as mode:
        seen.append(_route.data_is_visible(torch.empty(2)))
        seen.append(_route.data_is_visible(x))
    seen.append(_route.data_is_visible(mode.from_tensor(x)))
    assert seen == [False] * 4


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_lengths_are_not_read(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, lengths = torch.randn(2, 7, 6), torch.tensor([7, 4])
    graph = make_fx(lambda x, n: fastmix.fourier_mixing(x, lengths=n), tracing_mode=mode)(x, lengths)
    torch.testing.assert_close(graph(x, lengths - 1), fastmix.fourier_mixing(x, lengths=lengths - 1))


# Without kernels


@pytest.fixture
def no_kernels(monkeypatch):
    for op in list(_route.kernels):
        monkeypatch.setitem(_route.kernels, op, frozenset())
    monkeypatch.setattr(_library, "missing_reason", "this test says so")
    _route._warn_once.cache_clear()
    yield
    _route._warn_once.cache_clear()


def test_the_reference_warns_once_and_points_at_the_caller(no_kernels, recorded):
    x = torch.randn(2, 6, 5)
    with recorded() as ops, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = fastmix.fourier_mixing(x)
        fastmix.fourier_mixing(x)
        fastmix.global_filter(torch.ones(1, 2, 2, 1), torch.ones(2, 2, 1, 2))
    assert [(warning.category, warning.filename) for warning in caught] == [(UserWarning, __file__)]
    assert "no compiled kernels here (this test says so)" in str(caught[0].message)
    assert ops == []
    assert torch.equal(output, torch.fft.fft2(x).real)


def test_the_reference_compiles_without_a_warning(no_kernels):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = torch.compile(fastmix.fourier_mixing, fullgraph=True, backend="eager")(torch.ones(2, 3, 4))
    assert output.shape == (2, 3, 4)


def test_a_build_with_kernels_does_not_warn(needs_kernels):
    code = "import warnings, torch; warnings.simplefilter('error')\n"
    code += "import fastmix; fastmix.fourier_mixing(torch.ones(1, 2, 2))"
    subprocess.run([sys.executable, "-c", code], check=True)


# Double backward of backward ops


def test_differentiate_backward(scratch):
    name, library = scratch
    library.define(f"{name}_bwd(Tensor grad_output, Tensor x, Tensor w) -> (Tensor, Tensor)")

    def function(x, w):
        return (x * x * w).sin()

    def bwd(grad_output, x, w):
        return torch.func.vjp(function, x, w)[1](grad_output)

    library.impl(f"{name}_bwd", bwd, "CPU")
    _route.differentiate_backward(f"{name}_bwd", function, num_inputs=2)
    op = getattr(torch.ops.fastmix, f"{name}_bwd").default
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_lengths_beyond_the_gpu_kernels_go_to_the_reference(monkeypatch):
    monkeypatch.setitem(_route.kernels, "fourier_mixing", frozenset({"meta"}))
    for size, answers in ((8192, True), (8193, False)):
        assert _route.kernel_answers("fourier_mixing", torch.empty(1, 2, size, device="meta")) is answers
