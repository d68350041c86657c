"""The example of several tasks: the weightings do what it says of them."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def multitask(example):
    with example("multitask", "sklearn", "matplotlib") as module:
        yield module


def test_multitask(multitask, tmp_path, capsys, threads_kept):
    """A plain sum drowns the digits; each weighting keeps them, and the sums too."""
    plot = tmp_path / "multitask.png"
    runs = multitask.main(["--epochs", "6", "--out", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| gradient_norm " in capsys.readouterr().out
    weighted = {name: run for name, run in runs.items() if run.ratios}
    assert set(weighted) == {"initial", "prior", "realtime", "generalized_mean", "gradient_norm"}
    for name, run in weighted.items():
        assert run.error < 0.7 * runs["plain sum"].error, name
        assert run.rmse < 0.5 * runs["digit alone"].rmse, name
        assert all(ratio > 10 for ratio in run.ratios), name  # the sum's loss is the larger one by far


def test_fixed_weights_stay(multitask, tmp_path, threads_kept):
    """Of the prior losses; of the first ones after the warm-up."""
    options = ["--epochs", "1", "--out", str(tmp_path / "multitask.png")]
    runs = multitask.main(options)
    assert len(set(runs["prior"].ratios)) == 1
    assert len(set(runs["initial"].ratios[5:])) == 1
    assert len(set(runs["realtime"].ratios)) > 5
