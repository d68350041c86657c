"""Files of tries: what is saved is loaded; what is damaged is refused, or at least never crashes."""

from __future__ import annotations

import itertools
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmix
from fastmix import Trie
from fastmix.generation import _format

FLIPS = 250  # damaged copies of each trie


def _tries() -> dict[str, Trie]:
    rows = np.random.default_rng(0).integers(0, 12, (400, 3))
    ragged = [row[: 1 + row[0] % 3].tolist() for row in rows]
    passages = [rows.reshape(-1)[:300], [3] * 90]
    return {
        "one length": Trie.from_sequences(rows),
        "any length": Trie.from_sequences(ragged, rows[:, 0] << 33),
        "table of symbols": Trie.from_sequences([[token * 9000 for token in key] for key in ragged]),
        "wide symbols": Trie.from_sequences(np.arange(70_000, dtype=np.uint32).reshape(-1, 100)[:, :99] * 3),
        "substrings": Trie.from_substrings(passages),
        "several": Trie.concat([Trie.from_sequences(ragged), Trie.from_substrings(passages), Trie.from_sequences([])]),
    }


TRIES = _tries()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "keys.trie"


@pytest.mark.parametrize("name", TRIES)
@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"verify": True}])
def test_what_is_saved_is_loaded(name, options, path):
    TRIES[name].save(path)
    for place in (path, str(path)):
        trie = Trie.load(place, **options)
        assert torch.equal(trie.arena, TRIES[name].arena)
        assert len(trie) == len(TRIES[name])
    assert path.read_bytes() == TRIES[name].arena.numpy().tobytes()


def test_saving_replaces_a_file_that_is_mapped(path):
    Trie.from_sequences([[1, 2]]).save(path)
    mapped = Trie.load(path)
    Trie.from_sequences([[3]]).save(path)
    assert list(mapped) == [(1, 2)]
    assert list(Trie.load(path)) == [(3,)]
    mapped.arena[-1] = 1  # a private copy: the file stays
    assert list(Trie.load(path, verify=True)) == [(3,)]


def test_saving_leaves_nothing_behind_when_it_fails(path, monkeypatch):
    trie = Trie.from_sequences([[1, 2]])
    trie.save(path)
    before = path.read_bytes()
    for error in (OSError("no space left"), KeyboardInterrupt()):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(_format.os, "fsync", fail)
        with pytest.raises(type(error)):
            Trie.from_sequences([[3]]).save(path)
        monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        trie.save(path.parent / "no folder" / "keys.trie")


