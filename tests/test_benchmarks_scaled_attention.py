"""The cases of `fastmix bench scaled_attention`: small ones, whose peers compute the same, and what is counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from fastmix.benchmarks import bench_scaled_attention as bench
from fastmix.benchmarks import harness
from fastmix.benchmarks.attention_peers import Flex, allowed_pairs
from fastmix.benchmarks.harness import BOTH, FORWARD, OURS
from fastmix.benchmarks.limits import Limits

LIMITS = Limits(copy_gbps=10.0, product_gflops=100.0, exp_gops=1.0)
SHAPE = (2, 4, 19, 19, 16)
PACKED = (1, 2, 30, 30, 16)
SMALL = {
    "full": (SHAPE, {}),
    "causal": (SHAPE, bench.CAUSAL),
    "prefix": (SHAPE, {"prefix_len": [0, 7]}),
    "T5 bias, fixed": (SHAPE, {"fixed": ("bias_weight",), **bench.T5}),
    "T5 bias": (SHAPE, bench.T5),
    "T5 decoder's bias": (SHAPE, {"bidirectional": False, **bench.CAUSAL, **bench.T5}),
    "one query": ((2, 4, 1, 19, 16), {"kv_heads": 2, **bench.FORWARD_ONLY}),
    "right padding": (SHAPE, {"key_lengths": [19, 5]}),
    "left padding, causal": (SHAPE, {"key_start": [0, 5], **bench.CAUSAL}),
    "window": (SHAPE, {"window_size": (3, 1)}),
    "query_scale": (SHAPE, {"query_scale": "T"}),
    "rotary, causal": (SHAPE, {**bench.LLAMA, "rotary": 16}),
    "packed, causal": (PACKED, {**bench._packed((0, 7, 8, 30)), **bench.CAUSAL}),
}


# What can't compute a case, in some mode.
REFUSALS = {
    "T5 bias": {"SDPA, flash": "it raised RuntimeError: No available kernel.  Aborting execution."},
    "T5 decoder's bias": {"SDPA, flash": "it raised RuntimeError: No available kernel.  Aborting execution."},
    "left padding, causal": {"eager": "it computes something else: nan% away from the reference"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(SMALL))
def test_peers_compute_the_same(name, dtype, monkeypatch):
    monkeypatch.setattr(Flex, "compiled", staticmethod(flex_attention))  # compiling takes seconds
    shape, options = SMALL[name]
    case = bench._attention(name, shape, dtype, **options)
    assert harness.failure_of(case, "cpu") is None
    outcome = harness.run_case(case, "cpu", LIMITS, 0.0, full=True)
    timed = {(entry["provider"], entry["mode"]) for entry in outcome.figures}
    refused = {entry["provider"]: entry["reason"] for entry in outcome.not_run}
    if "FlexAttention" in refused:
        assert refused.pop("FlexAttention") == "it has no gradient"
    assert ("FlexAttention", FORWARD) in timed
    if refused.get("SDPA, transformers' rotary") == "transformers is not installed":
        del refused["SDPA, transformers' rotary"]
    assert refused == REFUSALS.get(name, {})
    assert {(provider, mode) for provider in (OURS, "SDPA", "SDPA, math") for mode in case.modes} <= timed


@pytest.mark.parametrize("name", list(SMALL))
def test_only_attended_pairs_are_counted(name):
    (b, h, t, s, d), options = SMALL[name]
    case = bench._attention(name, (b, h, t, s, d), torch.float32, **options)
    inputs = case.case.inputs(torch.float32)
    names = ("prefix_len", "key_lengths", "key_start", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window_size")
    allowed = allowed_pairs((b, t, s), **{name: inputs[name] for name in names if name in inputs})
    pairs = h * int(allowed.expand(b, t, s).sum())
    assert case.exps == {FORWARD: pairs, BOTH: 2 * pairs}
    assert case.flops == {FORWARD: 4 * d * pairs, BOTH: 14 * d * pairs}


def test_who_attends_to_whom():
    """Query 7 of the causal prefix of 7 keys sees keys 0 to 7, query 2 all of the prefix."""
    allowed = allowed_pairs((2, 19, 19), prefix_len=torch.tensor([0, 7]))
    assert allowed[:, [2, 7]].sum(dim=-1).tolist() == [[3, 8], [7, 8]]


def test_bytes():
    case = bench._attention("", (3, 4, 5, 7, 8), torch.bfloat16, kv_heads=2)
    query, key = 2 * 3 * 4 * 5 * 8, 2 * 3 * 2 * 7 * 8
    # q, k, v, y; then q, k, v, y, dy, dq, dk, dv.
    assert case.moved_bytes == {FORWARD: 2 * query + 2 * key, BOTH: 6 * query + 6 * key}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct(device):
    cases = bench.cases(device)
    assert len({(case.case.name, case.dtype) for case in cases}) == len(cases)
    assert all(case.flops[FORWARD] > 0 and case.exps[BOTH] > 0 for case in cases)
