"""The benchmark harness on a small op: what is timed, what is not, and what the figures say."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import fastmix.benchmarks
from fastmix.benchmarks import (
    bench_fft_mixing,
    harness,
    memory,
    provenance,
    report,
    run,
)
from fastmix.benchmarks.harness import BOTH, FORWARD, OURS, BenchCase, Provider
from fastmix.benchmarks.limits import Limits
from fastmix.testing.cases import Case

LIMITS = Limits(copy_gbps=10.0, product_gflops=100.0)
RECORD_KEYS = {
    "op", "case", "dtype", "provider", "mode", "threads", "median_ms", "p20_ms", "p80_ms", "gbps", "gflops", "peak_mib",
    "ratio_to_best_peer", "ratio_to_limit", "yardstick", "bytes_per_key", "device", "versions", "revision",
    "source_digest",
}  # fmt: skip


def square(x):
    return x * x


def wrong(x):
    return x * x * 1.1


def raising(x):
    raise RuntimeError("out of luck")


def bench_case(function=square, peers=(), gradients=("x",), **options):
    case = Case(
        "fft_mixing",
        "square 4x8",
        function,
        square,
        lambda generator: {"x": torch.randn(4, 8, generator=generator, dtype=torch.float64)},
        independent=1,
        gradients=dict.fromkeys(gradients, 1),
    )
    sizes = {FORWARD: 256, BOTH: 512}
    return BenchCase(case, torch.float32, **{"moved_bytes": sizes, "flops": sizes, "peers": peers} | options)


@pytest.fixture
def small_session(monkeypatch):
    """`fastmix bench` of one small case in place of the op's."""

    def install(*benches):
        module = SimpleNamespace(__name__="small", cases=lambda device: list(benches))
        monkeypatch.setattr(run, "bench_module", lambda op: module)
        monkeypatch.setattr(run, "measure_limits", lambda device, dtype: LIMITS)
        monkeypatch.setattr(run, "QUICK_BUDGET_S", 0.001)

    return install


def test_providers_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    clock = iter(range(100))

    def time_once(call):
        call()
        return next(clock)

    times = harness.take_turns(calls, 3, time_once)
    assert order == list("abcabcabc")
    assert times == {"a": [0, 3, 6], "b": [1, 4, 7], "c": [2, 5, 8]}


def test_a_call_is_not_charged_for_what_a_long_one_left_behind():
    clock = {"short": iter([1, 4, 1, 4, 1]), "long": iter([20, 20, 20])}
    times = harness.take_turns({name: lambda name=name: name for name in clock}, 3, lambda call: next(clock[call()]))
    assert times == {"short": [1, 1, 1], "long": [20, 20, 20]}


def test_figures():
    times = {OURS: [2.0, 1.0, 3.0], "near": [4.0] * 3, "far": [8.0] * 3}
    figures = harness.summarise(times, LIMITS, moved_bytes=10_000_000, flops=10_000_000)
    ours = figures[OURS]
    assert (ours["median_ms"], ours["p20_ms"], ours["p80_ms"]) == pytest.approx((2.0, 1.4, 2.6))
    assert (ours["gbps"], ours["gflops"]) == pytest.approx((5.0, 5.0))
    assert ours["ratio_to_limit"] == pytest.approx(0.5)  # 1 ms for the bytes, 0.1 ms for the operations
    assert [figures[name]["ratio_to_best_peer"] for name in (OURS, "near", "far")] == pytest.approx([2.0, 1.0, 0.5])
    figures = harness.summarise(times, LIMITS, moved_bytes=0, flops=0, yardsticks={"near"})
    assert figures[OURS]["ratio_to_limit"] is None
    assert [figures[name]["ratio_to_best_peer"] for name in (OURS, "near", "far")] == pytest.approx([4.0, 2.0, 1.0])


def test_without_peers_there_is_no_ratio_to_them():
    assert harness.summarise({OURS: [1.0]}, LIMITS, 1, 1)[OURS]["ratio_to_best_peer"] is None


