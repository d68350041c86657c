"""fourier_mixing and global_filter under autograd of every order, torch.func, torch.compile, export and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastmix
from fastmix.reference import fft_mixing as reference
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = torch.tensor([7, 4])


def _randn(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _mixing(x, lengths=None):
    return fastmix.fourier_mixing(x, norm="ortho", lengths=lengths)


def _reference_mixing(x, lengths=None):
    return reference.fourier_mixing(x, norm="ortho", lengths=lengths)


def _filter_inputs(dtype=torch.float32, h=5, w=6, channels=4):
    return _randn(2, h, w, channels, dtype=dtype), _randn(h, w // 2 + 1, channels, 2, dtype=dtype, seed=1)


# Autograd


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_gradcheck_fourier_mixing(lengths):
    x = _randn(2, 7, 5, dtype=torch.float64).requires_grad_()
    assert gradcheck(_mixing, (x, lengths), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(_mixing, (x, lengths))


@pytest.mark.parametrize("as_complex", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1)])
def test_gradcheck_global_filter(size, as_complex):
    x, weight = _filter_inputs(torch.float64, *size, channels=2)
    weight = (torch.view_as_complex(weight) if as_complex else weight).requires_grad_()
    x.requires_grad_()
    assert gradcheck(fastmix.global_filter, (x, weight), check_forward_ad=True)
    assert gradgradcheck(fastmix.global_filter, (x, weight))


def _grads_of_order_two(function, *inputs):
    """Gradients of a function that is not linear in the output, of its gradient's square."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    output = function(*inputs)
    grads = torch.autograd.grad((output * output).mean(), inputs, create_graph=True)
    return torch.autograd.grad(sum((grad * grad).sum() for grad in grads), inputs)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_double_backward_fourier_mixing(dtype, lengths):
    x = _randn(2, 7, 20, dtype=dtype)
    runs = [
        _grads_of_order_two(lambda x, f=function: f(x, lengths), value)
        for function, value in [(_mixing, x), (_reference_mixing, x), (_reference_mixing, x.double())]
    ]
    check_parity("second order", *(run[0] for run in runs), independent=1, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_double_backward_global_filter(dtype):
    inputs = _filter_inputs(dtype)
    runs = [
        _grads_of_order_two(function, *values)
        for function, values in [
            (fastmix.global_filter, inputs),
            (reference.global_filter, inputs),
            (reference.global_filter, [value.double() for value in inputs]),
        ]
    ]
    for name, *grads in zip(("x", "weight"), *runs, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


def test_gradient_only_where_it_is_asked_for():
    x, weight = _filter_inputs()
    assert not fastmix.global_filter(x, weight).requires_grad
    for first, second in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(first), weight.clone().requires_grad_(second)
        fastmix.global_filter(a, b).sum().backward()
        assert (a.grad is not None, b.grad is not None) == (first, second)
    x = _randn(2, 6, 5).requires_grad_()
    with torch.no_grad():
        assert not fastmix.fourier_mixing(x).requires_grad
    with torch.inference_mode():
        assert fastmix.fourier_mixing(x).is_inference()


def test_gradient_of_a_grad_output_with_strides():
    """sum() hands back an expanded gradient, a transposition a transposed one."""
    x = _randn(2, 6, 5).requires_grad_()
    expected = fastmix.fourier_mixing(torch.ones(2, 6, 5))
    torch.testing.assert_close(torch.autograd.grad(fastmix.fourier_mixing(x).sum(), x)[0], expected)
    weight = _randn(2, 5, 6)
    (grad,) = torch.autograd.grad((fastmix.fourier_mixing(x).transpose(1, 2) * weight).sum(), x)
    torch.testing.assert_close(grad, fastmix.fourier_mixing(weight.transpose(1, 2)))


# torch.func and forward mode


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_jvp(lengths):
    x, tangent = _randn(2, 7, 5), _randn(2, 7, 5, seed=1)
    expected = _mixing(tangent, lengths)
    _, derivative = torch.func.jvp(lambda x: _mixing(x, lengths), (x,), (tangent,))
    torch.testing.assert_close(derivative, expected)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(_mixing(forward_ad.make_dual(x, tangent), lengths))
    torch.testing.assert_close(output.tangent, expected)


def test_jvp_global_filter():
    x, weight = _filter_inputs()
    tangents = torch.randn_like(x), torch.randn_like(weight)
    _, derivative = torch.func.jvp(fastmix.global_filter, (x, weight), tangents)
    expected = fastmix.global_filter(tangents[0], weight) + fastmix.global_filter(x, tangents[1])
    torch.testing.assert_close(derivative, expected)


def test_vmap():
    x, lengths = _randn(3, 2, 7, 5), torch.tensor([[7, 4], [0, 1], [6, 5]])
    torch.testing.assert_close(torch.vmap(_mixing)(x), _mixing(x))
    torch.testing.assert_close(torch.vmap(_mixing)(x, lengths), _mixing(x, lengths))
    torch.testing.assert_close(torch.vmap(_mixing, in_dims=(None, 0))(x[0], lengths)[2], _mixing(x[0], lengths[2]))
    torch.testing.assert_close(
        torch.vmap(_mixing, in_dims=2, out_dims=2)(x), _mixing(x.transpose(1, 2)).transpose(1, 2)
    )
    x, weight = _filter_inputs()
    weights = torch.stack([weight, 2 * weight])
    expected = fastmix.global_filter(x, weight)
    torch.testing.assert_close(
        torch.vmap(fastmix.global_filter, in_dims=(None, 0))(x, weights), torch.stack([expected, 2 * expected])
    )


def test_jacobian_and_hessian():
    x = _randn(4, 3, dtype=torch.float64)
    matrix = torch.func.jacrev(fastmix.fourier_mixing)(x).reshape(12, 12)
    torch.testing.assert_close(matrix @ x.reshape(12), fastmix.fourier_mixing(x).reshape(12))
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(torch.func.jacfwd(fastmix.fourier_mixing)(x).reshape(12, 12), matrix)
    hessian = torch.func.hessian(lambda x: fastmix.fourier_mixing(x).square().sum() / 2)(x).reshape(12, 12)
    torch.testing.assert_close(hessian, matrix @ matrix)


def test_per_sample_gradients():
    x, weight = _filter_inputs()

    def loss(weight, sample):
        return fastmix.global_filter(sample[None], weight).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for sample, grad in zip(x, per_sample, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, sample), leaf)[0], grad)

    def mixing_loss(sample, length):
        return _mixing(sample, length).square().sum()

    x = _randn(2, 7, 5)
    per_sample = torch.vmap(torch.func.grad(mixing_loss))(x, LENGTHS)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(per_sample, torch.autograd.grad(mixing_loss(leaf, LENGTHS), leaf)[0])


