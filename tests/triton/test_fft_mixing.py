"""Dense Fourier mixing in Triton's interpreter, which serves fp32 and fp16 (its bfloat16 arithmetic is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

from fastmix.ops import fft_mixing as ops
from fastmix.reference import fft_mixing as reference
from fastmix.testing.parity import check_parity
from tritonkernels import _dft, fft_mixing

DTYPES = [torch.float32, torch.float16]
SMALL = [(1, 1), (1, 8), (8, 1), (2, 2), (2, 3), (3, 5), (4, 4), (4, 6), (6, 4), (17, 16)]
LARGER = [(16, 12), (31, 9), (64, 20), (65, 18), (100, 7), (127, 31)]
NONSENSE = -(1 << 30)  # for integer memory that nobody wrote


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch):
    empty = torch.empty

    def filled(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else NONSENSE)

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x: filled(x.shape, dtype=x.dtype, device=x.device))


def check(x, scale=1.0):
    def plain(dtype):
        return (torch.fft.fft2(x.to(dtype)).real * scale).to(torch.float64 if dtype == torch.float64 else x.dtype)

    actual = fft_mixing.fourier_mixing_dense(x, scale)
    check_parity("fourier_mixing_dense", actual, plain(torch.float32), plain(torch.float64), independent=1)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "s", "h"), [*((3, s, h) for s, h in SMALL), *((1, s, h) for s, h in LARGER)])
def test_lengths(batch, s, h, dtype):
    check(torch.randn(batch, s, h).to(dtype))


@pytest.mark.parametrize(("s", "h", "dtype"), [(197, 96, torch.float16), (12, 260, torch.float32)])
def test_more_than_one_tile(s, h, dtype):
    check(torch.randn(1, s, h).to(dtype))


def test_a_half_tile_at_every_edge():
    check(torch.randn(1, 22, 134).half())


def test_the_tiles_of_a_long_sequence():
    check(torch.randn(1, 264, 10).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype):
    assert fft_mixing.fourier_mixing_dense(torch.ones(0, 5, 4, dtype=dtype), 1.0).shape == (0, 5, 4)


def test_scale():
    check(torch.randn(1, 6, 8), scale=-0.125)


def test_groups_do_not_mix(monkeypatch):
    monkeypatch.setattr(fft_mixing, "_WORKSPACE_BYTES", 2 * fft_mixing._workspace_bytes(6, 8, True))
    assert fft_mixing._group(5, 6, 8, True) == 2
    check(torch.randn(5, 6, 8).half())


@pytest.mark.parametrize(("size", "dtype"), [(1e4, torch.float16), (3e-7, torch.float16), (1e30, torch.float32)])
def test_sizes_far_from_one(size, dtype):
    check((torch.randn(2, 12, 16) * size).to(dtype), scale=1 / 192)


def test_the_largest_half():
    x = torch.full((2, 16, 12), 65504.0).half()
    x[1] *= torch.randn(16, 12).sign()
    check(x, scale=1 / 192)


@pytest.mark.parametrize("row", [0, 3, 6, 9])
def test_rows_of_very_different_sizes(row):
    x = torch.randn(2, 12, 16) * 1e-3
    x[1, row] *= 1e6
    check(x.half(), scale=1 / 16)


def test_a_large_mean():
    check(torch.randn(1, 64, 32).half() + 1, scale=1 / 32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_sample(dtype, value):
    x = torch.randn(3, 8, 6).to(dtype)
    x[1, 1, 1] = value
    y = fft_mixing.fourier_mixing_dense(x, 1.0)
    assert not y[1].isfinite().any()
    assert y[::2].isfinite().all()
    assert y[1].isnan().all() or value == float("inf")


def test_deterministic():
    x = torch.randn(2, 12, 10).half()
    first, second = (fft_mixing.fourier_mixing_dense(x, 1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_supports():
    assert fft_mixing.supports(512, 768, torch.bfloat16)
    assert not fft_mixing.supports(1025, 768, torch.bfloat16)
    assert not fft_mixing.supports(512, 768, torch.float64)


def test_tables_are_kept():
    cpu = torch.device("cpu")
    assert _dft.dft_tables(12, False, cpu, torch.float16) is _dft.dft_tables(12, False, cpu, torch.float16)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_op_on_a_gpu_chooses_it(norm, monkeypatch):
    """What Python does around the kernels: leading dimensions, strides, the scale."""
    x = torch.randn(2, 3, 17, 12).half().transpose(2, 3)
    called = []
    dense = fft_mixing.fourier_mixing_dense
    monkeypatch.setattr(fft_mixing, "fourier_mixing_dense", lambda *args: called.append(args) or dense(*args))
    y = ops._fourier_mixing_cuda(x, None, ops._EXPONENTS[norm])
    assert called
    check_parity(norm, y, *(reference.fourier_mixing(t, norm=norm) for t in (x, x.double())), independent=2)
