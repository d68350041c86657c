"""token_mixing_mlp and token_linear under autograd of every order, torch.func, torch.compile, export and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity
from fastmix.testing.token_mixing import ACTIVATIONS, NORMS, linear_case, mlp_case

MLP = mlp_case("mlp", (2, 5, 4, 3), norm="layer", given=("scale", "residual"))
LINEAR = linear_case("linear", (2, 5, 4), heads=2, norm="affine", given=("scale", "gate", "added", "residual"))
WITHOUT_OPTIONS = [mlp_case("plain", (2, 5, 4, 3), bias=False), linear_case("plain", (2, 5, 4), bias=False)]
BOTH = pytest.mark.parametrize("case", [MLP, LINEAR], ids=["mlp", "linear"])


def _split(case, dtype=torch.float32):
    """(function of the tensors that get a gradient, those tensors)."""
    inputs = case.inputs(dtype)
    names = list(case.gradients)
    rest = {name: value for name, value in inputs.items() if name not in names}
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    return (lambda *values: case.function(**dict(zip(names, values, strict=True)), **rest)), leaves


# Autograd


@BOTH
def test_gradcheck(case):
    function, leaves = _split(case, torch.float64)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_of_norms_and_activations(norm, activation):
    function, leaves = _split(mlp_case("mlp", (1, 4, 3, 2), norm=norm, activation=activation), torch.float64)
    assert gradcheck(function, leaves)


def _grads_of_order_two(function, inputs):
    """Gradients of a function that is not linear in the output, of its gradients' squares."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    output = function(*inputs)
    grads = torch.autograd.grad((output * output).mean(), inputs, create_graph=True)
    return torch.autograd.grad(sum((grad * grad).sum() for grad in grads), inputs)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [MLP, LINEAR, *WITHOUT_OPTIONS], ids=str)
def test_double_backward(case, dtype, recorded, assert_kernel):
    def plain(*values):
        return case.reference(**dict(zip(case.gradients, values, strict=True)), **rest)

    function, inputs = _split(case, dtype)
    rest = {name: value for name, value in case.inputs(dtype).items() if name not in case.gradients}
    with recorded() as ops:
        actual = _grads_of_order_two(function, inputs)
    assert_kernel(ops, f"{case.function.__name__}_bwd", dtype)
    expected = _grads_of_order_two(plain, inputs)
    oracle = _grads_of_order_two(plain, [value.double() for value in inputs])
    for name, *grads in zip(case.gradients, actual, expected, oracle, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


@BOTH
def test_gradient_only_where_it_is_asked_for(case):
    function, leaves = _split(case)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for i, value in enumerate(leaves):
        others = [leaf.detach() for leaf in leaves]
        others[i] = value
        (grad,) = torch.autograd.grad(function(*others).square().sum(), value)
        torch.testing.assert_close(grad, expected[i])
    with torch.no_grad():
        assert not function(*leaves).requires_grad
    with torch.inference_mode():
        assert function(*leaves).is_inference()


@BOTH
def test_gradient_of_a_grad_output_with_strides(case):
    """sum() hands back an expanded gradient, a transposition a transposed one."""
    function, leaves = _split(case)
    output = function(*leaves)
    ones, drawn = torch.ones_like(output), torch.randn(2, 4, 5)
    for scalar, grad_output in [
        (output.sum(), ones),
        ((output.transpose(1, 2) * drawn).sum(), drawn.transpose(1, 2).contiguous()),
    ]:
        actual = torch.autograd.grad(scalar, leaves, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
        torch.testing.assert_close(actual, expected)


@pytest.mark.kernel
@pytest.mark.parametrize("norm", NORMS)
def test_x_as_its_own_residual(norm):
    """Its gradient goes through the kernel once, and is that of a copy beside x."""
    for case in (mlp_case("", (3, 9, 70, 6), norm=norm), linear_case("", (3, 9, 70), norm=norm)):
        inputs = case.inputs(torch.float32)
        x = inputs.pop("x").requires_grad_()
        results = []
        for residual in (x, x.view_as(x)):
            y = case.function(x, **inputs, residual=residual)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(results[0], results[1])


def test_saved_tensors_are_freed_and_checked():
    function, leaves = _split(MLP)
    output = function(*leaves)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()
    leaves[0] = leaves[0].detach().clone().requires_grad_()
    x = leaves[0] * 1
    output = function(x, *leaves[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@BOTH
def test_checkpoint(case):
    function, leaves = _split(case)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    output = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(output.sum(), leaves), expected, strict=True))


# torch.func and forward mode


@BOTH
def test_jvp_and_vmap(case):
    function, leaves = _split(case, torch.float64)
    values = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.randn_like(value) for value in values)
    _, derivative = torch.func.jvp(function, values, tangents)
    _, pull = torch.func.vjp(function, *values)
    drawn = torch.randn_like(derivative)
    products = sum((grad * tangent).sum() for grad, tangent in zip(pull(drawn), tangents, strict=True))
    torch.testing.assert_close((drawn * derivative).sum(), products)

    x, parameter = values[0], values[1]
    weights = torch.stack([parameter, 2 * parameter])
    many = torch.vmap(lambda weight: function(x, weight, *values[2:]))(weights)
    torch.testing.assert_close(many[1], function(x, weights[1], *values[2:]))


def test_per_sample_gradients():
    x, weight = torch.randn(3, 5, 4), torch.randn(5, 5)

    def loss(weight, sample):
        return fastmix.token_linear(sample[None], weight, norm="layer", gate=sample[None]).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for sample, grad in zip(x, per_sample, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, sample), leaf)[0], grad)


