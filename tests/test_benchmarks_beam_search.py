"""The cases of `fastmix bench beam_search`: peers compute the same, on settings that take no time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastmix.benchmarks import bench_beam_search, harness, peers, trie_data, trie_peers
from fastmix.benchmarks.harness import FORWARD, OURS
from fastmix.benchmarks.limits import Limits

LIMITS = Limits(copy_gbps=10.0, product_gflops=100.0)
SMALL_SID = dataclasses.replace(trie_data.SID, beams=5, vocab_size=40, count=3000)
SMALL_TEXT = dataclasses.replace(trie_data.TEXT, batch=3, beams=4, vocab_size=300, count=2000)


@pytest.mark.parametrize(
    ("setting", "depth"),
    [(SMALL_SID, 1), (SMALL_SID, 2), (SMALL_SID, 3), (SMALL_SID, 9), (SMALL_TEXT, 1), (SMALL_TEXT, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_peers_compute_the_same(setting, depth, dtype):
    bench = bench_beam_search._step(setting, depth, dtype, "cpu")
    assert harness.failure_of(bench, "cpu") is None
    outcome = harness.run_case(bench, "cpu", LIMITS, 0.0)
    assert {entry["reason"] for entry in outcome.not_run} <= {"transformers is not installed"}
    assert sum(entry["yardstick"] for entry in outcome.figures) == 1 + (dtype == torch.bfloat16)


@pytest.mark.skipif(peers.missing("transformers") is not None, reason="transformers is not installed")
def test_search_peer_finds_the_same():
    bench = bench_beam_search._search(dataclasses.replace(trie_data.TEXT, batch=2, beams=3, count=300), "cpu")
    assert harness.failure_of(bench, "cpu") is None
    outcome = harness.run_case(bench, "cpu", LIMITS, 0.0)
    assert [entry["provider"] for entry in outcome.figures] == [OURS, "generate(prefix_allowed_tokens_fn)"]


def test_index_cases():
    for bench in (bench_beam_search._build(2000), bench_beam_search._open(2000)):
        assert harness.failure_of(bench, "cpu") is None
        (figures,) = harness.run_case(bench, "cpu", LIMITS, 0.0).figures
        assert 16 < figures["bytes_per_key"] < 32
        assert figures["ratio_to_limit"] is None


@pytest.mark.skipif(peers.missing("marisa_trie") is not None, reason="marisa-trie is not installed")
@pytest.mark.parametrize("build", [trie_peers.marisa_keys, trie_peers.marisa_records])
def test_marisa_gets_every_key(build):
    assert len(build(trie_data.random_matrix(1000))) == 1000


def test_beams_stand_at_their_prefixes():
    trie, prefixes = trie_data.trie(SMALL_TEXT), trie_data.prefixes(SMALL_TEXT, 2)
    assert trie_data.nodes(SMALL_TEXT, 2).view(-1).tolist() == [trie.walk(prefix) for prefix in prefixes]
    assert all(len(prefix) == 1 and prefix in trie for prefix in prefixes)
    root = trie_peers.dict_of_keys(SMALL_TEXT)
    for prefix, tokens in zip(prefixes, trie_data.children(SMALL_TEXT, 2), strict=True):
        assert sorted(trie_peers.allowed_tokens(root, prefix)) == tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_beam_search_cases_are_distinct(device):
    cases = bench_beam_search.cases(device)
    assert len({(bench.case.name, bench.dtype) for bench in cases}) == len(cases)
    assert all(bench.modes == (FORWARD,) for bench in cases)
