"""The body of `fastmix parity`: every case in every dtype on this machine, under the one tolerance rule."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from tqdm import tqdm

from fastmix.testing import OPS
from fastmix.testing.cases import Case, check_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Family:
    """The cases of one public function in one dtype."""

    cases: int = 0
    failures: int = 0
    worst: float = 0.0
    worst_case: str = ""


@dataclass
class Result:
    """(op, public function, dtype) → what came of its cases; and each failure's message."""

    families: dict[tuple[str, str, str], Family] = field(default_factory=lambda: defaultdict(Family))
    failures: list[str] = field(default_factory=list)


def main(ops: list[str], device: str) -> int:
    """Returns the exit status: 1 if a case breaks the tolerance rule, else 0."""
    result = check([case for op in ops for case in load_cases(op)], device)
    rows = []
    for key, family in result.families.items():
        verdict = f"{family.failures} FAILED" if family.failures else "ok"
        rows.append((*key, family.cases, f"{family.worst:.0%}", family.worst_case, verdict))
    headers = ("op", "function", "dtype", "cases", "worst share of the allowed error", "in case", "")
    print(tabulate(rows, headers=headers, tablefmt="simple"))
    for failure in result.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if result.failures else 0


def load_cases(op: str) -> list[Case]:
    return importlib.import_module(OPS[op]).CASES


def check(cases: list[Case], device: str) -> Result:
    result = Result()
    todo = [(case, dtype) for dtype in DTYPES for case in cases]
    for case, dtype in tqdm(todo, desc=f"fastmix parity, {device}", unit="case", disable=None):
        dtype_name = str(dtype).removeprefix("torch.")
        function, _, name = case.name.partition(" ")
        family = result.families[case.op, function, dtype_name]
        family.cases += 1
        try:
            margins = check_case(case, dtype, device)
        except Exception as error:  # an exception of the kernel is as much a failure as a wrong value
            family.failures += 1
            result.failures.append(f"{case.op}, {dtype_name}: {type(error).__name__}: {error}")
            continue
        for what, margin in margins.items():
            if margin.worst > family.worst:
                family.worst, family.worst_case = margin.worst, f"{name}, {what}"
    return result
