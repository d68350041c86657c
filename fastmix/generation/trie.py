"""The prefix tree under which beams are decoded: one block of bytes (docs/trie-format.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmix.generation import _build, _format, _input
from fastmix.generation._build import Progress
from fastmix.reference._trie import TrieReader, read_arena


class Trie:
    """A prefix tree over sequences of tokens, or over all substrings of passages; or several of them, an arena.

    It is immutable, made by `from_sequences`, `from_arrays`, `from_substrings`, `concat`, `merge` and `load`. A key may
    be a prefix of another, and may be given several times, with a payload each. Keys do not contain EOS: where a key
    ends, the search emits it. Nodes are opaque ints; `walk` gives them, `fastmix.trie_beam_step` takes them. Several
    threads may use one trie.

    Attributes:
        arena: uint8 Tensor [nbytes], everything, on the trie's device.
        roots: int64 Tensor [num_tries], the root of each trie, −1 of an empty one, on the trie's device.
        readers: a `TrieReader` of each trie, over the host's bytes.
        num_tries: how many tries the arena holds.
        vocab_size: every token is smaller.
    """

    def __init__(self, arena: np.ndarray, device: torch.device | str = "cpu") -> None:
        """Takes the bytes that a builder or a file gave; use the class methods instead."""
        self._bytes = arena
        self.readers: list[TrieReader] = read_arena(arena)
        self.num_tries, self.vocab_size = len(self.readers), _format.header(arena).vocab_size
        self.arena: Tensor = torch.from_numpy(arena).to(device)
        self.roots: Tensor = torch.tensor([reader.root for reader in self.readers], device=device)

    @classmethod
    def from_sequences(
        cls,
        sequences: Any,
        payloads: Any = None,
        *,
        vocab_size: int | None = None,
        pad_id: int | None = None,
        progress: Progress | None = None,
    ) -> Trie:
        """Builds a trie whose keys are the given sequences.

        Args:
            sequences: lists of ints (or 1-D arrays), or a 2-D int array or Tensor with a row a sequence. A sequence may
                be empty, and has at most 2²⁰ − 1 tokens.
            payloads: an int for each sequence, or a list of ints for each; default: its number.
            vocab_size: every token is smaller; default: the largest token + 1.
            pad_id: what fills up the rows of a 2-D array behind their tokens; default: all rows are full.
            progress: called with the share that is done, 0 to 1, some times a second.

        Returns:
            The trie, on the CPU.

        Raises:
            TypeError: sequences or payloads hold something else than ints.
            ValueError: a token is negative or not in the vocabulary, a sequence is too long or has pad_id between
                tokens, or the number of payloads is another.
        """
        found = _input.from_anything(sequences, pad_id, "sequences")
        return cls(_build.keys(found, _input.payloads(payloads, len(found)), _input.size(vocab_size), progress))

    @classmethod
    def from_arrays(
        cls,
        tokens: np.ndarray,
        offsets: np.ndarray,
        payloads: Any = None,
        *,
        vocab_size: int | None = None,
        progress: Progress | None = None,
    ) -> Trie:
        """Builds a trie whose keys are tokens[offsets[i] : offsets[i + 1]], without a copy of the tokens.

        Args:
            tokens: 1-D int32, int64, uint16 or uint32 (other int dtypes are copied).
            offsets: int [N + 1], not decreasing.
            payloads: an int for each sequence, or a list of ints for each; default: its number.
            vocab_size: every token is smaller; default: the largest token + 1.
            progress: called with the share that is done, 0 to 1, some times a second.

        Returns:
            The trie, on the CPU.

        Raises:
            TypeError: an array is of no int dtype.
            ValueError: as of `from_sequences`, or the offsets decrease or lie outside of the tokens.
        """
        found = _input.from_arrays(tokens, offsets)
        return cls(_build.keys(found, _input.payloads(payloads, len(found)), _input.size(vocab_size), progress))

    @classmethod
    def from_substrings(cls, passages: Any, *, vocab_size: int | None = None, progress: Progress | None = None) -> Trie:
        """Builds a trie of all substrings of one or several passages, through a suffix array: its size is linear.

        A key is then any substring of a passage, the empty one excluded; its payloads are the numbers of the passages
        that contain it.

        Args:
            passages: a list of ints (or a 1-D array) is one passage; lists of ints, 1-D arrays, or a 2-D array are
                several, of at most 2²⁰ − 1 tokens each.
            vocab_size: every token is smaller; default: the largest token + 1.
            progress: called with the share that is done, 0 to 1, some times a second.

        Returns:
            The trie, on the CPU.

        Raises:
            TypeError: passages hold something else than ints.
            ValueError: a token is negative or not in the vocabulary, or a passage is too long.
        """
        return cls(_build.substrings(_input.passages(passages), _input.size(vocab_size), progress))

    @classmethod
    def concat(cls, tries: Sequence[Trie]) -> Trie:
        """Puts several tries into one arena: sample i of a batch then uses trie i.

        Args:
            tries: one or more on one device, which may be arenas themselves.

        Returns:
            The arena, on their device; its vocabulary is the largest of theirs.

        Raises:
            TypeError: one is no trie.
            ValueError: there is none, or they are on several devices.
        """
        tries = list(tries)
        for trie in tries:
            if not isinstance(trie, Trie):
                raise TypeError(f"tries must be Tries, got {type(trie).__name__}")
        if len({trie.device for trie in tries}) != 1:
            raise ValueError(f"tries must be one or more on one device, got {[str(trie.device) for trie in tries]}")
        return cls(_format.concat([trie._bytes for trie in tries]), tries[0].device)

    def merge(self, other: Trie) -> Trie:
        """A new trie with the keys and payloads of both.

        A key of both has the payloads of this one, then those of the other. Of substrings the passages of the other are
        numbered behind those of this one.

        Args:
            other: a trie of the same sort (of sequences, or of substrings), or an empty one.

        Returns:
            The trie, on the device of this one.

        Raises:
            TypeError: the other is no trie.
            ValueError: one trie is of sequences and the other of substrings, or one is an arena of several.
        """
        mine = self._reader
        if not isinstance(other, Trie):
            raise TypeError(f"other must be a Trie, got {type(other).__name__}")
        theirs = other._reader
        if mine.is_substrings != theirs.is_substrings and mine.num_sorted and theirs.num_sorted:
            raise ValueError("other must be of the same sort: one trie is of sequences, the other of substrings")
        tokens, bounds, payloads = zip(*(_contents(reader) for reader in (mine, theirs)), strict=True)
        both = _input.Sequences(np.concatenate(tokens), _joined(bounds))
        vocab_size = max(self.vocab_size, other.vocab_size)
        if mine.is_substrings or theirs.is_substrings:
            arena = _build.substrings(both, vocab_size)
        else:
            values, offsets = zip(*payloads, strict=True)
            arena = _build.keys(both, (np.concatenate(values), _joined(offsets)), vocab_size)
        return Trie(arena, self.device)

    @property
    def device(self) -> torch.device:
        """Where the arena is."""
        return self.arena.device

    @property
    def nbytes(self) -> int:
        """Size of the arena in bytes."""
        return self._bytes.nbytes

    @property
    def num_nodes(self) -> int:
        """How many nodes the tries have: distinct prefixes of keys, the empty one included."""
        return sum(reader.num_nodes for reader in self.readers)

    def __len__(self) -> int:
        """How many distinct keys the tries have; of substrings the distinct non-empty ones."""
        return sum(reader.num_keys for reader in self.readers)

    def __contains__(self, prefix: Any) -> bool:
        """Whether a key begins with these tokens."""
        return self.walk(prefix) is not None

    def contains(self, key: Any) -> bool:
        """Whether these tokens are a whole key."""
        node = self.walk(key)
        return node is not None and self._reader.ends(node)

    def walk(self, prefix: Any) -> int | None:
        """The node that tokens lead to, or None if no key begins with them."""
        node = self._reader.walk(_input.prefix(prefix))
        return node if node >= 0 else None

    def children(self, prefix: Any) -> np.ndarray:
        """The tokens that may follow a prefix, ascending, int64; none for what is no prefix."""
        node = self.walk(prefix)
        return np.array([] if node is None else self._reader.tokens(node), np.int64)

    def payloads(self, key: Any) -> np.ndarray:
        """The payloads of a key in the order they were given, int64; none for what is no key.

        Of a substring: the numbers of the passages that contain it, ascending.
        """
        node = self.walk(key)
        return np.array([] if node is None else self._reader.payloads(node), np.int64)

    def uses(self, token: int) -> bool:
        """Whether any key of any trie has a token."""
        if not 0 <= token < self.vocab_size:
            return False
        return bool(int(_format.bitmap(self._bytes)[token // 64]) >> (token % 64) & 1)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The keys as tuples in lexicographic order; of substrings each distinct non-empty one."""
        reader, before = self._reader, ()
        for i in range(reader.num_sorted):
            key = tuple(reader.key(i))
            if reader.is_substrings:
                shared = _common(before, key)
                yield from (key[:end] for end in range(shared + 1, len(key) + 1))
                before = key
            else:
                yield key

    def save(self, path: os.PathLike | str) -> None:
        """Writes the arena to a file, beside its place first: there is the whole file in the end, or what was before.

        Args:
            path: the file, replaced if it is there.

        Raises:
            OSError: it can't be written.
        """
        _format.write(path, self._bytes)

    @classmethod
    def load(cls, path: os.PathLike | str, mmap: bool = True, verify: bool = False) -> Trie:
        """Reads a file that `save` wrote.

        Args:
            path: the file.
            mmap: map it into memory instead of reading it: only what is used is read, and processes share it. The file
                must not change meanwhile (`save` never changes a file, it replaces it).
            verify: compare the checksum of all bytes, also of a mapped file of more than 64 MB.

        Returns:
            The trie, on the CPU.

        Raises:
            OSError: the file can't be read.
            ValueError: it is no trie, of another format version, cut off, or damaged.
        """
        arena = _format.read(path, mmap, verify)
        try:
            return cls(arena)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def to(self, device: torch.device | str) -> Trie:
        """The trie with its arena on a device; the host's bytes are shared."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        return self if device == self.device else Trie(self._bytes, device)

    def __reduce__(self) -> tuple[type[Trie], tuple[np.ndarray, str]]:
        return Trie, (self._bytes, str(self.device))

    def __repr__(self) -> str:
        several = f"{self.num_tries} tries, " if self.num_tries > 1 else ""
        kind = "substrings" if all(reader.is_substrings for reader in self.readers) else "keys"
        device = "" if self.device.type == "cpu" else f", {self.device}"
        return f"Trie({several}{len(self)} {kind}, vocab_size={self.vocab_size}, {self.nbytes} bytes{device})"

    @property
    def _reader(self) -> TrieReader:
        """The only trie."""
        if self.num_tries != 1:
            raise ValueError(f"this needs one trie, got an arena of {self.num_tries}; its tries are in `readers`")
        return self.readers[0]


def _contents(reader: TrieReader) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Tokens and offsets of the keys (of the passages), payloads and payload offsets."""
    text, n = np.asarray(reader._text), reader.num_sorted
    if reader.is_substrings:
        ends = np.asarray(reader._passage_ends, np.int64)
        text, offsets = np.delete(text, ends), np.append(0, ends - np.arange(len(ends)))
    elif len(reader._starts):
        offsets = np.asarray(reader._starts, np.int64)
    else:
        offsets = np.arange(n + 1) * reader.max_depth
    tokens = np.asarray(reader._table, np.int64)[text] if len(reader._table) else text.astype(np.int64)
    payload_offsets = (
        np.asarray(reader._payload_offsets, np.int64) if len(reader._payload_offsets) else np.arange(n + 1)
    )
    return tokens, offsets, (np.asarray(reader._payloads, np.int64), payload_offsets)


def _joined(offsets: Sequence[np.ndarray]) -> np.ndarray:
    first, second = offsets
    return np.append(first, first[-1] + second[1:])


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