def test_peers_that_do_not_fit_are_not_timed():
    peers = (
        Provider("same", lambda x: x**2),
        Provider("absent", missing="absent is not installed"),
        Provider("forward only", lambda x: square(x).detach(), backward=False),
        Provider("slow to compile", square, full_only=True),
        Provider("wrong", wrong),
        Provider("wrong dtype", lambda x: square(x).double(), backward=False),
        Provider("NaN", lambda x: square(x) * float("nan")),
        Provider("infinite", lambda x: square(x) / 0.0),
        Provider("raising", raising),
    )
    outcome = harness.run_case(bench_case(peers=peers), "cpu", LIMITS, budget_s=0.001)
    timed = [(figures["provider"], figures["mode"]) for figures in outcome.figures]
    assert timed == [(OURS, FORWARD), ("same", FORWARD), ("forward only", FORWARD), (OURS, BOTH), ("same", BOTH)]
    reasons = {entry["provider"]: entry["reason"] for entry in outcome.not_run if entry["mode"] == FORWARD}
    assert reasons["wrong dtype"] == "it computes something else: torch.float64 [4, 8]"
    assert "computes something else" in reasons["infinite"]
    reasons = {entry["provider"]: entry["reason"] for entry in outcome.not_run if entry["mode"] == BOTH}
    assert reasons["absent"] == "absent is not installed"
    assert reasons["forward only"] == "it has no gradient"
    assert reasons["slow to compile"] == "only with --full"
    assert "computes something else" in reasons["wrong"]
    assert "computes something else" in reasons["NaN"]
    assert reasons["raising"] == "it raised RuntimeError: out of luck"
    everything = harness.run_case(bench_case(peers=peers), "cpu", LIMITS, budget_s=0.001, full=True)
    assert "slow to compile" in {figures["provider"] for figures in everything.figures}


def test_a_yardstick_may_compute_something_else():
    peers = (
        Provider("less", lambda x: x.sum(), yardstick=True, bytes_per_key=lambda: 7.5),
        Provider("raising", raising, yardstick=True),
    )
    outcome = harness.run_case(bench_case(peers=peers, gradients=()), "cpu", LIMITS, budget_s=0.001)
    figures = {entry["provider"]: entry for entry in outcome.figures}
    assert figures.keys() == {OURS, "less"}
    assert (figures["less"]["yardstick"], figures["less"]["bytes_per_key"]) == (True, 7.5)
    assert figures[OURS]["ratio_to_best_peer"] is None
    assert [entry["provider"] for entry in outcome.not_run] == ["raising"]


def test_infinities_must_be_at_the_same_places():
    def function(x):
        return torch.where(x > 0, x, float("-inf"))

    peers = (
        Provider("same", lambda x: x.masked_fill(x <= 0, float("-inf"))),
        Provider("other places", lambda x: x.masked_fill(x <= 1, float("-inf"))),
        Provider("other sign", lambda x: x.masked_fill(x <= 0, float("inf"))),
    )
    outcome = harness.run_case(bench_case(function, peers, gradients=()), "cpu", LIMITS, budget_s=0.001)
    assert [entry["provider"] for entry in outcome.figures] == [OURS, "same"]


def test_cases_that_are_left_out(small_session):
    small_session(bench_case(full_only=True), bench_case(missing="pigs do not fly"), bench_case(gradients=()))
    document = run.run(["fft_mixing"], "cpu", full=False, threads=1)
    assert [entry["mode"] for entry in document["records"]] == [FORWARD]
    assert {(entry["provider"], entry["reason"]) for entry in document["not_run"]} == {(OURS, "pigs do not fly")}
    assert len(document["not_run"]) == 2


def test_only_our_own_warnings_are_shown(small_session):
    def warn(remark):
        def function(x):
            warnings.warn(remark, stacklevel=1)
            return square(x)

        return function

    small_session(bench_case(warn("fastmix has no kernels"), peers=(Provider("peer", warn("a peer's remark")),)))
    with pytest.warns(UserWarning, match="fastmix") as shown:
        run.run(["fft_mixing"], "cpu", full=False, threads=1)
    assert {str(warning.message) for warning in shown} == {"fastmix has no kernels"}


@pytest.mark.parametrize("function", [wrong, raising])
def test_nothing_is_recorded_without_parity(function, small_session, tmp_path, capsys):
    small_session(bench_case(function, peers=(Provider("same", square),)))
    file = tmp_path / "records.json"
    assert run.main(["fft_mixing"], "cpu", False, 1, file, None) == 1
    assert "FAILED, nothing recorded: square 4x8" in capsys.readouterr().err
    document = json.loads(file.read_text())
    assert document["records"] == []
    assert len(document["failures"]) == 1


