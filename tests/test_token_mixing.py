"""token_mixing_mlp and token_linear: values, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmix
from fastmix.testing.cases import check_case
from fastmix.testing.token_mixing import ACTIVATIONS, CASES, NORMS, linear_case, mlp_case

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _randn(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _mlp_inputs(s=4, c=3, d=5, dtype=torch.float32):
    x, w1, w2 = _randn(2, s, c, dtype=dtype), _randn(d, s, dtype=dtype, seed=1), _randn(s, d, dtype=dtype, seed=2)
    return {"x": x, "w1": w1, "w2": w2}


def _linear_inputs(s=4, c=6, dtype=torch.float32):
    return {"x": _randn(2, s, c, dtype=dtype), "weight": _randn(s, s, dtype=dtype, seed=1)}


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    op = case.function.__name__
    assert_kernel(ops, op, dtype)
    assert_kernel(ops, f"{op}_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, case.function.__name__, dtype, "cuda")


# Sizes from 6: a gradient of one or two elements may cancel to nearly nothing, and an error relative to what is left is
# luck. Length 1 is among CASES.
_OPTIONS = {
    "norm": st.sampled_from(NORMS),
    "weighted": st.booleans(),
    "bias": st.booleans(),
    "shape": st.tuples(st.integers(0, 3), st.integers(6, 40), st.integers(6, 80)),
    "s_out": st.none() | st.integers(6, 40),
    "dtype": st.sampled_from(DTYPES[:3]),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    d=st.integers(6, 40),
    given=st.sets(st.sampled_from(["scale", "residual"])),
    **_OPTIONS,
)
def test_every_combination_of_the_mlp(shape, d, dtype, given, **options):
    check_case(mlp_case("drawn", (*shape, d), given=tuple(sorted(given)), **options), dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    heads=st.none() | st.integers(1, 4),
    given=st.sets(st.sampled_from(["scale", "gate", "added", "residual"])),
    **_OPTIONS,
)
def test_every_combination_of_the_linear(shape, heads, dtype, given, **options):
    b, s, c = shape
    case = linear_case("drawn", (b, s, c * (heads or 1)), heads=heads, given=tuple(sorted(given)), **options)
    check_case(case, dtype)


def test_the_formula():
    """As the docstring has it, so that the reference itself is compared with something."""
    x, w1, w2 = _mlp_inputs(dtype=torch.float64).values()
    b1, b2, scale = _randn(5, dtype=torch.float64), _randn(4, dtype=torch.float64), _randn(3, dtype=torch.float64)
    u = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    hidden = w1 @ u + b1[:, None]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = x + scale * (w2 @ hidden + b2[:, None])
    actual = fastmix.token_mixing_mlp(x, w1, w2, b1, b2, norm="layer", scale=scale, residual=x)
    torch.testing.assert_close(actual, expected)


def test_the_formula_of_heads():
    x, weight, bias = _randn(2, 4, 6), _randn(3, 4, 4, seed=1), _randn(3, 4, seed=2)
    gate, added = _randn(2, 4, 6, seed=3), _randn(2, 4, 6, seed=4)
    parts = [weight[h] @ x[:, :, 2 * h : 2 * h + 2] + bias[h][:, None] for h in range(3)]
    expected = gate * (torch.cat(parts, dim=2) + added)
    torch.testing.assert_close(fastmix.token_linear(x, weight, bias, gate=gate, added=added), expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_vectors_of_another_dtype(dtype):
    """Biases and the like may stay in float32 beside half activations, and the other way round."""
    inputs = _mlp_inputs(dtype=dtype)
    b1 = _randn(5, dtype=torch.bfloat16).requires_grad_()
    weight = _randn(3).requires_grad_()
    y = fastmix.token_mixing_mlp(**inputs, b1=b1, norm="layer", norm_weight=weight)
    assert y.dtype == dtype
    y.sum().backward()
    assert (b1.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_a_wider_residual():
    inputs, residual = _mlp_inputs(dtype=torch.bfloat16), _randn(2, 4, 3)
    y = fastmix.token_mixing_mlp(**inputs, residual=residual)
    assert torch.equal(y, residual + fastmix.token_mixing_mlp(**inputs))
    inputs, residual = _linear_inputs(dtype=torch.bfloat16), _randn(2, 4, 6)
    y = fastmix.token_linear(**inputs, residual=residual)
    assert torch.equal(y, residual + fastmix.token_linear(**inputs))


def test_nan_stays_in_its_sample():
    inputs = _mlp_inputs(c=70)
    clean = fastmix.token_mixing_mlp(**inputs)
    inputs["x"][0, 1, 2] = float("nan")
    y = fastmix.token_mixing_mlp(**inputs)
    assert y[0, :, 2].isnan().all()
    assert torch.equal(y[1], clean[1])
    y = fastmix.token_mixing_mlp(**inputs, norm="layer")
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_inputs_are_left_as_they_were():
    inputs = _mlp_inputs() | {"residual": _randn(2, 4, 3, seed=5)}
    before = {name: value.clone() for name, value in inputs.items()}
    fastmix.token_mixing_mlp(**inputs, norm="layer")
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_thread_count_and_repetition_change_no_bit(batch, dtype, needs_kernels):
    mlp = mlp_case("", (batch, 33, 130, 20), norm="layer", given=("scale", "residual"))
    linear = linear_case("", (batch, 33, 130), heads=2, norm="layer", given=("scale", "gate", "residual"))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found = []
            for case in (mlp, linear):
                inputs = case.inputs(dtype)
                leaves = {name: inputs[name].requires_grad_() for name in case.gradients}
                output = case.function(**inputs)
                found += [output, *torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))]
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float32, bfloat16, float16 or float64, got int64", {"x": torch.ones(2, 4, 3).long()}),
        (ValueError, r"x must be \[B, S, C\] with S, C ≥ 1, got \[4, 3\]", {"x": torch.ones(4, 3)}),
        (ValueError, r"x must be \[B, S, C\] with S, C ≥ 1, got \[2, 0, 3\]", {"x": torch.ones(2, 0, 3)}),
        (ValueError, r"w1 must be \[D, S\] with S = 4, got \[5, 7\]", {"w1": torch.ones(5, 7)}),
        (ValueError, r"w1 must be \[D, S\] with S = 4, got \[1, 5, 4\]", {"w1": torch.ones(1, 5, 4)}),
        (ValueError, r"w1 must be \[D, S\] with S = 4, got \[0, 4\]", {"w1": torch.ones(0, 4)}),
        (ValueError, r"w2 must be \[S_out, D\] with D = 5, got \[4, 6\]", {"w2": torch.ones(4, 6)}),
        (TypeError, "w1 must have the dtype of x, float32, got bfloat16", {"w1": torch.ones(5, 4).bfloat16()}),
        (TypeError, "w2 must be float32, .* got int64", {"w2": torch.ones(4, 5).long()}),
        (ValueError, "w2 must be on the device of x, cpu, got meta", {"w2": torch.ones(4, 5, device="meta")}),
        (ValueError, r"b1 must be \[D\] = \[5\], got \[4\]", {"b1": torch.ones(4)}),
        (ValueError, r"b2 must be \[S_out\] = \[4\], got \[4, 1\]", {"b2": torch.ones(4, 1)}),
        (TypeError, "b2 must be float32, .* got bool", {"b2": torch.ones(4).bool()}),
        (ValueError, "norm must be one of None, 'layer', 'affine', 'token_layer', got 'batch'", {"norm": "batch"}),
        (ValueError, r"norm_weight must be None without norm, got \[3\]", {"norm_weight": torch.ones(3)}),
        (ValueError, r"norm_bias must be \[C\] = \[3\], got \[4\]", {"norm": "layer", "norm_bias": torch.ones(4)}),
        (
            ValueError,
            r"norm_weight must be \[S\] = \[4\], got \[3\]",
            {"norm": "token_layer", "norm_weight": torch.ones(3)},
        ),
        (ValueError, "eps must be at least 0, got -1", {"eps": -1}),
        (ValueError, "activation must be one of 'gelu', .* got 'swish'", {"activation": "swish"}),
        (ValueError, r"scale must be \[C\] = \[3\], got \[1\]", {"scale": torch.ones(1)}),
        (ValueError, r"residual must be \[B, S_out, C\] = \[2, 4, 3\]", {"residual": torch.ones(2, 4, 1)}),
    ],
)
def test_mlp_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.token_mixing_mlp(**_mlp_inputs() | arguments)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be float32, .* got complex64", {"x": torch.ones(2, 4, 6) * 1j}),
        (ValueError, r"weight must be \[S_out, S\] with S = 4, got \[4, 5\]", {"weight": torch.ones(4, 5)}),
        (ValueError, r"weight must be \[S_out, S\] with S = 4, got \[4\]", {"weight": torch.ones(4)}),
        (ValueError, r"weight must be \[heads, S_out, S\] with S = 4", {"weight": torch.ones(2, 4, 5)}),
        (ValueError, r"with C = 6 a multiple of heads, got 4 heads", {"weight": torch.ones(4, 4, 4)}),
        (ValueError, r"bias must be \[S_out\] = \[4\], got \[3\]", {"bias": torch.ones(3)}),
        (
            ValueError,
            r"bias must be \[heads, S_out\] = \[2, 4\], got \[4\]",
            {"weight": torch.ones(2, 4, 4), "bias": torch.ones(4)},
        ),
        (ValueError, r"gate must be \[B, S_out, C\] = \[2, 4, 6\], got \[2, 4, 3\]", {"gate": torch.ones(2, 4, 3)}),
        (TypeError, "gate must have the dtype of x, float32, got float16", {"gate": torch.ones(2, 4, 6).half()}),
        (ValueError, r"added must be \[B, S_out, C\] = \[2, 4, 6\], got \[4, 6\]", {"added": torch.ones(4, 6)}),
        (TypeError, "scale must be a Tensor, got float", {"scale": 0.5}),
    ],
)
def test_linear_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        fastmix.token_linear(**_linear_inputs() | arguments)


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.ones(2, 4)},
        {0: torch.ones(2, 4, 3).double()},
        {1: torch.ones(5, 9)},
        {1: torch.ones(5, 4).half()},
        {2: torch.ones(4, 4)},
        {2: torch.ones(4)},
        {3: torch.ones(4)},
        {3: torch.ones(5).double()},
        {4: torch.ones(5)},
        {5: torch.ones(2)},
        {7: torch.ones(9)},
        {8: torch.ones(2, 4, 2)},
        {8: torch.ones(1, 4, 3)},
        {9: 4},
        {11: -1},
    ],
)
def test_the_mlp_op_guards_memory_itself(needs_kernels, change):
    """Called without the public function's checks, as a compiled program may."""
    inputs = [*_mlp_inputs().values(), *[None] * 6, 1, 1e-6, 0, False, True]
    changed = [change.get(i, value) for i, value in enumerate(inputs)]
    with pytest.raises(ValueError, match=r"x must|must be|residual"):
        torch.ops.fastmix.token_mixing_mlp.default(*changed)
    y, saved = torch.ops.fastmix.token_mixing_mlp.default(*inputs)
    inputs[8:9], inputs[13:] = [saved], [True, True]
    changed = [change.get(i, value) for i, value in enumerate(inputs)]
    with pytest.raises(ValueError, match=r"x must|must be|saved"):
        torch.ops.fastmix.token_mixing_mlp_bwd.default(y, *changed)


