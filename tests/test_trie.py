"""Trie as users call it: keys, payloads, input forms, arenas, errors."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from fastmix import Trie
from fastmix.generation import _build

KEYS = [[3, 1, 2], [3], [3, 1], [], [9], [3, 1]]


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def builder(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(_build, "_C", None)
    elif _build._C is None:
        pytest.skip("no compiled builder in this installation")


def same(a: Trie, b: Trie) -> bool:
    return torch.equal(a.arena, b.arena)


def test_a_trie_of_sequences():
    trie = Trie.from_sequences(KEYS)
    assert list(trie) == [(), (3,), (3, 1), (3, 1, 2), (9,)]
    assert (len(trie), trie.num_nodes, trie.vocab_size, trie.num_tries) == (5, 5, 10, 1)
    assert trie.nbytes == trie.arena.numel()
    assert [3, 1] in trie
    assert [] in trie
    assert [1] not in trie
    assert [3, 12] not in trie
    assert [3, -1] not in trie
    assert trie.contains([3, 1])
    assert not trie.contains([3, 1, 2, 0])
    assert trie.payloads([3, 1]).tolist() == [2, 5]
    assert trie.payloads([7]).tolist() == []
    assert trie.children([]).tolist() == [3, 9]
    assert trie.children([3, 1, 2]).tolist() == []
    assert trie.children([8]).tolist() == []
    assert trie.children([3]).dtype == trie.payloads([3]).dtype == np.int64
    assert trie.walk([]) == trie.roots.item()
    assert trie.walk([3, 1, 1]) is None
    assert [token for token in range(-1, 12) if trie.uses(token)] == [1, 2, 3, 9]


def test_prefixes_that_no_key_ends_at_are_no_keys():
    trie = Trie.from_sequences([[1, 2, 3], [1, 2, 4]])
    assert [1, 2] in trie
    assert not trie.contains([1, 2])
    assert trie.payloads([1, 2]).tolist() == []


def test_prefixes_may_be_tuples_arrays_and_tensors():
    trie = Trie.from_sequences(KEYS)
    for prefix in ((3, 1), np.array([3, 1], np.uint8), torch.tensor([3, 1]), [np.int32(3), 1]):
        assert trie.walk(prefix) == trie.walk([3, 1])
    for wrong in ("31", [1.0], 3, None):
        with pytest.raises(TypeError, match="tokens must be a sequence of ints"):
            trie.walk(wrong)


@pytest.mark.parametrize("sequences", [[], np.zeros((0, 4), np.int64), torch.zeros(0, 0, dtype=torch.int32)])
def test_the_empty_trie(sequences):
    trie = Trie.from_sequences(sequences)
    assert (len(trie), trie.num_nodes, trie.vocab_size, trie.roots.tolist(), list(trie)) == (0, 0, 0, [-1], [])
    assert [] not in trie
    assert trie.walk([]) is None
    assert not trie.contains([])
    assert Trie.from_sequences([], vocab_size=70000).vocab_size == 70000


@pytest.mark.parametrize("options", [{}, {"vocab_size": 70000}])
def test_the_empty_key(options):
    trie = Trie.from_sequences([[], []], **options)
    assert (len(trie), trie.num_nodes, list(trie)) == (1, 1, [()])
    assert trie.contains([])
    assert trie.payloads([]).tolist() == [0, 1]
    assert trie.children([]).tolist() == []


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_matrices_of_every_dtype_and_layout(dtype):
    rows = np.random.default_rng(0).integers(0, 50, (300, 6)).astype(dtype)
    trie = Trie.from_sequences(rows.tolist())
    big = np.zeros((600, 9), dtype)
    big[::2, 1:7] = rows
    for form in (
        rows,
        rows.astype(rows.dtype.newbyteorder()),
        np.asfortranarray(rows),
        big[::2, 1:7],
        rows[::-1][::-1],
    ):
        assert same(Trie.from_sequences(form), trie)
    if dtype not in (np.uint16, np.uint32, np.uint64):
        assert same(Trie.from_sequences(torch.from_numpy(rows)), trie)
    assert same(Trie.from_arrays(rows.reshape(-1), np.arange(0, 1801, 6)), trie)


@pytest.mark.parametrize("pad", [-1, 0, 77, 1 << 40])
def test_padded_rows(pad):
    sequences = [[5, 6], [], [7, 8, 9], [5]]
    rows = np.full((4, 3), pad)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    assert same(Trie.from_sequences(rows, pad_id=pad), Trie.from_sequences(sequences))


def test_iterables_of_sequences():
    trie = Trie.from_sequences(KEYS)
    assert same(Trie.from_sequences(iter(KEYS)), trie)
    assert same(Trie.from_sequences([tuple(key) for key in KEYS]), trie)
    assert same(Trie.from_sequences([np.array(key, np.int32) for key in KEYS]), trie)
    assert same(Trie.from_sequences([torch.tensor(key, dtype=torch.int64) for key in KEYS]), trie)


def test_offsets_may_begin_anywhere():
    tokens = np.array([9, 9, 3, 1, 4, 8, 8])
    assert list(Trie.from_arrays(tokens, [2, 3, 5])) == [(1, 4), (3,)]


def test_payloads():
    extremes = [-(1 << 63), (1 << 63) - 1, 0, 1 << 32]
    for values in (extremes, np.array(extremes), torch.tensor(extremes)):
        trie = Trie.from_sequences([[1], [2], [1], [3]], values)
        assert [trie.payloads([token]).tolist() for token in (1, 2, 3)] == [[extremes[0], 0], [extremes[1]], [1 << 32]]
    trie = Trie.from_sequences([[2], [1], [2]], [[7, 5], [], (6,)])
    assert trie.payloads([2]).tolist() == [7, 5, 6]
    assert trie.payloads([1]).tolist() == []
    assert trie.contains([1])


def test_a_trie_of_substrings():
    trie = Trie.from_substrings([1, 2, 1, 2, 5])
    expected = sorted({(1, 2, 1, 2, 5)[i:j] for i in range(5) for j in range(i + 1, 6)})
    assert list(trie) == expected
    assert len(trie) == len(expected)
    assert trie.num_nodes == len(expected) + 1
    assert not trie.contains([])
    assert trie.contains([2, 1])
    assert trie.children([2]).tolist() == [1, 5]
    trie = Trie.from_substrings([[4, 1, 2], [], [1, 2, 4], [4]])
    assert [2, 4] in trie
    assert [2, 1] not in trie  # across passages
    assert trie.payloads([1, 2]).tolist() == [0, 2]
    assert trie.payloads([4]).tolist() == [0, 2, 3]
    assert trie.payloads([]).tolist() == []
    for form in (np.array([[4, 1], [1, 2]]), [np.array([4, 1]), torch.tensor([1, 2])]):
        assert list(Trie.from_substrings(form)) == [(1,), (1, 2), (2,), (4,), (4, 1)]
    for empty in ([], [[]], [[], []]):
        assert len(Trie.from_substrings(empty)) == 0


def test_a_long_passage_takes_linear_space():
    passage = [7] * 3000
    trie = Trie.from_substrings(passage)
    assert len(trie) == 3000
    assert trie.contains(passage)
    assert trie.nbytes < 60 * len(passage)


def test_concat():
    first, second = Trie.from_sequences(KEYS), Trie.from_substrings([70000, 2], vocab_size=80000)
    arena = Trie.concat([first, Trie.concat([second, first])])
    assert (arena.num_tries, len(arena), arena.num_nodes) == (3, 13, 14)
    assert arena.vocab_size == 80000
    assert arena.roots.tolist() == [first.roots.item(), second.roots.item(), first.roots.item()]
    assert [reader.walk([70000, 2]) >= 0 for reader in arena.readers] == [False, True, False]
    assert arena.uses(70000)
    assert arena.uses(9)
    assert not arena.uses(70001)
    assert same(Trie.concat([first]), first)
    for call in (arena.walk, arena.children, arena.payloads, arena.contains, arena.merge, arena.__contains__):
        with pytest.raises(ValueError, match="one trie, got an arena of 3"):
            call([3])
    with pytest.raises(ValueError, match="arena of 3"):
        next(iter(arena))
    with pytest.raises(ValueError, match="tries must be one or more on one device, got \\[\\]"):
        Trie.concat([])
    with pytest.raises(TypeError, match="tries must be Tries, got int"):
        Trie.concat([first, 3])


def test_merge():
    first = Trie.from_sequences(KEYS, vocab_size=30)
    second = Trie.from_sequences([[3, 1], [70000, 4], [9, 9], [3, 1]], [-5, 6, 7, 8])
    both = first.merge(second)
    assert list(both) == sorted(set(first) | set(second))
    assert both.payloads([3, 1]).tolist() == [2, 5, -5, 8]
    assert both.payloads([70000, 4]).tolist() == [6]
    assert both.vocab_size == 70001
    assert list(first.merge(Trie.from_sequences([]))) == list(first)
    passages = [[1, 2, 3], [], [2, 3]]
    assert same(
        Trie.from_substrings(passages[:1]).merge(Trie.from_substrings(passages[1:], vocab_size=4)),
        Trie.from_substrings(passages, vocab_size=4),
    )
    with pytest.raises(ValueError, match="other must be of the same sort"):
        first.merge(Trie.from_substrings([1]))
    with pytest.raises(TypeError, match="other must be a Trie, got list"):
        first.merge([[1]])


def test_copies_and_pickles():
    arena = Trie.concat([Trie.from_sequences(KEYS), Trie.from_substrings([1, 2])])
    for other in (pickle.loads(pickle.dumps(arena)), copy.copy(arena), copy.deepcopy(arena), arena.to("cpu")):
        assert same(other, arena)
        assert len(other) == len(arena)
    assert arena.to("cpu") is arena
    assert arena.device == torch.device("cpu")


@pytest.mark.gpu
def test_on_a_gpu():
    trie = Trie.from_sequences(KEYS)
    there = trie.to("cuda")
    assert there.arena.is_cuda
    assert there.roots.is_cuda
    assert there.to("cuda") is there
    assert list(there) == list(trie)
    assert pickle.loads(pickle.dumps(there)).arena.is_cuda
    assert same(there.to("cpu"), trie)
    assert there.merge(trie).arena.is_cuda
    with pytest.raises(ValueError, match="on one device"):
        Trie.concat([trie, there])


def test_repr():
    trie = Trie.from_sequences(KEYS)
    assert repr(trie) == f"Trie(5 keys, vocab_size=10, {trie.nbytes} bytes)"
    arena = Trie.concat([Trie.from_substrings([1, 2])] * 2)
    assert repr(arena) == f"Trie(2 tries, 6 substrings, vocab_size=3, {arena.nbytes} bytes)"


SEQUENCES, ARRAYS, SUBSTRINGS = Trie.from_sequences, Trie.from_arrays, Trie.from_substrings


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"sequence 1 must have tokens from 0 to 4294967294, got -1", lambda: SEQUENCES([[1], [3, -1]])),
        (
            ValueError,
            r"sequence 2 must have tokens from 0 to 4, got 5",
            lambda: SEQUENCES([[1], [], [4, 5]], vocab_size=5),
        ),
        (ValueError, r"sequence 0 must have tokens .*, got 4294967295", lambda: SEQUENCES([[(1 << 32) - 1]])),
        (
            ValueError,
            r"sequence 1 must have tokens from 0 to 4, got 9",
            lambda: SEQUENCES(np.array([[1], [9]]), vocab_size=5),
        ),
        (ValueError, r"passage 1 must have tokens from 0 to 4, got 5", lambda: SUBSTRINGS([[1], [5]], vocab_size=5)),
        (
            ValueError,
            r"sequence 1 must have at most 1048575 tokens, got 1048576",
            lambda: SEQUENCES([[], [1] * (1 << 20)]),
        ),
        (ValueError, r"passage 0 must have at most 1048575 tokens, got 1048576", lambda: SUBSTRINGS([1] * (1 << 20))),
        (
            ValueError,
            r"sequence 1 must have pad_id 0 only behind its tokens",
            lambda: SEQUENCES(np.array([[1, 0], [0, 1]]), pad_id=0),
        ),
        (ValueError, r"pad_id is for a 2-D array of sequences, got list", lambda: SEQUENCES([[1]], pad_id=0)),
        (TypeError, r"pad_id must be an int, got 'x'", lambda: SEQUENCES(np.ones((1, 1), int), pad_id="x")),
        (ValueError, r"payloads must be one for each of the 2 sequences, got 1", lambda: SEQUENCES([[1], [2]], [5])),
        (ValueError, r"payloads must be one for each of the 1 sequences, got 2", lambda: SEQUENCES([[1]], [[5], [6]])),
        (TypeError, r"payloads must be 64-bit ints, got \[0.5\]", lambda: SEQUENCES([[1]], [0.5])),
        (TypeError, r"payloads must be of an int dtype, got float64", lambda: SEQUENCES([[1]], np.ones(1))),
        (
            TypeError,
            r"sequences must be sequences of 64-bit ints, number 1 is \['a'\]",
            lambda: SEQUENCES([[1], ["a"]]),
        ),
        (TypeError, r"sequences must be sequences of 64-bit ints, number 0 is \[1.0\]", lambda: SEQUENCES([[1.0]])),
        (TypeError, r"sequences must be sequences of 64-bit ints, number 0 is 5", lambda: SEQUENCES([5])),
        (
            TypeError,
            r"sequences must be sequences of 64-bit ints, number 0 is \[1267650",
            lambda: SEQUENCES([[1 << 100]]),
        ),
        (TypeError, r"sequences must be a 2-D int array or a list of lists of ints, got str", lambda: SEQUENCES("12")),
        (TypeError, r"sequences must be of an int dtype, got float32", lambda: SEQUENCES(torch.ones(2, 2))),
        (TypeError, r"sequences must be of an int dtype, got bool", lambda: SEQUENCES(np.ones((2, 2), bool))),
        (
            ValueError,
            r"sequences must be a 2-D array or a list of sequences, got .* \(4,\)",
            lambda: SEQUENCES(np.arange(4)),
        ),
        (
            ValueError,
            r"sequences must be 64-bit signed ints, got 9223372036854775808",
            lambda: SEQUENCES(np.full((1, 1), 1 << 63, np.uint64)),
        ),
        (
            ValueError,
            r"offsets must not decrease, got 2 and then 1 at sequence 1",
            lambda: ARRAYS([1, 2], [0, 2, 1, 2]),
        ),
        (
            ValueError,
            r"offsets must be N \+ 1 numbers from 0 to len\(tokens\) = 2, got 0 … 3",
            lambda: ARRAYS([1, 2], [0, 3]),
        ),
        (
            ValueError,
            r"offsets must be N \+ 1 numbers from 0 to len\(tokens\) = 2, got none",
            lambda: ARRAYS([1, 2], []),
        ),
        (TypeError, r"tokens must be 64-bit ints, got \['a'\]", lambda: ARRAYS(["a"], [0, 1])),
        (TypeError, r"passages must be 64-bit ints, got \[1, 'a'\]", lambda: SUBSTRINGS([1, "a"])),
        (TypeError, r"offsets must be of an int dtype, got float64", lambda: ARRAYS([1], np.array([0.0, 1.0]))),
        (
            ValueError,
            r"tokens must be a 1-D int array, got shape \(1, 1\)",
            lambda: ARRAYS(np.ones((1, 1), int), [0, 1]),
        ),
        (ValueError, r"vocab_size must be from 0 to 2³² − 1, got -1", lambda: SEQUENCES([], vocab_size=-1)),
        (TypeError, r"vocab_size must be an int, got 2.0", lambda: SEQUENCES([[1]], vocab_size=2.0)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_threads_share_a_trie():
    keys = np.random.default_rng(0).integers(0, 30, (3000, 4))
    trie = Trie.from_sequences(keys)
    expected = [trie.payloads(key).tolist() for key in keys[:200]]
    wrong = []

    def read() -> None:
        for key, payloads in zip(keys[:200], expected, strict=True):
            if trie.payloads(key).tolist() != payloads or key[1] not in trie.children(key[:1]):
                wrong.append(key)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
