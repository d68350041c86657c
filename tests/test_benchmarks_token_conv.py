"""The cases of `fastmix bench token_conv`: peers compute the same, on sizes that take no time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastmix.benchmarks import bench_token_conv, harness
from fastmix.benchmarks.harness import BOTH, FORWARD, OURS
from fastmix.benchmarks.limits import Limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["depthwise", "lightweight", "dynamic"])
def test_peers_compute_the_same(kind, dtype):
    bench = bench_token_conv._conv(kind, (2, 9, 16), 5, dtype)
    assert harness.failure_of(bench, "cpu") is None
    eager = tuple(peer for peer in bench.peers if not peer.name.startswith("torch.compile"))
    assert len(eager) == len(bench.peers) - 1
    limits = Limits(copy_gbps=10.0, product_gflops=100.0, exp_gops=1.0)
    outcome = harness.run_case(dataclasses.replace(bench, peers=eager), "cpu", limits, 0.0, full=True)
    assert outcome.not_run == []
    timed = {(entry["provider"], entry["mode"]) for entry in outcome.figures}
    assert timed == {(name, mode) for name in (OURS, *(peer.name for peer in eager)) for mode in (FORWARD, BOTH)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct(device):
    cases = bench_token_conv.cases(device)
    assert len({(bench.case.name, bench.dtype) for bench in cases}) == len(cases)
    assert device == "cuda" or sum(bench.headline for bench in cases) == 4
