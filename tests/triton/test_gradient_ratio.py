"""The ratio and its backward in Triton's interpreter, which serves fp32 and fp16 (its bf16 is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

import fastmix
from fastmix.ops import _route
from fastmix.ops import gradient_ratio as ops
from fastmix.testing.cases import check_case
from fastmix.testing.gradient_ratio import CASES, ratio_case
from tritonkernels import gradient_ratio as kernels

DTYPES = [torch.float32, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")


@pytest.fixture(autouse=True)
def _instead_of_the_cpu_kernel(monkeypatch):
    """So that the public function calls what a GPU would run."""
    with torch.library._scoped_library("fastmix", "IMPL") as library:
        for name, kernel in (("", ops._gradient_ratio_cuda), ("_bwd", ops._gradient_ratio_bwd_cuda)):
            library.impl(f"gradient_ratio{name}", kernel, "CPU")
            monkeypatch.setitem(_route.kernels, f"gradient_ratio{name}", frozenset({"cpu"}))
        yield


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_case(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("mode", ["gn", "gran"])
def test_runs_of_several_blocks(mode, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    monkeypatch.setattr(kernels, "_BLOCK_B", 2)
    monkeypatch.setattr(kernels, "_PROGRAMS", 9)
    check_case(ratio_case("short last run", (3, 7 * 16 + 5), mode), torch.float32)
    check_case(ratio_case("one run", (5, 3 * 16), mode), torch.float16)


def test_strides_of_values():
    value, gradient = torch.randn(6)[::2].requires_grad_(), torch.randn(3, 9)
    ratio = fastmix.gradient_ratio(value, gradient)
    grad = torch.autograd.grad(ratio, value, torch.ones(1).expand(3))[0]
    plain = value.detach().contiguous().requires_grad_()
    expected = fastmix.gradient_ratio(plain, gradient)
    torch.testing.assert_close(ratio, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), plain)[0])
