"""Per-sample gradients of scale and shift in Triton's interpreter, which serves fp32 and fp16 (its bf16 is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

from fastmix.ops import _route
from fastmix.ops import affine_grad_norm as ops
from fastmix.testing.affine_grad_norm import CASES, sample_case
from fastmix.testing.cases import check_case
from tritonkernels import affine_grad_norm as kernels

DTYPES = [torch.float32, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")


@pytest.fixture(autouse=True)
def _instead_of_the_cpu_kernel(monkeypatch):
    """So that the public functions call what a GPU would run."""
    with torch.library._scoped_library("fastmix", "IMPL") as library:
        library.impl("affine_grad_sample", ops._affine_grad_sample_cuda, "CPU")
        monkeypatch.setitem(_route.kernels, "affine_grad_sample", frozenset({"cpu"}))
        yield


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_case(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("sizes", [(1, 40, 9, 1), (1, 3, 9, 11)], ids=str)
def test_runs_of_several_blocks(sizes, monkeypatch):
    monkeypatch.setattr(kernels, "affine_blocks", lambda *sizes: (4, 8))
    monkeypatch.setattr(kernels, "_PROGRAMS", 6)
    b, r, c, _ = sizes
    check_case(sample_case("by position", sizes, (b, r, 1)), torch.float32)
    check_case(sample_case("by channel", sizes, (b, 1, c), mean=False), torch.float16)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2), (3, 2, 1, 0)], ids=str)
def test_strides(order):
    def transform(x):
        return x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])

    for sizes in ((2, 9, 6, 1), (2, 2, 6, 9)):
        check_case(sample_case("strided", sizes, sizes[:3], transform=transform), torch.float32)


def test_deterministic_and_separate_outputs():
    x, rstd = torch.randn(2, 40, 6, 1), torch.rand(2, 40, 6)
    first, second = (ops._affine_grad_sample_cuda(x, x, None, rstd) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert first[0].untyped_storage().data_ptr() != first[1].untyped_storage().data_ptr()