def test_record(small_session, tmp_path):
    threads = torch.get_num_threads()
    small_session(bench_case(peers=(Provider("same", square),), headline=True))
    file = tmp_path / "folder" / "records.json"
    assert run.main(["fft_mixing"], "cpu", False, 2, file, tmp_path / "report") == 0
    assert torch.get_num_threads() == threads
    document = json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["records.json"]
    assert all(set(record) == RECORD_KEYS for record in document["records"])
    assert [record["threads"] for record in document["records"]] == [1] * 4 + [2] * 4
    assert document["records"][0]["versions"]["torch"] == torch.__version__
    assert document["records"][0]["device"].startswith("cpu: ")
    assert (tmp_path / "report" / "report.md").exists()


def test_source_digest_follows_includes(monkeypatch, tmp_path):
    for name, text in {
        "fastmix/ops/op.py": "",
        "csrc/cpu/op.cpp": '#include "common/a.h"\n#include "near.h"\n',
        "csrc/cpu/near.h": "",
        "csrc/cpu/other.h": "",
        "csrc/common/a.h": '#include "common/b.h"\n',
        "csrc/common/b.h": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "fastmix")
    before = provenance.source_digest("op", "cpu")
    assert before.startswith("source:")
    (tmp_path / "csrc/cpu/other.h").write_text("changed")
    assert provenance.source_digest("op", "cpu") == before
    (tmp_path / "csrc/common/b.h").write_text("changed")
    assert provenance.source_digest("op", "cpu") != before
    assert provenance.revision() == ""  # no clone


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_child():
    cases = bench_fft_mixing.cases("cpu")
    index = next(i for i, bench in enumerate(cases) if bench.case.name == "fourier_mixing 4x512x384")
    peak = memory.in_child(bench_fft_mixing.__name__, index, "torch.fft.fft2", FORWARD, threads=1)
    output_mib = 4 * 512 * 384 * 4 / 2**20
    assert 2 * output_mib < peak < 8 * output_mib  # the complex result, and what it takes to get there


