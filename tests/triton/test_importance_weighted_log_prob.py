"""The estimate and its backward in Triton's interpreter, which serves fp32 and fp16 (its bf16 is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

from fastmix.losses import importance_weighted_log_prob
from fastmix.ops import _route
from fastmix.ops import importance_weighted_log_prob as ops
from fastmix.testing.cases import check_case
from fastmix.testing.importance_weighted_log_prob import CASES, density_case
from tritonkernels import importance_weighted_log_prob as kernels

OP = "importance_weighted_log_prob"
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _instead_of_the_cpu_kernel(monkeypatch):
    """So that the public function calls what a GPU would run."""
    with torch.library._scoped_library("fastmix", "IMPL") as library:
        for name in (OP, f"{OP}_bwd"):
            library.impl(name, getattr(ops, f"_{name}_cuda"), "CPU", allow_override=True)
            monkeypatch.setitem(_route.kernels, name, frozenset({"cpu"}))
        yield


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_case(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_either_size(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ELEMENTS", 256)
    monkeypatch.setattr(kernels, "_MAX_BLOCK_D", 16)
    check_case(density_case("short last blocks", (2, 37, 21)), dtype)
    check_case(density_case("whole blocks", (2, 64, 32)), dtype)


def test_a_block_without_any_weight(monkeypatch):
    monkeypatch.setattr(kernels, "_ELEMENTS", 256)

    def without_the_first(x):
        return torch.cat([torch.full_like(x[:, :16], -torch.inf), x[:, 16:] - 300], 1)

    check_case(density_case("", (2, 40, 5), log_px_z=without_the_first), torch.float32)


def test_strides_of_the_others():
    mu, logvar = torch.randn(2, 5, 3).mT.requires_grad_().unbind()
    log_px_z, z, grad_output = torch.randn(3, 7), torch.randn(3, 7, 5), torch.ones(1).expand(3)
    value = importance_weighted_log_prob(log_px_z, z, mu, logvar)
    plain = [x.detach().contiguous().requires_grad_() for x in (mu, logvar)]
    expected = importance_weighted_log_prob(log_px_z, z, *plain)
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value, (mu, logvar), grad_output)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, plain, grad_output))


def test_infinite_and_undefined_weights():
    z = torch.randn(3, 40, 5)
    log_px_z = torch.randn(3, 40)
    log_px_z[0, 2], log_px_z[1, 3], log_px_z[2, 4] = torch.nan, torch.inf, -torch.inf
    value = importance_weighted_log_prob(log_px_z, z, torch.zeros(3, 5), torch.zeros(3, 5))
    assert value[0].isnan()
    assert value[1] == torch.inf
    assert value[2].isfinite()
