"""`fastmix trie`, as users call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from fastmix import Trie, cli
from fastmix.generation import _build

KEYS = [[3, 1, 2], [3], [3, 1], [], [9], [3, 1]]


@pytest.fixture
def fastmix(monkeypatch, capsys):
    """fastmix("trie", …) gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastmix", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "keys.jsonl"
    path.write_text("".join(f"{json.dumps(key)}\n" for key in KEYS))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "keys.trie"


def rows(text: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)


def test_build_from_lines(fastmix, lines, out):
    code, printed, errors = fastmix("trie", "build", lines, out)
    assert (code, errors) == (0, "")
    trie = Trie.load(out)
    assert printed == f"{out}: {trie}\n"
    assert list(trie) == sorted(set(map(tuple, KEYS)))
    assert trie.payloads([3, 1]).tolist() == [2, 5]
    assert sorted(file.name for file in out.parent.iterdir()) == ["keys.jsonl", "keys.trie"]
    assert fastmix("trie", "build", lines, out, "--vocab-size", 500)[0] == 0
    assert Trie.load(out).vocab_size == 500


def test_build_from_a_matrix(fastmix, tmp_path, out):
    matrix = np.array([[1, 2, -1], [3, 4, 5]], np.int32)
    np.save(tmp_path / "keys.npy", matrix)
    assert fastmix("trie", "build", tmp_path / "keys.npy", out, "--pad-id", -1)[0] == 0
    assert list(Trie.load(out)) == [(1, 2), (3, 4, 5)]
    assert fastmix("trie", "build", tmp_path / "keys.npy", out, "--pad-id", -1, "--substrings")[0] == 0
    assert list(Trie.load(out)) == list(Trie.from_substrings([[1, 2], [3, 4, 5]]))


def test_build_of_substrings(fastmix, lines, out):
    assert fastmix("trie", "build", lines, out, "--substrings")[0] == 0
    assert list(Trie.load(out)) == list(Trie.from_substrings(KEYS))
    lines.write_text("")
    assert fastmix("trie", "build", lines, out, "--substrings")[0] == 0
    assert len(Trie.load(out)) == 0


def test_info(fastmix, lines, out):
    fastmix("trie", "build", lines, out)
    code, printed, _ = fastmix("trie", "info", out)
    shown = {name: value.strip() for name, value in rows(printed).items()}
    assert code == 0
    assert shown == {
        "tries": "1",
        "vocabulary": "10",
        "bytes": str(out.stat().st_size),
        "keys": "5",
        "nodes": "5",
        "bytes a key": f"{out.stat().st_size / 5:.1f}",
        "of": "sequences",
        "longest": "3",
    }
    arena = Trie.concat([Trie.from_sequences(KEYS), Trie.from_substrings([1])])
    arena.save(out)
    printed = fastmix("trie", "info", out, "--verify")[1]
    assert rows(printed)["of"].strip() == "sequences, substrings of passages"


def test_lookup(fastmix, lines, out):
    fastmix("trie", "build", lines, out)
    for tokens, code, expected in [
        ([3, 1], 0, {"prefix": "yes", "key": "yes", "payloads": "2 5", "next tokens": "2"}),
        ([], 0, {"prefix": "yes", "key": "yes", "payloads": "3", "next tokens": "3 9"}),
        ([9], 0, {"prefix": "yes", "key": "yes", "payloads": "4", "next tokens": "none"}),
        ([1], 1, {"prefix": "no", "key": "no"}),
    ]:
        found = fastmix("trie", "lookup", out, *tokens)
        assert (found[0], {name: value.strip() for name, value in rows(found[1]).items()}) == (code, expected)
    Trie.concat([Trie.from_sequences([[token] for token in range(30)]), Trie.from_substrings([1])]).save(out)
    printed = fastmix("trie", "lookup", out)[1]
    assert [line for line in printed.splitlines() if line.startswith("trie")] == ["trie 0", "trie 1"]
    assert "18 19 … (30 in all)" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n[2, x]\n", "keys.jsonl, line 2: must be a list of ints, got '[2, x]'"),
        ("[1]\n\n", "keys.jsonl, line 2: must be a list of ints, got ''"),
        ("[1]\n[[2]]\n", "keys.jsonl, line 2: must be a list of ints, got '[[2]]'"),
        ("[true]\n", "keys.jsonl, line 1: must be a list of ints, got '[true]'"),
        ('{"a": 1}\n', "keys.jsonl, line 1: must be a list of ints"),
        ("[1]\n[2]\n[3, -4]\n", "keys.jsonl, line 3: must have tokens from 0 to 4294967294, got -4"),
    ],
)
def test_mistakes_in_lines_are_named(fastmix, lines, out, content, message):
    lines.write_text(content)
    code, printed, errors = fastmix("trie", "build", lines, out)
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_other_mistakes_are_named(fastmix, lines, out, tmp_path):
    np.save(tmp_path / "floats.npy", np.ones((2, 2)))
    np.save(tmp_path / "vector.npy", np.arange(3))
    np.save(tmp_path / "rows.npy", np.array([[1, 9]]))
    for arguments, message in [
        (["build", tmp_path / "none.jsonl", out], "No such file"),
        (["build", lines, tmp_path / "no folder" / "out"], "OUT must be a file in a folder that is there"),
        (["build", lines, tmp_path], "OUT must be a file in a folder that is there"),
        (["build", lines, out, "--pad-id", 0], "--pad-id is for a .npy file"),
        (["build", lines, out, "--vocab-size", 5], "line 5: must have tokens from 0 to 4, got 9"),
        (["build", tmp_path / "floats.npy", out], "floats.npy: sequences must be of an int dtype, got float64"),
        (["build", tmp_path / "vector.npy", out], "vector.npy: must be a 2-D array of ints, got shape (3,)"),
        (["build", tmp_path / "rows.npy", out, "--vocab-size", 5], "rows.npy: sequence 0 must have tokens from 0 to 4"),
        (["info", lines], "keys.jsonl: not a trie"),
        (["lookup", lines, 1], "keys.jsonl: not a trie"),
        (["lookup", out, "x"], "invalid int value: 'x'"),
        (["build", lines, out, "--vocab-size", 0], "must be a positive number, got '0'"),
    ]:
        code, _, errors = fastmix("trie", *arguments)
        assert code == 2
        assert message in errors
        assert "Traceback" not in errors
        assert not out.exists()


# Says when the build has begun: the bar is moved while it goes on. Behind a shell's & SIGINT is ignored, and Python
# leaves it so.
LOUD = """
import signal, sys
from fastmix import _trie_cli, cli

signal.signal(signal.SIGINT, signal.default_int_handler)

class Bar(_trie_cli.tqdm):
    def update(self, n=1):
        print("building", flush=True)

_trie_cli.tqdm = Bar
sys.exit(cli.main())
"""


@pytest.mark.skipif(_build._C is None, reason="no compiled builder in this installation")
def test_ctrl_c_leaves_nothing_behind(tmp_path, out):
    keys = np.random.default_rng(0).integers(0, 2048, (4_000_000, 8), dtype=np.uint16)
    np.save(tmp_path / "keys.npy", keys)
    command = [sys.executable, "-c", LOUD, "trie", "build", str(tmp_path / "keys.npy"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that it takes its time
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "building\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["keys.npy"]