@pytest.mark.parametrize("shape", [(2, 6, 10), (3, 7, 9), (1, 1, 5), (2, 5, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fourier_peers_compute_the_same(shape, dtype):
    bench = bench_fft_mixing._fourier_mixing(shape, dtype, "cpu")
    peers = tuple(peer for peer in bench.peers if not peer.name.startswith("torch.compile"))
    assert harness.failure_of(bench, "cpu") is None
    outcome = harness.run_case(dataclasses.replace(bench, peers=peers), "cpu", LIMITS, 0.0, full=True)
    reasons = {entry["reason"] for entry in outcome.not_run}
    assert reasons <= {"it has no gradient", "ducc0 is not installed"}


def test_cases_are_distinct():
    cases = bench_fft_mixing.cases("cpu")
    assert len({(bench.case.name, bench.dtype) for bench in cases}) == len(cases)
    assert sum(bench.case.name.startswith("fourier_mixing") for bench in cases) == 9 * 4 + 1
    assert [bench.dtype_name for bench in cases if bench.headline] == ["float32", "bfloat16"] * 2


# the report


def record(provider, median, mode=FORWARD, case="square 4x8", **changes):
    entry = {
        "op": "fft_mixing", "case": case, "dtype": "float32", "provider": provider, "mode": mode, "threads": 2,
        "median_ms": median, "p20_ms": 0.95 * median, "p80_ms": 1.05 * median, "gbps": 1 / median, "gflops": 1.0,
        "peak_mib": None, "ratio_to_best_peer": 2.0 / median, "ratio_to_limit": 0.1 / median, "yardstick": False,
        "bytes_per_key": None, "device": "cpu: machine", "versions": {"torch": "2.13"}, "revision": "",
        "source_digest": "source:0",
    }  # fmt: skip
    return entry | changes


def document(records, **changes):
    entry = {
        "time": "now", "mode": "quick", "device": "cpu: machine", "threads": 2, "load": 0.0, "wait_policy": "PASSIVE",
        "versions": {"torch": "2.13"}, "revision": "", "answers": [["square", "cpu", "C++ avx2", ""]],
        "limits": [{"threads": 2, "dtype": "float32", **vars(LIMITS)}], "records": records, "models": [],
        "not_run": [], "failures": [],
    }  # fmt: skip
    return entry | changes


RECORDS = [
    record(OURS, 1.0),
    record("peer", 2.0),
    record("slow peer", 5.0),
    record(OURS, 4.0, BOTH),
    record("peer", 2.0, BOTH),
    record(OURS, 2.0, case="square 8x8"),
    record("peer", 2.1, case="square 8x8"),
]


def test_wins_and_losses_are_told(tmp_path):
    text = report.terminal_text(document(RECORDS))
    assert "2.00 faster" in text
    assert "0.50 SLOWER" in text
    assert "faster than the best peer in 1 of 3 measurements, even in 1, SLOWER in 1" in text
    path = report.write(document(RECORDS), tmp_path)
    rows = [line.replace(" ", "") for line in path.read_text().splitlines() if line.startswith("| 4x8")]
    assert any("|peer|2.000|0.50|**SLOWER**|" in row for row in rows)
    assert any("|peer|2.000|2.00|faster|" in row for row in rows)
    assert any("|1.000|2.000(2×)|5.000(5×)|" in row for row in rows)  # all providers
    assert (tmp_path / "fft_mixing.png").stat().st_size > 10_000 or "matplotlib is not installed" in path.read_text()


def test_an_op_without_gradients(tmp_path):
    records = [
        record(OURS, 1.0, bytes_per_key=21.0),
        record("peer", 30.0, bytes_per_key=100.0),
        record("less work", 0.5, yardstick=True),
        record(OURS, 7.0, case="index 9", ratio_to_limit=None, ratio_to_best_peer=None),
    ]
    text = report.terminal_text(document(records))
    assert "fwd+bwd" not in text
    assert "30.000 (30 ×)" in text
    assert "0.500 (0.5 ×)" in text
    assert "faster than the best peer in 1 of 2 measurements, even in 0, SLOWER in 0, without a peer in 1" in text
    text = report.write(document(records), tmp_path).read_text()
    assert "#### square\n" in text
    assert "less work (yardstick)" in text
    (row,) = (line.replace(" ", "") for line in text.splitlines() if line.startswith("| 4x8") and "faster" in line)
    assert row.endswith("|peer|30.000|2.00|faster|21.0|100.0|")
    assert any("|7.000|" in row and "|nopeer|" in row for row in text.replace(" ", "").splitlines())


def test_report_says_what_was_not_run(tmp_path):
    not_run = [
        {"op": "fft_mixing", "case": "square 4x8", "dtype": "float32", "threads": 2, "provider": "absent", "mode": mode,
         "reason": "absent is not installed"}
        for mode in (FORWARD, BOTH)
    ]  # fmt: skip
    model_case = {"op": "fft_mixing", "model": "a model", "threads": 2, "not_run": "transformers is not installed"}
    failures = [{"op": "fft_mixing", "case": "square 9x9", "dtype": "float32", "reason": "off\nby one"}]
    text = report.write(
        document(RECORDS, not_run=not_run, models=[model_case], failures=failures), tmp_path
    ).read_text()
    assert "absent is not installed" in text
    assert "1 × forward, 1 × forward+backward" in text
    assert "a model, 2 threads: not run: transformers is not installed" in text
    assert "off by one" in text


def test_model_section():
    figures = {
        "op": "fft_mixing", "model": "a model", "threads": 1, "rounds": 5, "before_ms": 100.0, "after_ms": 95.0,
        "layers_before_ms": 20.0, "layers_after_ms": 10.0, "share": 0.2, "layer_ratio": 2.0, "speedup": 1.053,
        "bound": 1.111, "part_of_bound": 0.5,
    }  # fmt: skip
    text = report.terminal_text(document(RECORDS, models=[figures]))
    assert "a model, 1 thread: 100.0 ms" in text
    assert "It gained 1.053 ×, 50% of the time there is to save" in text


@pytest.mark.parametrize(
    ("digest", "expected"),
    [("source:now", None), ("source:then", "fft_mixing: stale"), ("library:now", "can be told in a clone only")],
)
def test_committed_records_are_marked_stale(monkeypatch, tmp_path, digest, expected):
    monkeypatch.setattr(provenance, "source_digest", lambda op, device: "source:now")
    monkeypatch.setattr(report, "_plot", lambda *arguments: "")
    changes = {"device": "cuda: NVIDIA H200", "source_digest": digest}
    recorded = document([entry | changes for entry in RECORDS], device="cuda: NVIDIA H200")
    text = report.markdown(document(RECORDS), {"h200.json": recorded}, tmp_path)
    assert "## Recorded elsewhere: h200.json" in text
    assert ("stale" in text) == (expected is not None and "stale" in expected)
    assert expected is None or expected in text


def test_report_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastmix.benchmarks.plots", raising=False)
    monkeypatch.delattr(fastmix.benchmarks, "plots", raising=False)
    text = report.write(document(RECORDS), tmp_path).read_text()
    assert "No plot: matplotlib is not installed." in text
    assert not list(tmp_path.glob("*.png"))
