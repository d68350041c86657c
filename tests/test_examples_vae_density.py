"""The example of densities: the estimates behave as it says."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def vae_density(example):
    with example("vae_density", "sklearn", "matplotlib") as module:
        yield module


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_vae_density(likelihood, vae_density, tmp_path, capsys, ordinary_memory):
    """The bound rises with K, and digits are denser than what is none."""
    plot = tmp_path / "density.png"
    options = ["--epochs", "8", "--hidden", "64", "--samples", "1", "10", "200", "--out", str(plot)]
    densities = vae_density.main(["--likelihood", likelihood, *options])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| 200 |" in capsys.readouterr().out.replace("  ", "")
    means = [densities.mean("digits", k) for k in (1, 10, 200)]
    assert means == sorted(means)
    for kind in ("upside down", "shuffled"):
        assert densities.mean(kind, 200) < means[-1]
    assert densities.auc("shuffled", 200) > 0.99
    assert densities.auc("upside down", 200) > 0.7


def test_estimates_depend_on_the_seed_alone(vae_density, tmp_path):
    options = ["--epochs", "1", "--hidden", "16", "--samples", "3", "--out", str(tmp_path / "density.png")]
    first, second = (vae_density.main(options).of["digits"][3] for _ in range(2))
    assert first.equal(second)
