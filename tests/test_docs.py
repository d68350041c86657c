"""The documentation: the code of every page runs. `make docs` checks the rest, links too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md") if _blocks(page)))
def test_code_runs(page, tmp_path, monkeypatch, global_flags):
    """Each block alone, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    for block in _blocks(DOCS / page):
        exec(compile(block, page, "exec"), {})
