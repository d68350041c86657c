"""The examples run, and do what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastmix.testing.grad_norm import RELATIVE_ERROR
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

EXAMPLES = Path(__file__).parents[1] / "examples"
OPS = {
    "mixer": "token_mixing_mlp",
    "resmlp": "token_linear",
    "gmlp": "token_linear",
    "fnet": "fourier_mixing",
    "external_attention": "external_attention",
}


@contextlib.contextmanager
def example(name: str, *needed: str) -> Iterator[ModuleType]:
    """The example as a module."""
    if not EXAMPLES.is_dir():
        pytest.skip("not run in a clone")
    for package in needed:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def digits():
    with example("digits", "sklearn", "matplotlib") as module:
        yield module


@pytest.fixture(scope="module")
def per_sample_digits():
    with example("per_sample_digits", "sklearn") as module:
        yield module


@pytest.fixture
def threads_kept():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", OPS)
def test_digits(name, digits, tmp_path, capsys, ordinary_memory, threads_kept):
    """At least 95 % of the test images, and the same loss curve with and without kernels.

    Every step builds on the rounding of those before it. How far apart that may bring the curves is what the tolerance
    rule says: about as far from the float64 curve as the reference's is in float32.
    """
    plot = tmp_path / "digits.png"
    fast, reference = digits.main(["--model", name, "--epochs", "8", "--out", str(plot)])[name]
    assert f"| {name} " in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert fast.accuracy >= 0.95
    assert reference.accuracy >= 0.95
    oracle = digits.train(name, digits.load(), epochs=8, dtype=torch.float64)
    curves = (torch.tensor(run.losses) for run in (fast, reference))
    check_parity(f"{name}, loss", *curves, torch.tensor(oracle.losses).double(), factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("name", OPS)
def test_digits_runs_with_and_without_kernels(name, digits, recorded, assert_kernel):
    """What the two curves compare."""
    model = digits.MODELS[name][0]()
    x = torch.randn(2, 1, 8, 8)
    with recorded() as ops:
        model(x).sum().backward()
    assert_kernel(ops, OPS[name])
    with digits.without_kernels(), recorded() as ops:
        model(x).sum().backward()
    assert ops == []


def test_digits_takes_every_model(digits):
    assert digits.MODELS.keys() == OPS.keys()


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_per_sample_digits(name, per_sample_digits, capsys, ordinary_memory, threads_kept):
    """Norms of the whole epoch are the loop's, and importance sampling by them trains."""
    run = per_sample_digits.main(["--model", name, "--epochs", "2"])[name]
    assert f"| {name} " in capsys.readouterr().out
    assert run.difference <= RELATIVE_ERROR
    assert run.losses[0] > 2 * run.losses[1] > 2 * run.losses[2]
    assert all(scale > 0 for scale in run.noise_scales)
    assert run.accuracy >= 0.85
