"""embedding_grad_norm_sq: values, repeated and padding ids, bags, gradients, strides, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.testing.cases import check_case
from fastmix.testing.embedding_grad_norm import CASES, embedding_case
from fastmix.testing.grad_norm import check_norms

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
OP = "embedding_grad_norm_sq"


def _inputs(sizes=(3, 20, 12), ids=4, dtype=torch.float32, **options) -> dict:
    return embedding_case("", sizes, ids, **options).inputs(dtype)


def _exact(inputs: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, OP, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype):
    check_case(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_of_every_sample(case, dtype):
    """The halves are rounded before and summed in float32, so that their norms are as good."""
    inputs = case.inputs(dtype)
    check_norms(case.name, case.function(**inputs), case.reference(**_exact(inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 2])
@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 3, 5)], ids=str)
def test_gradient_of_the_layer(shape, padding_idx, dtype):
    """Against a backward for each sample through PyTorch's own layer, with ids that repeat."""
    ids, table = torch.randint(5, shape), torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape, 6, dtype=torch.float64)
    oracle = torch.stack([
        torch.autograd.grad(F.embedding(ids[b], table, padding_idx), table, g[b])[0].square().sum() for b in range(4)
    ])  # fmt: skip
    for integers in (ids, ids.int()):
        check_norms("layer", fastmix.embedding_grad_norm_sq(integers, g.to(dtype), padding_idx=padding_idx), oracle)


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradient_of_a_bag(mode, padding_idx):
    """Against F.embedding_bag: its gradient for each of a bag's ids, and the ids' factors."""
    ids, table = torch.randint(4, (5, 9)), torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    g, weights = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    per_sample_weights = weights if mode == "sum" else None
    oracle = []
    for b in range(5):
        own = None if per_sample_weights is None else weights[b : b + 1]
        bag = F.embedding_bag(ids[b : b + 1], table, mode=mode, per_sample_weights=own, padding_idx=padding_idx)
        oracle.append(torch.autograd.grad(bag, table, g[b : b + 1])[0].square().sum())
    if mode == "mean":
        counted = torch.ones(5, 9) if padding_idx is None else ids != padding_idx
        weights = 1 / counted.double().sum(1, keepdim=True).expand(5, 9)
    rows = g[:, None].expand(5, 9, 6).float()
    norm_sq = fastmix.embedding_grad_norm_sq(ids, rows, padding_idx=padding_idx, row_weight=weights)
    exact = fastmix.embedding_grad_norm_sq(ids, rows.double(), padding_idx=padding_idx, row_weight=weights)
    torch.testing.assert_close(exact, torch.stack(oracle), rtol=1e-5, atol=0)
    check_norms("bag", norm_sq, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_of_halves_is_float32(dtype):
    inputs = _inputs(dtype=dtype)
    norm_sq = fastmix.embedding_grad_norm_sq(**inputs | {"grad_output": 100 * inputs["grad_output"]})
    assert norm_sq.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (norm_sq > 256**2).all()
    assert norm_sq.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opposite_gradients_of_one_id_give_no_negative_square(dtype):
    """Their sum is 0 but for rounding; the root of less than 0 would be NaN."""
    g = torch.randn(200, 5, 8, dtype=torch.float64).to(dtype)
    g[:, 0] = -g[:, 1:].sum(1)
    for weights in (None, torch.ones(200, 5), torch.ones(200, 5, requires_grad=True)):
        assert (fastmix.embedding_grad_norm_sq(torch.full((200, 5), 7), g, row_weight=weights) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_not_read_into_the_norm(dtype):
    """Wherever padding stands, and whatever its gradient is."""
    inputs = _inputs(dtype=dtype)
    ids, g = inputs["input"], inputs["grad_output"]
    expected = fastmix.embedding_grad_norm_sq(ids, torch.where((ids == 1)[..., None], 0, g), padding_idx=None)
    g = torch.where((ids == 1)[..., None], torch.nan, g)
    torch.testing.assert_close(fastmix.embedding_grad_norm_sq(ids, g, padding_idx=1), expected)
    everything = fastmix.embedding_grad_norm_sq(torch.full_like(ids, -5), g, padding_idx=-5)
    assert torch.equal(everything, torch.zeros_like(expected))


# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=2)[..., ::2],
        lambda x: torch.cat([x, x], dim=2)[..., 5:17],
        lambda x: torch.cat([x, x], dim=1)[:, ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["every other feature", "part", "every other position", "expanded batch", "expanded positions",
         "expanded features", "transposed", "positions first"],
)  # fmt: skip
def test_strides(view, dtype):
    inputs = _inputs(dtype=dtype, row_weight=True)
    g = view(inputs.pop("grad_output"))
    expected = fastmix.embedding_grad_norm_sq(grad_output=g.contiguous(), **inputs)
    torch.testing.assert_close(fastmix.embedding_grad_norm_sq(grad_output=g, **inputs), expected)
    inputs["input"], inputs["row_weight"] = (inputs[name].T.contiguous().T for name in ("input", "row_weight"))
    torch.testing.assert_close(fastmix.embedding_grad_norm_sq(grad_output=g, **inputs), expected)


def test_nan_stays_in_its_sample():
    inputs = _inputs()
    clean = fastmix.embedding_grad_norm_sq(**inputs)
    inputs["grad_output"][1, 3, 5] = float("nan")
    norm_sq = fastmix.embedding_grad_norm_sq(**inputs)
    assert norm_sq[1].isnan()
    assert torch.equal(norm_sq[::2], clean[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "ids"), [((2, 600, 64), 50), ((1, 500, 130), 3), ((90, 20, 33), 7)], ids=str)
def test_thread_count_and_repetition_change_no_bit(sizes, ids, dtype, ordinary_memory):
    inputs = _inputs(sizes, ids, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(fastmix.embedding_grad_norm_sq(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


# Gradients, transforms, the registered op, compilation


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_gradcheck(padding_idx):
    inputs = _inputs((2, 5, 3), 3, torch.float64, row_weight=True)
    leaves = [inputs[name].requires_grad_() for name in ("grad_output", "row_weight")]

    def norms(g, weights):
        return fastmix.embedding_grad_norm_sq(inputs["input"], g, padding_idx=padding_idx, row_weight=weights)

    assert gradcheck(norms, leaves, check_forward_ad=True)
    assert gradgradcheck(norms, leaves)


def test_gradient_and_transforms_in_float32():
    inputs = _inputs()
    ids, g = inputs["input"], inputs["grad_output"]
    leaf = g.clone().requires_grad_()
    grad = torch.autograd.grad(fastmix.embedding_grad_norm_sq(ids, leaf).sum(), leaf)[0]
    tangent = torch.randn_like(g)
    _, derivative = torch.func.jvp(lambda g: fastmix.embedding_grad_norm_sq(ids, g), (g,), (tangent,))
    torch.testing.assert_close(derivative, (grad * tangent).flatten(1).sum(1))
    single = torch.func.grad(lambda g, ids: fastmix.embedding_grad_norm_sq(ids[None], g[None]).sum())
    torch.testing.assert_close(torch.vmap(single)(g, ids), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs_kernels):
    ids, g = torch.randint(4, (2, 6)), torch.randn(2, 6, 5).to(dtype)
    for weights, padding_idx in ((None, None), (torch.randn(2, 6), 1)):
        torch.library.opcheck(torch.ops.fastmix.embedding_grad_norm_sq.default, (ids, g, weights, padding_idx))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.embedding_grad_norm_sq, fullgraph=True, backend="aot_eager")
    for length in (7, 9):
        inputs = _inputs((3, length, 6), padding_idx=1, row_weight=True)
        torch.testing.assert_close(compiled(**inputs), fastmix.embedding_grad_norm_sq(**inputs))


def test_meta():
    inputs = _inputs(dtype=torch.bfloat16)
    norm_sq = fastmix.embedding_grad_norm_sq(inputs["input"].to("meta"), inputs["grad_output"].to("meta"))
    assert (norm_sq.shape, norm_sq.dtype, norm_sq.device.type) == ((3,), torch.float32, "meta")


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1]}),
        (TypeError, "input must be int32 or int64, got float32", {"input": torch.ones(2, 7)}),
        (TypeError, "grad_output must be a Tensor, got NoneType", {"grad_output": None}),
        (TypeError, "grad_output must be float32, .* got int64", {"grad_output": torch.ones(2, 7, 5).long()}),
        (TypeError, "row_weight must be a Tensor, got float", {"row_weight": 0.5}),
        (TypeError, "row_weight must be float32, .* got bool", {"row_weight": torch.ones(2, 7).bool()}),
        (TypeError, "padding_idx must be an int or None, got float", {"padding_idx": 1.5}),
        (ValueError, r"grad_output must be \[2, 7, D\] for input \[2, 7\], got \[2, 6, 5\]",
         {"grad_output": torch.ones(2, 6, 5)}),
        (ValueError, r"grad_output must be \[2, 7, D\] for input \[2, 7\], got \[2, 7\]",
         {"grad_output": torch.ones(2, 7)}),
        (ValueError, r"grad_output must be \[B, …, D\] for input \[\], got \[5\]",
         {"input": torch.tensor(1), "grad_output": torch.ones(5)}),
        (ValueError, "grad_output must be on the device of input, cpu, got meta",
         {"grad_output": torch.ones(2, 7, 5, device="meta")}),
        (ValueError, r"row_weight must be \[2, 7\] as input, got \[2\]", {"row_weight": torch.ones(2)}),
        (ValueError, "row_weight must be on the device of input, cpu, got meta",
         {"row_weight": torch.ones(2, 7, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    valid = {"input": torch.ones(2, 7).long(), "grad_output": torch.ones(2, 7, 5)}
    with pytest.raises(error, match=match):
        fastmix.embedding_grad_norm_sq(**(valid | arguments))


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op = torch.ops.fastmix.embedding_grad_norm_sq.default
    ids, g, weights = torch.ones(2, 7).long(), torch.ones(2, 7, 5), torch.ones(2, 7)
    for wrong in (ids.int(), ids[:1], ids[0]):
        with pytest.raises(ValueError, match=r"(input|grad_output) must"):
            op(wrong, g, None, None)
    for wrong in (g[:, :6], g[0], g.double()):
        with pytest.raises(ValueError, match="grad_output must"):
            op(ids, wrong, None, None)
    for wrong in (weights[:1], weights.double(), weights[..., None]):
        with pytest.raises(ValueError, match="row_weight must"):
            op(ids, g, wrong, None)
