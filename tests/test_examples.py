"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

EXAMPLES = Path(__file__).parents[1] / "examples"
OPS = {
    "mixer": "token_mixing_mlp",
    "resmlp": "token_linear",
    "gmlp": "token_linear",
    "fnet": "fourier_mixing",
    "external_attention": "external_attention",
}


@pytest.fixture(scope="module")
def digits():
    """The example as a module."""
    if not EXAMPLES.is_dir():
        pytest.skip("not run in a clone")
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = sys.modules["digits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["digits"]


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