# The registered ops


@pytest.mark.parametrize(
    "arguments",
    [
        (_randn(2, 7, 5).requires_grad_(), None, 0.0),
        (_randn(2, 7, 5).requires_grad_(), LENGTHS, 0.5),
        (_randn(3, 5, 7, dtype=torch.bfloat16).transpose(1, 2), None, 1.0),
    ],
)
def test_opcheck_fourier_mixing(arguments, needs_kernels):
    torch.library.opcheck(torch.ops.fastmix.fourier_mixing.default, arguments)


def test_opcheck_global_filter(needs_kernels):
    x, weight = _filter_inputs()
    x.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.fastmix.global_filter.default, (x, weight))
    torch.library.opcheck(torch.ops.fastmix.global_filter_bwd.default, (_randn(*x.shape), x, weight))


def test_output_memory_is_filled_in_tests(needs_kernels):
    """conftest's filling with NaN reaches what the kernels allocate."""
    with torch.profiler.profile() as profile:
        torch.ops.fastmix.fourier_mixing.default(torch.ones(2, 4, 3), None, 0.0)
    names = [event.name for event in profile.events()]
    inside = names[names.index("fastmix::fourier_mixing") :]
    assert any("empty" in name for name in inside)
    assert "aten::fill_" in inside


# torch.compile and export


