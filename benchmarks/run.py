"""The body of `fastmix bench`: runs the ops' cases, prints the comparison, writes JSON and the report."""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastmix import doctor
from fastmix.benchmarks import memory, provenance, report
from fastmix.benchmarks.harness import OURS, BenchCase, failure_of, run_case
from fastmix.benchmarks.limits import Limits, measure_limits
from fastmix.benchmarks.models import ModelCase, measure_model

# Seconds of timing per case and mode, and rounds of a whole model.
QUICK_BUDGET_S, FULL_BUDGET_S = 0.1, 2.0
QUICK_MODEL_ROUNDS, FULL_MODEL_ROUNDS = 5, 15


def main(
    ops: list[str], device: str, full: bool, threads: int | None, json_file: Path | None, report_folder: Path | None
) -> int:
    """Returns the exit status: 1 if a case fails its parity check, else 0."""
    document = run(ops, device, full, threads or torch.get_num_threads())
    print(report.terminal_text(document))
    if json_file is not None:
        write_json(document, json_file)
        print(f"wrote {json_file}")
    if report_folder is not None:
        print(f"wrote {report.write(document, report_folder)}")
    for failure in document["failures"]:
        print(f"FAILED, nothing recorded: {failure['case']}: {failure['reason']}", file=sys.stderr)
    return 1 if document["failures"] else 0


def run(ops: list[str], device: str, full: bool, threads: int) -> dict[str, Any]:
    """All cases of the ops as one document: how it was run, records, what was not run and why."""
    session = Session(device, full, threads)
    modules = {op: bench_module(op) for op in ops}
    work = []
    for op, module in modules.items():
        for index, bench in enumerate(module.cases(device)):
            if full or not bench.full_only:
                work.append(functools.partial(session.case, op, module.__name__, index, bench))
        if hasattr(module, "models"):
            work += [functools.partial(session.model, model) for model in module.models(device, full)]
    threads_before = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?!fastmix )")  # what peers remark
            for step in tqdm(work, desc="fastmix bench", unit="case", disable=None):
                step()
    finally:
        torch.set_num_threads(threads_before)
    return session.document


def bench_module(op: str):
    return importlib.import_module(f"fastmix.benchmarks.bench_{op}")


class Session:
    """A run and its document."""

    def __init__(self, device: str, full: bool, threads: int) -> None:
        self.device, self.full, self.threads = device, full, threads
        self.limits: dict[tuple[int, torch.dtype], Limits] = {}
        self.document: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "mode": "full" if full else "quick",
            "device": provenance.device_name(device),
            "threads": threads,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
            "versions": provenance.versions(),
            "revision": provenance.revision(),
            "answers": [list(row) for row in doctor.answers() if row[1] == device],
            "limits": [],
            "records": [],
            "models": [],
            "not_run": [],
            "failures": [],
        }

    def case(self, op: str, module: str, index: int, bench: BenchCase) -> None:
        place = {"op": op, "case": bench.case.name, "dtype": bench.dtype_name}
        torch.set_num_threads(self.threads)
        if bench.missing:
            self.document["not_run"] += [
                place | {"threads": self.threads, "provider": OURS, "mode": mode, "reason": bench.missing}
                for mode in bench.modes
            ]
        elif failure := failure_of(bench, self.device):
            self.document["failures"].append(place | {"threads": self.threads, "reason": failure})
        else:
            for threads in sorted({1, self.threads} if bench.headline and self.device == "cpu" else {self.threads}):
                self._time(place, module, index, bench, threads)

    def _time(self, place: dict[str, str], module: str, index: int, bench: BenchCase, threads: int) -> None:
        torch.set_num_threads(threads)
        outcome = run_case(
            bench,
            self.device,
            self._limits(threads, bench.dtype),
            FULL_BUDGET_S if self.full else QUICK_BUDGET_S,
            self.full,
            self._peak_mib(module, index, threads),
        )
        origin = {
            "device": self.document["device"],
            "versions": self.document["versions"],
            "revision": self.document["revision"],
            "source_digest": provenance.source_digest(place["op"], self.device),
        }
        self.document["records"] += [place | {"threads": threads} | figures | origin for figures in outcome.figures]
        self.document["not_run"] += [place | {"threads": threads} | entry for entry in outcome.not_run]

    def model(self, model: ModelCase) -> None:
        torch.set_num_threads(self.threads)
        place = {"op": model.op, "model": model.label, "threads": self.threads}
        if model.missing:
            self.document["models"].append(place | {"not_run": model.missing})
            return
        try:
            figures = measure_model(model.make(), self.device, FULL_MODEL_ROUNDS if self.full else QUICK_MODEL_ROUNDS)
        except Exception as error:
            self.document["failures"].append(
                {"op": model.op, "case": model.label, "reason": f"{type(error).__name__}: {error}"}
            )
        else:
            self.document["models"].append(place | figures)

    def _limits(self, threads: int, dtype: torch.dtype) -> Limits:
        key = (threads, dtype if self.device == "cuda" else torch.float32)
        if key not in self.limits:
            self.limits[key] = limits = measure_limits(self.device, key[1])
            self.document["limits"].append(
                {"threads": threads, "dtype": str(key[1]).removeprefix("torch."), **vars(limits)}
            )
        return self.limits[key]

    def _peak_mib(self, module: str, index: int, threads: int):
        if self.device == "cuda":
            return lambda provider, mode, call: memory.on_gpu(call)
        if self.full and sys.platform == "linux":  # a child process per figure takes long
            return lambda provider, mode, call: memory.in_child(module, index, provider, mode, threads)
        return None


def write_json(document: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
