"""The tolerance rule can fail."""

from __future__ import annotations

import pytest
import torch

import fastmix
from fastmix.reference import fft_mixing as reference
from fastmix.testing.cases import Case, check_case
from fastmix.testing.fft_mixing import CASES
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = r"(isnan|isposinf|isneginf) at other places than the reference"


def _triple(dtype, *shape):
    """(reference in the dtype, oracle) of a mixing whose DC term is far larger than the rest."""
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1).to(dtype)
    return reference.fourier_mixing(x), reference.fourier_mixing(x.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_keeps_its_own_rule(dtype):
    expected, oracle = _triple(dtype, 4, 30, 20)
    margin = check_parity("itself", expected, expected, oracle, independent=1, factor=1)
    assert 0 < margin.worst <= 1
    assert margin.worst == max(margin.maximum, margin.root_mean_square)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_an_output_that_is_zero_but_for_its_dc_term(dtype):
    expected, oracle = _triple(dtype, 1, 512, 768)
    only_dc = torch.zeros_like(expected)
    only_dc[:, 0, 0] = expected[:, 0, 0]
    with pytest.raises(AssertionError, match=r"error .* in slice 0 exceeds the bound"):
        check_parity("only DC", only_dc, expected, oracle, independent=1)


def test_the_root_mean_square_is_what_refuses_it_in_bfloat16():
    expected, oracle = _triple(torch.bfloat16, 1, 512, 768)
    small = (oracle.abs() < 1000) & (torch.rand(oracle.shape) < 0.5)
    with pytest.raises(AssertionError, match="root mean square error"):
        check_parity("half lost", torch.where(small, 0, expected), expected, oracle, independent=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_one_wrong_small_sample_beside_a_large_one(dtype):
    expected, oracle = _triple(dtype, 3, 16, 12)
    oracle[1] *= 2.0**-12
    expected = oracle.to(dtype)
    wrong = expected.clone()
    wrong[1] = 0
    if dtype != torch.float32:
        check_parity("as one slice", wrong, expected, oracle)
    with pytest.raises(AssertionError, match="in slice 1 exceeds"):
        check_parity("in slices", wrong, expected, oracle, independent=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_nan_and_infinity_at_other_places(value):
    expected, oracle = _triple(torch.float32, 2, 6, 5)
    wrong = expected.clone()
    wrong[1, 2, 3] = value
    with pytest.raises(AssertionError, match=PLACES):
        check_parity("one too many", wrong, expected, oracle)
    with pytest.raises(AssertionError, match=PLACES):
        check_parity("one too few", expected, wrong, oracle)
    elsewhere = expected.clone()
    elsewhere[1, 2, 2] = value
    with pytest.raises(AssertionError, match=PLACES):
        check_parity("elsewhere", elsewhere, wrong, oracle)
    assert check_parity("the same", wrong, wrong, oracle).worst <= 1
    with pytest.raises(AssertionError):
        check_parity(
            "the other sign, or infinite for NaN", wrong, -wrong if value == value else -oracle.float(), oracle
        )


def test_compares_what_is_finite_beside_an_infinity():
    expected, oracle = _triple(torch.float16, 1, 8, 8)
    expected[0, 0, 0] = float("inf")
    oracle[0, 0, 0] = 1e6  # finite in float64, infinite in float16
    check_parity("overflow", expected, expected, oracle)
    wrong = expected.clone()
    wrong[0, 3, 3] += 10
    with pytest.raises(AssertionError, match="exceeds the bound"):
        check_parity("wrong beside it", wrong, expected, oracle)


def test_refuses_another_shape_or_dtype():
    expected, oracle = _triple(torch.float32, 2, 6, 5)
    with pytest.raises(AssertionError, match=r"shape \[2, 5, 6\], the reference has \[2, 6, 5\]"):
        check_parity("shape", expected.transpose(1, 2), expected, oracle)
    with pytest.raises(AssertionError, match=r"shape \[1, 6, 5\]"):
        check_parity("broadcastable", expected[:1], expected, oracle)
    with pytest.raises(AssertionError, match=r"dtype torch\.float64, the reference has torch\.float32"):
        check_parity("dtype", expected.double(), expected, oracle)
    empty = torch.empty(0, 3)
    assert check_parity("empty", empty, empty, empty.double()).worst == 0
    with pytest.raises(AssertionError, match="dtype"):
        check_parity("empty, dtype", empty.half(), empty, empty.double())


def test_refuses_a_bound_that_is_not_finite():
    expected, oracle = _triple(torch.float32, 2, 6, 5)
    oracle[0, 1, 1] = float("inf")
    with pytest.raises(AssertionError, match="bound is not finite"):
        check_parity("infinite oracle", expected, expected, oracle)
    oracle[0, 1, 1] = float("nan")
    with pytest.raises(AssertionError, match="bound is not finite"):
        check_parity("NaN in the oracle", expected, expected, oracle)


def test_where_nothing_is_allowed_nothing_may_differ():
    zero = torch.zeros(2, 3)
    assert check_parity("zero", zero, zero, zero.double(), independent=1).worst == 0
    wrong = zero.clone()
    wrong[1, 1] = 1e-30
    with pytest.raises(AssertionError, match="in slice 1 exceeds the bound 0"):
        check_parity("almost zero", wrong, zero, zero.double(), independent=1)


def test_complex_results_are_compared_by_both_parts():
    oracle = torch.randn(2, 5, dtype=torch.complex128)
    expected = oracle.to(torch.complex64)
    assert check_parity("complex", expected, expected, oracle, independent=1).worst <= 1
    with pytest.raises(AssertionError, match="exceeds the bound"):
        check_parity("conjugate", expected.conj(), expected, oracle, independent=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("error", ["transposed", "scaled", "rounded", "one element", "gradient"])
def test_check_case_refuses_wrong_functions(error, dtype):
    case = next(case for case in CASES if str(case) == "fourier_mixing 16x16")

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return fastmix.fourier_mixing(x)

        @staticmethod
        def backward(ctx, grad):
            return fastmix.fourier_mixing(grad) * 1.1

    def wrong(x, norm="backward", lengths=None):
        y = fastmix.fourier_mixing(x, norm=norm, lengths=lengths)
        if error == "transposed":
            return y.transpose(1, 2)
        if error == "scaled":
            return y * (1 + 16 * torch.finfo(dtype).eps)
        if error == "rounded":  # accumulates in less than float32
            narrow = torch.bfloat16 if dtype == torch.float32 else torch.float8_e5m2
            return y.to(narrow).to(dtype)
        if error == "one element":
            return y.index_put((torch.tensor(1), torch.tensor(15), torch.tensor(15)), torch.tensor(0.0, dtype=dtype))
        return WrongGradient.apply(x)

    match = "gradient of x" if error == "gradient" else "output"
    with pytest.raises(AssertionError, match=f"{case.name}, {match}"):
        check_case(case, dtype, function=wrong)


def test_check_case_gives_its_margins():
    assert isinstance(CASES[0], Case)
    margins = check_case(CASES[8], torch.float32)
    assert set(margins) == {"output", "x"}
    assert all(0 <= margin.worst <= 1 for margin in margins.values())
    assert (FORWARD_FACTOR, GRADIENT_FACTOR) == (2, 3)
