"""examples/digits_gan.py: what it says of the methods, and its score."""

from __future__ import annotations

import pytest
import torch

from fastmix.per_sample import input_gradient_norms


@pytest.fixture(scope="module")
def digits_gan(example):
    with example("digits_gan", "sklearn", "matplotlib") as module:
        yield module


@pytest.mark.usefixtures("ordinary_memory", "threads_kept")
def test_trains_side_by_side(digits_gan, tmp_path, capsys):
    """Every generator learns; what is normalised is not steeper than 1, however steep the discriminator becomes."""
    path = tmp_path / "curves.png"
    runs = digits_gan.main(["--steps", "40", "--width", "8", "--rate", "2e-3", "--points", "1", "--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {method} " in printed for method in (*runs, "training images"))
    assert list(runs) == ["gn", "gran", "penalty", "none"]
    real = digits_gan.load(lowest=-1.0).train_images[:64]
    for method, run in runs.items():
        assert run.images.shape == (1437, 1, 8, 8)
        assert run.score.distance < 0.8 * run.distances[0][1]
        with torch.no_grad():
            for p in run.gan.discriminator[-1].parameters():
                p.mul_(100)
        steepness = input_gradient_norms(run.gan.critic, torch.cat([real, run.images[:64]])).max()
        if method in ("gn", "gran"):
            assert steepness <= 1 + 8 * torch.finfo(torch.float32).eps
        else:
            assert steepness > 10


def test_starts_are_the_same(digits_gan):
    """The seed decides, not the method."""
    first, *others = (digits_gan.Gan(method, 4, 1e-3, 10, seed=3) for method in digits_gan.METHODS)
    for other in others:
        for model in ("generator", "discriminator"):
            states = (getattr(gan, model).state_dict() for gan in (first, other))
            torch.testing.assert_close(*states, rtol=0, atol=0)


def test_generator_step_leaves_the_discriminator(digits_gan):
    """The discriminator changes by its own loss alone, and stays trainable."""
    gan = digits_gan.Gan("gn", 4, 1e-3, 10, seed=0)
    real, z = torch.rand(8, 1, 8, 8), torch.randn(2, 8, digits_gan.LATENT)
    gan.step(real, z)
    expected = digits_gan.Gan("gn", 4, 1e-3, 10, seed=0)
    with torch.no_grad():
        fake = expected.generator(z[0])
    expected.loss(real, fake).backward()
    expected.adams[0].step()
    torch.testing.assert_close(gan.discriminator.state_dict(), expected.discriminator.state_dict())
    assert all(p.requires_grad for p in gan.discriminator.parameters())


def test_frechet_distance(digits_gan):
    """|μ − ν|² of two equal clouds, and the closed form where covariances commute."""
    a = torch.randn(500, 4, dtype=torch.float64)
    shift = torch.tensor([1.0, 2.0, 0.0, -2.0], dtype=torch.float64)
    assert digits_gan.frechet_distance(a, a + shift).item() == pytest.approx(9.0)
    # tr(A + 9A − 2·3A) = 4 tr A
    moved = (a.mean(0) - 3 * a.mean(0)).square().sum() + 4 * a.mT.cov().trace()
    assert digits_gan.frechet_distance(a, 3 * a).item() == pytest.approx(moved.item())


@pytest.mark.usefixtures("ordinary_memory", "threads_kept")
def test_judge(digits_gan):
    """Real digits are near, recognised and of ten kinds; one digit alone and noise are not."""
    torch.set_num_threads(1)
    data = digits_gan.load(lowest=-1.0)
    judge = digits_gan.Judge(data)
    assert judge.accuracy > 0.95
    real, one, noise = map(
        judge, (data.train_images, data.train_images[data.train_labels == 3], torch.rand(500, 1, 8, 8) * 2 - 1)
    )
    assert real.distance < one.distance / 10
    assert real.distance < noise.distance / 10
    assert real.sure > 0.95
    assert real.digits > 9.8
    assert one.digits < 1.5