@pytest.mark.parametrize(
    "change",
    [
        {1: torch.ones(4, 9)},
        {1: torch.ones(4, 4, 4)},
        {1: torch.ones(2, 2, 4, 4)},
        {1: torch.ones(4, 4).double()},
        {2: torch.ones(3)},
        {3: torch.ones(1)},
        {5: torch.ones(2, 3, 6)},
        {6: torch.ones(2, 4, 5)},
        {7: torch.ones(6).half()},
        {8: torch.ones(2, 4, 6).half()},
        {9: -1},
    ],
)
def test_the_linear_op_guards_memory_itself(needs_kernels, change):
    gate = _randn(2, 4, 6)
    inputs = [*_linear_inputs().values(), None, None, None, gate, None, None, None, 1, 1e-6, False, True]
    changed = [change.get(i, value) for i, value in enumerate(inputs)]
    with pytest.raises(ValueError, match=r"must be"):
        torch.ops.fastmix.token_linear.default(*changed)
    y, saved = torch.ops.fastmix.token_linear.default(*inputs)
    inputs[8:9], inputs[12:] = [saved], [True, True]
    changed = [change.get(i, value) for i, value in enumerate(inputs)]
    with pytest.raises(ValueError, match=r"must be|saved"):
        torch.ops.fastmix.token_linear_bwd.default(y, *changed)
