"""Token MLP and token linear in Triton's interpreter, which serves fp32 and fp16 (its bfloat16 arithmetic is wrong)."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import fastmix
from fastmix.ops import _route
from fastmix.ops import token_mixing as ops
from fastmix.reference import token_mixing as reference
from fastmix.testing.cases import check_case
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity
from fastmix.testing.token_mixing import CASES, NORMS, changed, linear_case, mlp_case
from tritonkernels import _token_gradients, _token_mlp_bwd, _token_mlp_fwd, _token_norm, _token_product, token_mixing
from tritonkernels._launch import tf32

OPS = ("token_mixing_mlp", "token_mixing_mlp_bwd", "token_linear", "token_linear_bwd")
HALF, FLOAT = torch.float16, torch.float32
# In float32 the MLP has a hidden buffer, in float16 it stays on chip. Slow ones take the interpreter seconds.
SLOW = ("100x", "196", "197", "1024", "many samples", "several panels", "wide heads")
SMALL = [case for case in CASES if not any(part in case.name for part in SLOW)]
DTYPES = [(case, (FLOAT, HALF)[index % 2]) for index, case in enumerate(SMALL)]
EVERYTHING = ("scale", "gate", "added", "residual")

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")


@pytest.fixture(autouse=True)
def _instead_of_the_cpu_kernels(monkeypatch):
    """So that the public functions, autograd included, call what a GPU would run."""
    with torch.library._scoped_library("fastmix", "IMPL") as library:
        for op in OPS:
            library.impl(op, getattr(ops, f"_{op}_cuda"), "CPU")
            monkeypatch.setitem(_route.kernels, op, frozenset({"cpu"}))
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles of everything in a small case, and sums in parts of unequal length."""
    monkeypatch.setattr(_token_product, "product_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_token_mlp_bwd, "hidden_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_token_mlp_fwd, "on_chip_blocks", lambda *sizes: (16, 16))
    monkeypatch.setattr(_token_gradients, "gradient_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_token_gradients, "_PROGRAMS", 24)


@pytest.mark.parametrize(("case", "dtype"), DTYPES, ids=str)
def test_case(case, dtype):
    check_case(case, dtype)


def test_the_kernels_are_called_and_memory_is_nan_before(monkeypatch):
    called, launch = [], _token_product.launch
    monkeypatch.setattr(_token_product, "launch", lambda *args, **named: called.append(args) or launch(*args, **named))
    x = torch.randn(1, 3, 4)
    assert x.new_empty(2).isnan().all()
    fastmix.token_linear(x, torch.randn(3, 3))
    assert called[-1][0] is _token_product.token_product_kernel


# More than one tile, long sequences, what the units multiply


@pytest.mark.parametrize("norm", NORMS)
def test_several_tiles(norm, small_blocks):
    check_case(linear_case(f"{norm}", (2, 17, 34), s_out=18, heads=2, norm=norm, given=EVERYTHING), FLOAT)
    check_case(mlp_case(f"{norm}", (2, 17, 18, 19), s_out=18, norm=norm, given=("scale", "residual")), HALF)


def test_the_norm_applied_once(monkeypatch):
    """As for a weight of many rows."""
    monkeypatch.setattr(_token_norm, "_MANY_ROWS", 16)
    check_case(linear_case("layer", (2, 9, 20), s_out=17, norm="layer", given=("gate",)), FLOAT)
    check_case(mlp_case("token_layer", (2, 9, 20, 18), norm="token_layer", given=("residual",)), FLOAT)


def test_three_parts_of_the_tokens():
    check_case(mlp_case("100 to 49", (1, 100, 33, 40), s_out=112, norm="layer", given=("residual",)), HALF)


def test_parts():
    assert _token_mlp_fwd.parts(196) == (128, 64, 16)
    assert _token_mlp_fwd.parts(49) == (64, 0, 0)
    sums = {length: sum(_token_mlp_fwd.parts(length)) for length in range(1, 257)}
    assert all(length <= total < length + 32 for length, total in sums.items())


def test_a_half_dtype_with_a_hidden_buffer(monkeypatch):
    monkeypatch.setattr(_token_mlp_fwd, "_LONGEST", 8)
    check_case(mlp_case("long", (2, 9, 13, 6), norm="layer", given=("scale", "residual")), HALF)


@pytest.mark.parametrize("longest", [8, 256])
def test_half_operands_everywhere(longest, monkeypatch):
    """bfloat16 rounds the hidden layer and its gradient to x's dtype; here that is float16."""
    for module in (token_mixing, _token_gradients, _token_mlp_fwd):
        monkeypatch.setattr(module, "wide", lambda dtype: dtype)
    monkeypatch.setattr(_token_mlp_fwd, "_LONGEST", longest)
    check_case(mlp_case("half", (2, 17, 31, 19), norm="layer", given=("scale", "residual")), HALF)
    check_case(linear_case("half", (2, 17, 31), norm="layer", given=("gate", "residual")), HALF)


@pytest.mark.parametrize("longest", [8, 256])
def test_a_hidden_layer_beyond_float16(longest, monkeypatch):
    monkeypatch.setattr(_token_mlp_fwd, "_LONGEST", longest)
    larger = changed(x=lambda x: x * 1e3, w1=lambda w: w * 1e3, w2=lambda w: w / 1e3)
    case = mlp_case("large", (2, 17, 31, 19), change=larger)
    hidden = case.inputs(HALF)["w1"].float() @ case.inputs(HALF)["x"].float()
    assert hidden.max() > torch.finfo(HALF).max
    check_case(dataclasses.replace(case, gradients={"x": 1}), HALF)


def test_gradients_beyond_float16():
    """Of the weight: large between the products, ordinary after them."""
    case = mlp_case("large", (2, 17, 31, 19), change=changed(w1=lambda w: w / 1e3, w2=lambda w: w * 3e4))
    check_case(dataclasses.replace(case, gradients={"x": 1}), HALF)


@triton.jit
def _activate(x_ptr, y_ptr, slope_ptr, ACTIVATION: tl.constexpr, BF16: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y, slope = _token_product.activate_with_slope(tl.load(x_ptr + at), ACTIVATION, BF16)
    tl.store(y_ptr + at, tl.where(at % 2 == 0, y, _token_product.activate(tl.load(x_ptr + at), ACTIVATION, BF16)))
    tl.store(slope_ptr + at, slope)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, dtype):
    x = torch.cat([torch.linspace(-9, 9, 4000), torch.tensor([-1e4, -300.0, -0.0, 0.0, 300.0, 1e4])])
    x = torch.nn.functional.pad(x, (0, 90))
    y, slope = torch.empty_like(x), torch.empty_like(x)
    number = list(reference.ACTIVATIONS).index(activation)
    _activate[(1,)](x, y, slope, number, dtype == torch.bfloat16, x.numel())

    def plain(compute):
        leaf = x.to(compute).requires_grad_()
        value = reference.ACTIVATIONS[activation](leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    for actual, expected, exact in zip((y, slope), plain(FLOAT), plain(torch.float64), strict=True):
        sizes = (x.abs() <= 9), (x.abs() > 9)  # beside 1e4 an error would not show
        for part in sizes:
            check_parity(
                activation, actual[part].to(dtype), expected[part].to(dtype), exact[part], factor=GRADIENT_FACTOR
            )


# What is asked for


def test_only_what_is_asked_for():
    x, w1, w2 = torch.randn(2, 7, 5), torch.randn(3, 7), torch.randn(7, 3)
    vectors = torch.randn(3), torch.randn(7), torch.randn(5), torch.randn(5), torch.randn(5)
    mlp = (torch.randn(2, 7, 5), x, w1, w2, *vectors, x.new_empty(0), 1, 1e-6, 0, True)
    z = torch.randn(2, 7, 5)
    linear = (z, x, torch.randn(7, 7), torch.randn(7), *vectors[2:4], None, None, vectors[4], z, 1, 1e-6, True)
    for function, arguments, absent in (
        (ops._token_mixing_mlp_bwd_cuda, mlp, set()),
        (ops._token_linear_bwd_cuda, linear, {5, 6}),
    ):
        everything = function(*arguments, True, True)
        assert {index for index, grad in enumerate(everything) if grad.numel() == 0} == absent
        of_input = function(*arguments, True, False)
        assert torch.equal(of_input[0], everything[0])
        assert all(grad.numel() == 0 for grad in of_input[1:])
        of_parameters = function(*arguments, False, True)
        assert of_parameters[0].numel() == 0
        assert all(map(torch.equal, of_parameters[1:], everything[1:]))


def test_saves_only_on_request():
    x, gate = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    for given, save, kept in ((gate, True, True), (gate, False, False), (None, True, False)):
        tensors = x, torch.randn(7, 7), None, None, None, given, None, None, None
        _, saved = ops._token_linear_cuda(*tensors, 0, 1e-6, False, save)
        assert saved.shape == (x.shape if kept else (0,))


def test_deterministic_and_an_expanded_gradient():
    x, w = torch.randn(3, 9, 20, requires_grad=True), torch.randn(9, 9, requires_grad=True)
    first, second = (
        torch.autograd.grad(fastmix.token_linear(x, w, norm="layer", residual=x).sum(), (x, w)) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    for actual, *plain in zip(first, *_plain_gradients(x, w), strict=True):
        check_parity("expanded", actual, *plain, factor=GRADIENT_FACTOR)


def _plain_gradients(x, w):
    for dtype in (FLOAT, torch.float64):
        leaves = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
        y = reference.token_linear(*leaves, norm="layer", residual=leaves[0])
        yield torch.autograd.grad(y.sum(), leaves)


def test_tf32_only_where_it_is_allowed_or_as_exact_as_x():
    assert [tf32(dtype) for dtype in (FLOAT, HALF)] == ["tf32x3", "tf32"]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert tf32(FLOAT) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
