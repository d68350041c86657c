"""The cases of `fastmix bench` on per-sample gradients: peers compute the same, on sizes that take no time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastmix.benchmarks import (
    bench_affine_grad_norm,
    bench_conv_grad_norm,
    bench_embedding_grad_norm,
    bench_grad_norm,
    harness,
    penalty_peers,
    per_sample_peers,
)
from fastmix.benchmarks.grad_norm_models import cnn_setting, lm_setting, losses, mlp_setting
from fastmix.benchmarks.harness import BOTH, FORWARD, OURS
from fastmix.benchmarks.limits import Limits

# Opacus has hooks on layers whose input needs no gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.usefixtures("global_flags"),
]

LIMITS = Limits(copy_gbps=10.0, product_gflops=100.0, exp_gops=1.0)
MODULES = (bench_grad_norm, bench_conv_grad_norm, bench_affine_grad_norm, bench_embedding_grad_norm)
PACKAGES = ("opacus", "backpack", "torchjd")
LAYERS = {
    "norm, Gram form": lambda dtype: bench_grad_norm._norm_sq((3, 5, 8, 6), dtype),
    "norm, direct form": lambda dtype: bench_grad_norm._norm_sq((3, 40, 8, 6), dtype),
    "weight gradient": lambda dtype: bench_grad_norm._weight_grad((3, 5, 8, 6), dtype),
    "gram": lambda dtype: bench_grad_norm._gram((3, 5, 8, 6), dtype),
    "conv": lambda dtype: bench_conv_grad_norm._conv((3, 4, 8, 8), 6, dtype),
    "grouped conv": lambda dtype: bench_conv_grad_norm._conv((3, 4, 8, 8), 4, dtype, groups=2),
    "LayerNorm": lambda dtype: bench_affine_grad_norm._affine("LayerNorm", (3, 5, 6, 1), (3, 5, 1), dtype),
    "InstanceNorm": lambda dtype: bench_affine_grad_norm._affine("InstanceNorm", (3, 1, 6, 7), (3, 1, 6), dtype),
    "embedding": lambda dtype: bench_embedding_grad_norm._embedding((3, 9, 4), dtype),
}
SETTINGS = {
    "LM": lm_setting(3, 7, 16),
    "MLP": mlp_setting(5, 12),
    "tokens": mlp_setting(3, 12, 4),
    "CNN": cnn_setting(4, 8, 6),
}
TASKS = {
    "norms": bench_grad_norm._norms,
    "clip": bench_grad_norm._clip,
    "gram": bench_grad_norm._model_gram,
    "private step": bench_grad_norm._private_step,
    "parameter penalty": bench_grad_norm._parameter_penalty,
}
# BackPACK knows no LayerNorm and no Embedding, and leaves them without norms.
UNABLE = {("norms", "LM"): {"backpack, BatchL2Grad"}}
# PyTorch's attention has no double backward on a CPU.
IMPOSSIBLE = {("parameter penalty", "LM")}


def run(bench):
    """Provider → modes timed, and provider → reason."""
    assert harness.failure_of(bench, "cpu") is None
    outcome = harness.run_case(bench, "cpu", LIMITS, 0.0, full=True)
    timed = {(entry["provider"], entry["mode"]) for entry in outcome.figures}
    not_installed = {f"{package} is not installed" for package in PACKAGES}
    return timed, {e["provider"]: e["reason"] for e in outcome.not_run if e["reason"] not in not_installed}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_peers_of_layers_compute_the_same(kind):
    bench = LAYERS[kind](torch.float32)
    timed, unable = run(bench)
    assert not unable
    assert timed == {(provider.name, mode) for provider in bench.providers for mode in bench.modes}
    assert bench.modes == ((FORWARD, BOTH) if kind.startswith("norm,") else (FORWARD,))


@pytest.mark.parametrize(("task", "model"), [pair for pair in product(TASKS, SETTINGS) if pair not in IMPOSSIBLE])
def test_peers_of_models_compute_the_same(task, model):
    bench = TASKS[task](SETTINGS[model])
    timed, unable = run(bench)
    assert unable.keys() <= UNABLE.get((task, model), set()), unable
    needed = {provider.name for provider in bench.providers if provider.missing is None}
    assert needed - unable.keys() == {provider for provider, _ in timed}


def test_peers_of_input_gradients_compute_the_same():
    setting = penalty_peers.critic_setting(3, 2)
    timed, unable = run(bench_grad_norm._input_norms(setting))
    assert not unable
    assert {OURS, "forward, autograd.grad", "vmap(grad)"} <= {provider for provider, _ in timed}


def test_clipping_changes_some_samples():
    """Where no sample is longer than the bound, or all are, a case would compare less than it says."""
    setting = SETTINGS["LM"]
    inputs = setting.inputs(torch.Generator().manual_seed(0))
    grads = per_sample_peers.loop_grads(*_model_and_batch(setting, inputs))
    assert (per_sample_peers.total_norms(*grads) > per_sample_peers.MAX_NORM).any()


def test_losses_are_those_of_the_mean():
    output, y = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = torch.nn.functional.cross_entropy(output.transpose(1, 2), y)
    torch.testing.assert_close(losses(output, y).mean(), expected)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct(module, device):
    cases = module.cases(device)
    assert len({(bench.case.name, bench.dtype) for bench in cases}) == len(cases)
    assert all(provider.missing is None or "not installed" in provider.missing for b in cases for provider in b.peers)


def _model_and_batch(setting, inputs):
    x, y = inputs.pop("x"), inputs.pop("y")
    return setting.model(inputs), x, y
