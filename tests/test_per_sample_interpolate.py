"""per_sample.interpolate: the points at which WGAN-GP penalises its critic."""

from __future__ import annotations

import pytest
import torch

from fastmix import per_sample

B = 4


def test_interpolate():
    torch.manual_seed(0)
    real, fake = torch.zeros(500, 2, 3), torch.ones(500, 2, 3, requires_grad=True)
    points = per_sample.interpolate(real, fake)
    assert not points.requires_grad
    weight = points[:, 0, 0]
    assert torch.equal(points, weight[:, None, None].expand(500, 2, 3))
    assert 0 < weight.min() < 0.02
    assert 0.98 < weight.max() <= 1
    assert 0.45 < weight.mean() < 0.55
    assert len(weight.unique()) > 490


def test_interpolate_is_on_the_line():
    real, fake = torch.randn(B, 5, dtype=torch.float64), torch.randn(B, 5, dtype=torch.float64)
    share = (per_sample.interpolate(real, fake) - fake) / (real - fake)
    torch.testing.assert_close(share, share[:, :1].expand(B, 5))
    assert len(share[:, 0].round(decimals=6).unique()) == B


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_interpolate_keeps_the_dtype(dtype):
    real = torch.randn(50, 2).to(dtype)
    points = per_sample.interpolate(real, torch.zeros_like(real))
    assert points.dtype == dtype
    assert (points.abs() <= real.abs()).all()
    assert (points != real).any()
    torch.testing.assert_close(per_sample.interpolate(real, real), real)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype):
    real, fake = torch.randn(50, 3).to(dtype), torch.randn(50, 3).to(dtype)
    points = per_sample.interpolate(real, fake, generator=torch.Generator().manual_seed(1))
    exact = per_sample.interpolate(real.float(), fake.float(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(points, exact.to(dtype))


def test_interpolate_draws_from_the_generator():
    real, fake = torch.randn(B, 3), torch.randn(B, 3)
    state = torch.random.get_rng_state()
    first, second = (
        per_sample.interpolate(real, fake, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, per_sample.interpolate(real, fake))
    assert per_sample.interpolate(real[:0], fake[:0]).shape == (0, 3)
    assert per_sample.interpolate(real[:, 0], fake[:, 0]).shape == (B,)


# Wrong input


@pytest.mark.parametrize(
    ("real", "fake", "kind", "message"),
    [
        (torch.ones(B, 3), [1.0], TypeError, "fake must be a Tensor, got list"),
        (torch.ones(B, 3).long(), torch.ones(B, 3), TypeError, "real must be a floating-point or complex"),
        (torch.ones(B, 3), torch.ones(B, 3).double(), TypeError, "fake must have real's dtype float32, got float64"),
        (torch.ones(B, 3), torch.ones(1, 3), ValueError, r"fake must have real's shape \[4, 3\], got \[1, 3\]"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"real must be \[B, ...\].*got a scalar"),
        (torch.ones(B, 3), torch.ones(B, 3, device="meta"), ValueError, "fake must be on the device of real, cpu"),
    ],
)
def test_wrong_pairs(real, fake, kind, message):
    with pytest.raises(kind, match=message):
        per_sample.interpolate(real, fake)


def test_a_gradient_that_is_no_number_shows():
    """A norm is 0 where the gradient is, and nowhere else."""
    x = torch.ones(3, 2)
    norms = per_sample.input_gradient_norms(lambda x: (x * torch.tensor([[1.0], [float("nan")], [0.0]])).sum(1), x)
    assert norms[1].isnan()
    assert norms[[0, 2]].tolist() == pytest.approx([2**0.5, 0.0])