def _compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def test_compile_with_inductor():
    x = _randn(2, 7, 6).requires_grad_()

    def function(x, lengths):
        return (fastmix.fourier_mixing(x * 2, lengths=lengths).relu()).sum()

    for lengths in (None, LENGTHS):
        loss = _compiled(function)(x, lengths)
        expected = function(x, lengths)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_of_many_shapes(dtype, dynamic):
    function = _compiled(_mixing, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 7, 6), (3, 9, 6), (2, 12, 10)):
        x = _randn(*shape, dtype=dtype).requires_grad_()
        for lengths in (None, torch.arange(1, shape[0] + 1)):
            output, expected = function(x, lengths), _mixing(x, lengths)
            torch.testing.assert_close(output, expected)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (output, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("as_complex", [True, False])
def test_compile_global_filter(dtype, as_complex):
    function = _compiled(fastmix.global_filter, backend="aot_eager")
    for h, w in ((5, 6), (4, 7)):
        x, weight = _filter_inputs(dtype, h, w)
        weight = torch.view_as_complex(weight) if as_complex else weight
        x.requires_grad_()
        weight.requires_grad_()
        output, expected = function(x, weight), fastmix.global_filter(x, weight)
        torch.testing.assert_close(output, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (output, expected)]
        torch.testing.assert_close(*grads)


def test_compiled_program_calls_the_kernel(recorded, assert_kernel):
    function = _compiled(_mixing, backend="aot_eager")
    x = _randn(2, 7, 6)
    function(x, LENGTHS)
    with torch.profiler.profile() as profile:
        function(x, LENGTHS)
    ops = [event.name.removeprefix("fastmix::") for event in profile.events() if event.name.startswith("fastmix::")]
    assert_kernel(ops, "fourier_mixing")


def test_compiled_lengths_are_checked_by_the_op(needs_kernels):
    function = _compiled(_mixing, backend="aot_eager")
    function(_randn(2, 7, 6), LENGTHS)
    with pytest.raises((ValueError, RuntimeError), match=r"lengths must be in 0\.\.S = 0\.\.7, got 8"):
        function(_randn(2, 7, 6), torch.tensor([3, 8]))


def test_export(needs_kernels):
    class Model(torch.nn.Module):
        def forward(self, x, lengths):
            return fastmix.fourier_mixing(x, lengths=lengths)

    tokens = torch.export.Dim("tokens", min=7, max=64)
    program = torch.export.export(
        Model(), (_randn(2, 7, 6), LENGTHS), dynamic_shapes={"x": {1: tokens}, "lengths": None}
    )
    assert "fastmix.fourier_mixing" in program.graph_module.code
    x = _randn(2, 12, 6)
    assert torch.equal(program.module()(x, LENGTHS), fastmix.fourier_mixing(x, lengths=LENGTHS))


def test_fake_tensors_and_meta():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 7, 6)
        assert fastmix.fourier_mixing(x).shape == (2, 7, 6)
        assert fastmix.fourier_mixing(x, lengths=torch.ones(2).long()).shape == (2, 7, 6)
        assert fastmix.global_filter(torch.empty(2, 5, 6, 4), torch.empty(5, 4, 4, 2)).shape == (2, 5, 6, 4)
    x = torch.empty(2, 7, 6, device="meta", dtype=torch.bfloat16)
    output = fastmix.fourier_mixing(x, lengths=torch.ones(2, device="meta").long())
    assert (output.shape, output.dtype, output.device) == (x.shape, x.dtype, x.device)


# Autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_autocast_keeps_the_dtype(dtype, autocast):
    x = _randn(2, 7, 6, dtype=dtype).requires_grad_()
    image, weight = _filter_inputs(dtype)
    expected = fastmix.fourier_mixing(x), fastmix.global_filter(image, weight)
    with torch.autocast("cpu", autocast):
        actual = fastmix.fourier_mixing(x), fastmix.global_filter(image, weight)
        (grad,) = torch.autograd.grad(actual[0].sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(a.dtype == dtype for a in (*actual, grad))