def test_a_saved_file_has_the_usual_permissions(path):
    Trie.from_sequences([[1]]).save(path)
    other = path.with_suffix(".other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_files_that_are_refused(path):
    good = TRIES["any length"].arena.numpy().tobytes()
    for content, message in [
        (b"", "not a trie: it does not begin with FMIXTRIE"),
        (b"FMIXTRIE", "not a trie"),
        (b"%PDF-1.7" + bytes(500), "not a trie"),
        (good[:8] + struct.pack("<I", 2) + good[12:], "format version 2; this fastmix reads version 1"),
        (good[:-1], f"must have {len(good)} bytes, got {len(good) - 1}"),
        (good + b"\0", f"must have {len(good)} bytes, got {len(good) + 1}"),
        (good[:40] + b"\x01" + good[41:], "checksum of the header does not match"),
        (good[:-1] + bytes([good[-1] ^ 1]), "checksum of the body does not match"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            Trie.load(path)
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(FileNotFoundError):
        Trie.load(path.with_suffix(".nowhere"))


def test_the_body_of_a_large_file_is_checked_on_request(path, monkeypatch):
    monkeypatch.setattr(_format, "_CHECKED_BYTES", 1000)
    damaged = TRIES["one length"].arena.numpy().copy()
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    assert len(Trie.load(path)) == len(TRIES["one length"])
    for options in ({"verify": True}, {"mmap": False}):
        with pytest.raises(ValueError, match="checksum of the body"):
            Trie.load(path, **options)


def test_every_flip_and_cut_is_noticed(path):
    good, draw = TRIES["several"].arena.numpy(), random.Random(0)
    for _ in range(FLIPS):
        damaged = good.copy()
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"keys\.trie: "):
            Trie.load(path)
        path.write_bytes(good[: draw.randrange(len(good))])
        with pytest.raises(ValueError, match=r"keys\.trie: "):
            Trie.load(path)


def _damaged(good: np.ndarray, draw: random.Random) -> np.ndarray:
    """A copy with some bytes changed, or cut off, whose checksums are right nevertheless."""
    arena = good.copy()
    body = _format.header(arena).body
    for _ in range(draw.choice([1, 1, 3, 20])):
        place = draw.choice([draw.randrange(16, 192), draw.randrange(len(arena)), draw.randrange(body, len(arena))])
        arena[place] = draw.choice([0, 1, 255, draw.randrange(256), arena[place] ^ 1 << draw.randrange(8)])
    if draw.random() < 0.2:
        arena = arena[: draw.randrange(192, len(arena))].copy()
        struct.pack_into("<Q", arena, 16, len(arena))
    return _format.seal(arena)


def _use(trie: Trie, draw: random.Random) -> None:
    """Walks, iterates and steps, and feeds back what comes."""
    nodes = [-1, 0, 1 << 62, (1 << 63) - 1, draw.getrandbits(63), *trie.roots.tolist()]
    for reader in trie.readers:
        for node in [*nodes, *(1 << 62 | draw.randrange(9) << 20 | draw.randrange(9) for _ in range(3))]:
            for _ in range(4):
                following = reader.children(node)[1]
                reader.ends(node), reader.payloads(node), reader.prefix(node), reader.interval(node)
                reader.child(node, draw.randrange(100))
                if not following:
                    break
                node = draw.choice(following)
                nodes.append(node)
        reader.walk([draw.randrange(12) for _ in range(4)])
        for i in itertools.islice(range(reader.num_sorted), 20):
            reader.key(i)
    if trie.num_tries == 1:
        for _ in itertools.islice(trie, 30):
            pass
    width = max(trie.vocab_size, 4)
    if width > 1 << 20:
        return
    num_beams = 16 if width < 5000 else 2
    for _ in range(3):
        beams = torch.tensor([[draw.choice(nodes) for _ in range(num_beams)] for _ in range(trie.num_tries)])
        step = fastmix.trie_beam_step(
            torch.randn(*beams.shape, width),
            torch.zeros(beams.shape),
            beams,
            trie,
            num_candidates=40,
            eos_token_id=[1, 2],
            normalize=draw.choice(["vocab", "allowed", None]),
        )
        found = step.token[step.scores > -torch.inf]
        assert ((found >= 0) & (found < width)).all()
        nodes += step.node.flatten().tolist()


@pytest.mark.kernel
@pytest.mark.parametrize("name", TRIES)
def test_damage_behind_right_checksums_never_crashes(name, path):
    good, draw = TRIES[name].arena.numpy(), random.Random(name)
    refused = 0
    for number in range(FLIPS):
        path.write_bytes(_damaged(good, draw))
        torch.manual_seed(number)
        try:
            trie = Trie.load(path, mmap=number % 2 == 0)
            if trie.num_tries > 8:
                continue
            _use(trie, draw)
        except (ValueError, IndexError, OverflowError, MemoryError):
            refused += 1
    assert refused > 0
    assert refused < FLIPS


@pytest.mark.kernel
def test_forged_nodes_of_a_good_trie_give_nothing_or_what_they_say():
    draw = random.Random(0)
    for trie in TRIES.values():
        _use(trie, draw)


def test_a_large_file_is_opened_at_once(path, ordinary_memory):
    trie = Trie.from_sequences(np.random.default_rng(0).integers(0, 2048, (1_800_000, 20), dtype=np.uint16))
    trie.save(path)
    assert path.stat().st_size > _format._CHECKED_BYTES
    times = []
    for _ in range(5):
        start = time.perf_counter()
        Trie.load(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01
    path.unlink()
