"""WordNet's nouns, which `kgclue.py`, `entity_retrieval.py` and `similarity.py` read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Noun(NamedTuple):
    """A synset: nouns of one meaning."""

    offset: str  # its key
    file: int  # the lexicographer's file, 3 … 28
    names: list[str]
    pointers: list[tuple[str, str]]  # (kind, offset) of other nouns
    gloss: str


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="a folder with data.noun")


def nouns(folder: Path) -> Iterator[Noun]:
    """The format is that of wndb(5WN)."""
    path = folder / "data.noun"
    if not path.is_file():
        raise SystemExit(f"no WordNet at {path}: install Debian's wordnet-base, or name its folder by --wordnet")
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(" "):  # the licence
                yield _noun(line)


def _noun(line: str) -> Noun:
    data, gloss = line.split(" | ")
    offset, file, _, count, *fields = data.split()
    end = 2 * int(count, 16)
    names = [name.replace("_", " ") for name in fields[:end:2]]
    _, *others = fields[end:]
    pointers = [(others[i], others[i + 1]) for i in range(0, len(others), 4) if others[i + 2] == "n"]
    return Noun(offset, int(file), names, pointers, gloss.strip())
