"""The README: its table is made from the registrations, its code runs. `python tests/test_readme.py` rewrites it."""

from __future__ import annotations

import re
from pathlib import Path

from tabulate import tabulate

from fastmix.ops import _route

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DTYPES = "float32, bfloat16, float16"
_TABLE = re.compile(r"(<!-- table: support .*? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def support_table() -> str:
    """op × device → language and dtypes, read from what the sources register."""
    rows = []
    for op in _route.kernels:
        if op.endswith("_bwd"):
            continue
        cpu = "C++" if _registers("cpu", op) else ""
        cuda = "CUDA C++" if _registers("cuda", f"{op}_out") else ""
        from_triton = re.compile(rf"from tritonkernels\S* import {op}")
        if any(from_triton.search(path.read_text()) for path in (ROOT / "fastmix/ops").glob("*.py")):
            cuda = " and ".join(filter(None, (cuda, "Triton")))
        rows.append((f"`{op}`", *(f"{language}: {DTYPES}" if language else "reference" for language in (cpu, cuda))))
    return tabulate(rows, headers=("op", "CPU", "GPU"), tablefmt="github") + "\n"


def _registers(folder: str, op: str) -> bool:
    return any(f'm.impl("{op}"' in path.read_text() for path in (ROOT / "csrc" / folder).iterdir())


def test_table_is_made_from_the_registrations():
    assert _TABLE.search(README.read_text())[2] == support_table()


def test_code_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    assert "fastmix computes" in capsys.readouterr().out


if __name__ == "__main__":
    README.write_text(_TABLE.sub(lambda match: match[1] + support_table() + match[3], README.read_text()))
