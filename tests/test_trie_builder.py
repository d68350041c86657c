"""The two builders: their tries hold the keys they were given, and are the same byte for byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from fastmix import Trie
from fastmix.generation import _build, _format

compiled = pytest.mark.skipif(_build._C is None, reason="no compiled builder in this installation")
quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@contextlib.contextmanager
def with_builder(name: str):
    kept = _build._C
    _build._C = kept if name == "compiled" else None
    try:
        yield
    finally:
        _build._C = kept


BUILDERS = [pytest.param("compiled", marks=[compiled, pytest.mark.kernel]), "numpy"]
# Of a few tokens, so that prefixes, duplicates and long common prefixes are frequent; of 70000, through a table.
TOKENS = st.sampled_from([0, 1, 2, 5]) | st.sampled_from([0, 65534, 65535, 69999])
SEQUENCES = st.lists(st.lists(TOKENS, max_size=9), max_size=150)
PASSAGES = st.lists(st.lists(TOKENS, max_size=40), max_size=6)
VOCABULARIES = st.sampled_from([None, 70000])


def assert_same_bytes(build) -> Trie:
    tries = []
    for name in ("compiled", "numpy"):
        with with_builder(name):
            tries.append(build())
    directories = [_format.entries(trie.arena.numpy()) for trie in tries]
    assert directories[0] == directories[1]
    assert torch.equal(tries[0].arena, tries[1].arena)
    return tries[0]


@pytest.mark.parametrize("builder", BUILDERS)
@quick
@hypothesis.given(SEQUENCES, VOCABULARIES)
def test_a_trie_holds_its_keys(builder, sequences, vocab_size):
    with with_builder(builder):
        trie = Trie.from_sequences(sequences, vocab_size=vocab_size)
    keys = sorted(set(map(tuple, sequences)))
    prefixes = {key[:end] for key in keys for end in range(len(key) + 1)}
    assert list(trie) == keys
    assert (len(trie), trie.num_nodes) == (len(keys), len(prefixes))
    for prefix in prefixes:
        assert trie.contains(prefix) == (prefix in keys)
        following = sorted({key[len(prefix)] for key in keys if key[: len(prefix)] == prefix and key != prefix})
        assert trie.children(prefix).tolist() == following
        assert trie.payloads(prefix).tolist() == [i for i, key in enumerate(sequences) if tuple(key) == prefix]


@pytest.mark.parametrize("builder", BUILDERS)
@quick
@hypothesis.given(PASSAGES, VOCABULARIES)
def test_a_trie_holds_its_substrings(builder, passages, vocab_size):
    with with_builder(builder):
        trie = Trie.from_substrings(passages, vocab_size=vocab_size)
    places = {}  # of each substring, its passages
    for number, passage in enumerate(passages):
        for start in range(len(passage)):
            for end in range(start + 1, min(len(passage), start + 12) + 1):
                places.setdefault(tuple(passage[start:end]), set()).add(number)
    substrings = {tuple(p[i:j]) for p in passages for i in range(len(p)) for j in range(i + 1, len(p) + 1)}
    assert len(trie) == len(substrings)
    assert trie.num_nodes == (len(substrings) + 1 if substrings else 0)
    assert sum(1 for _ in trie) == len(substrings)
    for substring, numbers in list(places.items())[:200]:
        assert trie.contains(substring)
        assert trie.payloads(substring).tolist() == sorted(numbers)


@compiled
@pytest.mark.kernel
@quick
@hypothesis.given(SEQUENCES, VOCABULARIES, st.data())
def test_the_same_bytes_of_sequences(sequences, vocab_size, data):
    numbers = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 9)
    payloads = data.draw(
        st.none()
        | st.lists(numbers, min_size=len(sequences), max_size=len(sequences))
        | st.lists(st.lists(numbers, max_size=2), min_size=len(sequences), max_size=len(sequences))
    )
    assert_same_bytes(lambda: Trie.from_sequences(sequences, payloads, vocab_size=vocab_size))


@compiled
@pytest.mark.kernel
@quick
@hypothesis.given(PASSAGES, st.integers(1, 4), VOCABULARIES)
def test_the_same_bytes_of_substrings(passages, repeats, vocab_size):
    assert_same_bytes(lambda: Trie.from_substrings(passages * repeats, vocab_size=vocab_size))


def _random(shape: tuple[int, ...], vocab_size: int, dtype: type = np.int64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(dtype)


LARGE = {
    "intervals of more than 65536 keys": lambda: (_random((150_000, 10), 4), {}),
    "a common first token": lambda: (np.insert(_random((20_000, 5), 300), 0, 7, axis=1), {}),
    "unsigned, many duplicates": lambda: (_random((50_000, 3), 20, np.uint16), {}),
    "symbols through a table": lambda: (_random((3_000, 4), 200, np.uint32) * 70_000, {}),
    "symbols of 4 bytes": lambda: (np.arange(140_000).reshape(-1, 2) % 70_001, {}),
    "first symbols of 4 bytes and many keys": lambda: (_random((90_000, 2), 3_000_000, np.int32), {}),
    "rows of any length": lambda: (np.sort(_random((40_000, 6), 9) - 3, axis=1)[:, ::-1].clip(-1), {"pad_id": -1}),
    "long equal rows": lambda: (np.repeat(_random((40, 500), 2), 100, axis=0), {}),
    "a chain of prefixes": lambda: (np.where(np.tri(400, 400, dtype=bool), 1, -1), {"pad_id": -1}),
    "rows without tokens": lambda: (np.zeros((5, 0), np.int32), {}),
}


@compiled
@pytest.mark.kernel
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bytes_of_many_keys(name):
    rows, options = LARGE[name]()
    trie = assert_same_bytes(lambda: Trie.from_sequences(rows, **options))
    assert len(trie) == len({tuple(row[row != options.get("pad_id")].tolist()) for row in rows})


def test_the_large_cases_are_what_their_names_say():
    with with_builder("numpy"):
        entries = {
            name: _format.entries(Trie.from_sequences(*case()[:1], **case()[1]).arena.numpy())[0]
            for name, case in LARGE.items()
            if "symbols" in name or "65536" in name
        }
    assert entries["intervals of more than 65536 keys"].wide > 0
    assert entries["intervals of more than 65536 keys"].narrow > 0
    assert entries["symbols through a table"].used > 0
    assert entries["symbols of 4 bytes"].kinds >> 8 & 255 == 4


@compiled
@pytest.mark.kernel
@pytest.mark.parametrize(
    "passages",
    [
        [[1] * 3000],
        [[1] * 100] * 90,
        [[0, 1] * 700, [1, 0] * 700, [0]],
        [_random((20_000,), 3).tolist(), _random((20_000,), 3).tolist()],
        [(_random((80_000,), 80_000) + 70_000).tolist()],
        [[]] * 3 + [[5]],
    ],
)
def test_the_same_bytes_of_repetitive_passages(passages):
    assert_same_bytes(lambda: Trie.from_substrings(passages))


@compiled
@pytest.mark.kernel
def test_the_same_bytes_with_any_number_of_threads():
    rows, threads = _random((60_000, 4), 500), torch.get_num_threads()
    tries = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            tries.append(Trie.from_sequences(rows))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(trie.arena, tries[0].arena) for trie in tries)


@pytest.mark.parametrize("builder", BUILDERS)
def test_repetitive_text_is_no_trap(builder):
    start = time.perf_counter()
    with with_builder(builder):
        assert len(Trie.from_substrings([3] * 30_000)) == 30_000
        assert len(Trie.from_sequences([[1, 2] * 2_000] * 300)) == 1
    assert time.perf_counter() - start < 20


@compiled
def test_a_build_reports_progress_and_stops_at_an_exception(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # so that it takes its time
    rows = _random((2_000_000, 8), 2048)
    shares: list[float] = []
    trie = Trie.from_sequences(rows, progress=shares.append)
    assert len(trie) == len(rows)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 1

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        Trie.from_sequences(rows, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        Trie.from_substrings(rows.reshape(-1)[:1_000_000], progress=stop)
    assert time.perf_counter() - start < 20


# Behind a shell's & SIGINT is ignored, and Python leaves it so.
INTERRUPTED = """
import signal
import numpy as np
from fastmix import Trie
signal.signal(signal.SIGINT, signal.default_int_handler)
rows = np.random.default_rng(0).integers(0, 2048, (4_000_000, 8), dtype=np.uint16)
try:
    Trie.from_sequences(rows, progress=lambda share: print("building", flush=True))
except KeyboardInterrupt:
    print("stopped", len(Trie.from_sequences([[1]])))
"""


@compiled
def test_a_signal_stops_a_large_build():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that it takes its time
    child = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "building\n"
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert output.splitlines()[-1] == "stopped 1"
    assert child.returncode == 0