# The registered ops

_SCHEMA = ("test_schema", "test_faketensor")


@pytest.mark.kernel
def test_opcheck(needs_kernels):
    x, w1, w2 = torch.randn(2, 5, 4), torch.randn(3, 5), torch.randn(5, 3)
    b1, b2, c, residual = torch.randn(3), torch.randn(5), torch.randn(4), torch.randn(2, 5, 4)
    leaves = [value.requires_grad_() for value in (x, w1, w2, b1, b2, c, c.clone(), c.clone(), residual)]
    ops = torch.ops.fastmix
    torch.library.opcheck(ops.token_mixing_mlp.default, (*leaves, 1, 1e-6, 0, False, True))
    saved = torch.randn(2, 3, 4)
    bwd = (torch.randn(2, 5, 4), *leaves[:8], saved, 1, 1e-6, 0, False, True, True)
    torch.library.opcheck(ops.token_mixing_mlp_bwd.default, bwd, test_utils=_SCHEMA)
    weight, bias, gate, added = torch.randn(2, 5, 5), torch.randn(2, 5), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    leaves = [x, *(v.requires_grad_() for v in (weight, bias, c, c.clone(), gate, added, c.clone())), residual]
    torch.library.opcheck(ops.token_linear.default, (*leaves, 2, 1e-6, False, True))
    bwd = (torch.randn(2, 5, 4), *leaves[:8], torch.randn(2, 5, 4), 2, 1e-6, True, True, True)
    torch.library.opcheck(ops.token_linear_bwd.default, bwd, test_utils=_SCHEMA)


@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
def test_opcheck_of_parts_of_the_backward(grads, needs_kernels):
    x, dy = torch.randn(2, 5, 4, dtype=torch.bfloat16), torch.randn(2, 5, 4, dtype=torch.bfloat16)
    w1, w2, none = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(5, 3, dtype=torch.bfloat16), torch.empty(0)
    bwd = (dy, x, w1, w2, *[None] * 5, none, 0, 1e-6, 0, False, *grads)
    torch.library.opcheck(torch.ops.fastmix.token_mixing_mlp_bwd.default, bwd, test_utils=_SCHEMA)
    weight = torch.randn(5, 5, dtype=torch.bfloat16)
    bwd = (dy, x, weight, *[None] * 3, dy, x, None, dy, 0, 1e-6, False, *grads)
    torch.library.opcheck(torch.ops.fastmix.token_linear_bwd.default, bwd, test_utils=_SCHEMA)


# torch.compile and export


def _compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@BOTH
def test_compile_with_inductor(case):
    function, leaves = _split(case)
    output, expected = _compiled(lambda *values: function(*values).relu())(*leaves), function(*leaves).relu()
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (output, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compile_of_many_shapes(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.token_mixing_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 7, 6, 3), (3, 9, 5, 4), (2, 12, 10, 8)):
        inputs = mlp_case("", shape, norm="layer", given=("residual",)).inputs(dtype)
        x = inputs.pop("x").requires_grad_()
        output, expected = compiled(x, **inputs), fastmix.token_mixing_mlp(x, **inputs)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (output, expected)))


@BOTH
def test_compiled_program_calls_the_kernel(case, assert_kernel):
    function, leaves = _split(case)
    compiled = _compiled(function, backend="aot_eager")
    compiled(*leaves)
    with torch.profiler.profile() as profile:
        compiled(*leaves).sum().backward()
    ops = [event.name.removeprefix("fastmix::") for event in profile.events() if event.name.startswith("fastmix::")]
    assert_kernel(ops, case.function.__name__)
    assert_kernel(ops, f"{case.function.__name__}_bwd")


def test_export(needs_kernels):
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return fastmix.token_linear(x, weight, norm="layer", residual=x)

    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = torch.randn(3, 5, 4), torch.randn(5, 5)
    program = torch.export.export(Model(), inputs, dynamic_shapes={"x": {0: batch}, "weight": None})
    assert "fastmix.token_linear" in program.graph_module.code
    x = torch.randn(7, 5, 4)
    assert torch.equal(program.module()(x, inputs[1]), Model()(x, inputs[1]))


def test_fake_tensors_and_meta():
    for device in ("meta", None):
        with torch._subclasses.FakeTensorMode() if device is None else torch.device("meta"):
            x, w1, w2 = torch.empty(2, 7, 6), torch.empty(3, 7), torch.empty(9, 3)
            assert fastmix.token_mixing_mlp(x, w1, w2).shape == (2, 9, 6)
            assert fastmix.token_linear(x, torch.empty(2, 9, 7)).shape == (2, 9, 6)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH
def test_autocast_casts_all_but_the_residual(case, dtype):
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        y = case.function(**inputs)
        residual = inputs.pop("residual")
        without = case.function(**inputs)
    assert (y.dtype, without.dtype) == (torch.float32, dtype)
    assert torch.equal(y, residual + without)
    cast = ("x", "w1", "w2", "weight", "gate", "added")
    expected = case.function(**{name: v.to(dtype) if name in cast else v for name, v in inputs.items()})
    assert torch.equal(without, expected)


@BOTH
def test_autocast_leaves_float64(case):
    inputs = case.inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.function(**inputs), case.function(**inputs))
        assert case.function(**inputs).dtype == torch.float64


def test_gradients_under_autocast():
    function, leaves = _split(MLP)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
