"""The cases of `fastmix bench token_mixing`: peers compute the same, on sizes that take no time; a mixer's share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastmix.benchmarks import bench_token_mixing, harness, mixer_models, models, peers
from fastmix.benchmarks.harness import BOTH, FORWARD, OURS
from fastmix.benchmarks.limits import Limits

LIMITS = Limits(copy_gbps=10.0, product_gflops=100.0, exp_gops=1.0)
PACKAGES = ("timm", "mlp_mixer_pytorch", "g_mlp_pytorch")
SMALL = {
    "mlp": lambda dtype: bench_token_mixing._mlp((3, 9, 20, 7), dtype),
    "resmlp": lambda dtype: bench_token_mixing._resmlp((3, 9, 20), dtype),
    "gating": lambda dtype: bench_token_mixing._gating((3, 9, 20), dtype),
    "linear": lambda dtype: bench_token_mixing._linear((3, 9, 20), dtype),
}


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_compute_the_same(kind, dtype):
    bench = SMALL[kind](dtype)
    assert harness.failure_of(bench, "cpu") is None
    eager = tuple(peer for peer in bench.peers if not peer.name.startswith("torch.compile"))
    outcome = harness.run_case(dataclasses.replace(bench, peers=eager), "cpu", LIMITS, 0.0, full=True)
    assert {entry["reason"] for entry in outcome.not_run} <= {f"{package} is not installed" for package in PACKAGES}
    timed = {(entry["provider"], entry["mode"]) for entry in outcome.figures}
    assert {(OURS, FORWARD), (OURS, BOTH), ("eager, products", BOTH), ("eager, transposes", FORWARD)} <= timed


def test_limit_counts_exponentials():
    shape = (2, 10, 30, 40)
    bench = bench_token_mixing._mlp(shape, torch.float32)
    hidden, flops = 2 * 40 * 30, 4 * 2 * 10 * 30 * 40
    assert (bench.exps[FORWARD], bench.flops[FORWARD]) == (hidden, flops)
    # The products and the activation follow each other; the copy goes on beside them.
    assert LIMITS.milliseconds(0, flops, hidden) == pytest.approx(1e3 * (flops / 100e9 + hidden / 1e9))
    assert LIMITS.milliseconds(10**9, flops, hidden) == pytest.approx(100.0)
    assert dataclasses.replace(LIMITS, exp_gops=None).milliseconds(0, flops, hidden) == pytest.approx(
        1e3 * flops / 1e11
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct(device):
    cases = bench_token_mixing.cases(device)
    assert len({(bench.case.name, bench.dtype) for bench in cases}) == len(cases)
    assert all(bench.modes == (FORWARD, BOTH) for bench in cases)
    labels = [model.label for full in (False, True) for model in bench_token_mixing.models(device, full)]
    assert len(set(labels)) == 4


@pytest.mark.skipif(peers.missing("timm") is not None, reason="timm is not installed")
@pytest.mark.parametrize("training", [False, True])
def test_share_of_a_mixer(training):
    model = mixer_models.mixer("mixer_s32_224", 1, 1, torch.float32, "cpu", training)
    figures = models.measure_model(model, "cpu", rounds=2)
    assert 0 < figures["share"] < 1
    assert figures["layers_before_ms"] < figures["before_ms"]
