"""Per-sample gradients of a linear layer in Triton's interpreter, which serves fp32 and fp16 (its bf16 is wrong)."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import fastmix
from fastmix.ops import _route
from fastmix.ops import grad_norm as ops
from fastmix.reference import grad_norm as reference
from fastmix.testing.cases import check_case
from fastmix.testing.grad_norm import CANCELLATION, CASES, check_norms, linear_case
from tritonkernels import _grad_norm_direct, _grad_norm_gram, _grad_norm_product, _grad_norm_weight, grad_norm

OPS = (
    "linear_grad_norm_sq",
    "linear_grad_norm_sq_bwd",
    "linear_weight_grad",
    "linear_weight_grad_with_norm",
    "linear_grad_gram",
)
NORM, WEIGHT, GRAM = OPS[0], *OPS[3:]
HALF, FLOAT = torch.float16, torch.float32
DTYPES = [FLOAT, HALF]
SLOW = ("2x70x100x200", "4x100x20x12", "9x5x8x17", "2x130x33x9", "2x33x130x66", "many samples")
SMALL = [case for case in CASES if not any(part in case.name for part in SLOW)]
# Cancellation is the harder in float32.
PAIRS = [
    (case, FLOAT if any(name in case.name for name in CANCELLATION) else DTYPES[index % 2])
    for index, case in enumerate(SMALL)
]

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
    """Several tiles of everything in a small case, and sums in runs of unequal length."""
    monkeypatch.setattr(_grad_norm_gram, "gram_blocks", lambda *sizes: (16, 16, {}))
    monkeypatch.setattr(_grad_norm_direct, "direct_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_grad_norm_weight, "direct_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_grad_norm_product, "product_blocks", lambda *sizes: (16, 16, 16))
    monkeypatch.setattr(_grad_norm_weight, "_PROGRAMS", 12)
    monkeypatch.setattr(grad_norm, "_BUFFER", 700)


@pytest.fixture(params=["gram", "direct"])
def form(request, monkeypatch):
    monkeypatch.setattr(ops, "choose", lambda *sizes, is_cuda: request.param)


@pytest.fixture
def gram_form(monkeypatch):
    monkeypatch.setattr(ops, "choose", lambda *sizes, is_cuda: "gram")


def nan_behind(*lengths):
    """Options of a case whose positions that do not count are NaN: nothing may read them."""

    def transform(*tensors):
        beyond = torch.arange(tensors[0].shape[1]) >= torch.tensor(lengths)[:, None]
        return [tensor.masked_fill(beyond[..., None], float("nan")) for tensor in tensors]

    return {"transform": transform, "lengths": torch.tensor(lengths)}


# Norms and their gradients


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_case(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks(form, dtype, small_blocks):
    check_case(linear_case(NORM, "blocks", (1, 35, 20, 18)), dtype)


@pytest.mark.parametrize(("lengths", "t"), [((5, 0, 9), 9), ((-3, 40, 17), 20), ((1, 0, 2), 1)], ids=str)
def test_lengths(lengths, t, form, small_blocks):
    check_case(linear_case(NORM, f"lengths {lengths}", (len(lengths), t, 18, 5), **nan_behind(*lengths)), FLOAT)


@pytest.mark.parametrize("sizes", [(2, 5, 0, 3), (2, 5, 3, 0)], ids=str)
def test_no_features(sizes, form):
    for function in (NORM, WEIGHT, GRAM):
        check_case(linear_case(function, f"{sizes}", sizes), FLOAT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancellation_is_met_by_the_direct_form(dtype, gram_form, monkeypatch):
    """In those samples alone whose norm is lost."""

    def transform(a, g):
        others = (change(a[i : i + 1].clone(), g[i : i + 1].clone()) for i, change in enumerate(CANCELLATION.values()))
        return [torch.cat(parts) for parts in zip((a[3:], g[3:]), *others, strict=True)]

    # The bias keeps some of these norms, but not the gradient by the input.
    check_case(linear_case(NORM, "with bias", (4, 20, 40, 24), transform=transform), dtype)
    case = linear_case(NORM, "of some samples", (4, 20, 40, 24), transform=transform, bias=False)
    check_case(case, dtype)
    inputs = case.inputs(dtype)
    oracle = reference.linear_grad_norm_sq(*(inputs[name].double() for name in ("input", "grad_output")), bias=False)
    norms = fastmix.linear_grad_norm_sq(**inputs)
    check_norms(case.name, norms, oracle)
    monkeypatch.setattr(_grad_norm_gram, "direct_parts", lambda a, *others: torch.zeros(a.shape[0], 1))
    without = fastmix.linear_grad_norm_sq(**inputs)
    assert without[0] == norms[0]
    assert torch.equal(without[1:], torch.zeros(3))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_products_that_overflow(gram_form):
    """On the way to norms that are finite, or where the norm is an infinity of its own."""
    case = linear_case(NORM, "large", (2, 5, 6, 7), transform=lambda a, g: (a * 1e22, g * 1e-22))
    check_case(dataclasses.replace(case, gradients={}), FLOAT)
    infinite = linear_case(NORM, "infinite", (2, 5, 6, 7), transform=lambda a, g: (a, g * 1e25))
    assert fastmix.linear_grad_norm_sq(**infinite.inputs(FLOAT)).isposinf().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_in_its_sample(form):
    a, g = torch.randn(3, 6, 5), torch.randn(3, 6, 4)
    clean = fastmix.linear_grad_norm_sq(a, g)
    a[1, 2, 3] = float("nan")
    norms = fastmix.linear_grad_norm_sq(a, g)
    assert norms[1].isnan()
    assert torch.equal(norms[::2], clean[::2])


# dW beside its norms, inner products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(5, 1, 9, 20), (2, 70, 33, 18)], ids=str)
def test_weight_grad_with_norm(sizes, weighted, dtype):
    options = {"sample_weight": [0.3, -2.0, 0.0, 1.0, 0.7][: sizes[0]]} if weighted else {}
    check_case(linear_case(WEIGHT, f"{sizes}", sizes, **options), dtype)


@pytest.mark.parametrize("sizes", [(5, 64, 17, 18), (7, 9, 17, 18)], ids=str)
def test_weight_grad_in_runs(sizes, small_blocks):
    check_case(linear_case(WEIGHT, f"{sizes}", sizes, sample_weight=[*range(sizes[0])]), FLOAT)


@pytest.mark.parametrize("sizes", [(9, 1, 20, 7), (9, 5, 17, 6)], ids=str)
def test_gram_of_several_blocks(sizes, small_blocks):
    for bias, dtype in ((False, FLOAT), (True, HALF)):
        check_case(linear_case(GRAM, f"{sizes}", sizes, bias=bias), dtype)


# Strides, order


def test_strides(form):
    a, g = torch.randn(2, 12, 9).mT, torch.randn(2, 1, 5).expand(2, 9, 5)
    strided = [tensor.detach().requires_grad_() for tensor in (a, g)]
    plain = [tensor.detach().contiguous().requires_grad_() for tensor in (a, g)]
    for function in (fastmix.linear_grad_gram, fastmix.linear_weight_grad_with_norm):
        with torch.no_grad():
            first, second = function(*strided), function(*plain)
        assert all(map(torch.equal, (*first,), (*second,)))
    norms = [fastmix.linear_grad_norm_sq(*tensors) for tensors in (strided, plain)]
    assert torch.equal(*norms)
    grads = [torch.autograd.grad(norm.sum(), of) for norm, of in zip(norms, (strided, plain), strict=True)]
    assert all(map(torch.equal, *grads))


def test_deterministic(gram_form, small_blocks):
    a, g = torch.randn(1, 20, 17, requires_grad=True), torch.randn(1, 20, 5, requires_grad=True)
    first, second = (torch.autograd.grad(fastmix.linear_grad_norm_sq(a, g).sum(), (a, g)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_kernels_are_called_and_memory_is_nan_before(gram_form, monkeypatch):
    called, launch = [], _grad_norm_gram.launch
    monkeypatch.setattr(_grad_norm_gram, "launch", lambda *args, **named: called.append(args) or launch(*args, **named))
    a = torch.randn(2, 3, 4)
    assert a.new_empty(2).isnan().all()
    fastmix.linear_grad_norm_sq(a, a)
    assert [args[0] for args in called] == [
        _grad_norm_gram.linear_grad_norm_gram_kernel,
        _grad_norm_gram.linear_grad_norm_choose_kernel,
    ]
