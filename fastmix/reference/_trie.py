"""Reads the bytes of a trie in plain Python (docs/trie-format.md), as csrc/common/trie_view.h does in C++.

Damaged bytes and values that are no node give wrong answers at worst, as long as `read_arena` accepted the sizes.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

MAGIC, VERSION = b"FMIXTRIE", 1
HEADER_BYTES, ENTRY_BYTES = 64, 128
INTERVAL_KEYS = 64  # a node with more keys has a record
MAX_DEPTH = (1 << 20) - 1
NARROW_KEYS = 1 << 16

FIXED, RAGGED, SUFFIXES = 0, 1, 2  # kinds of keys

_RECORD = 1 << 62
_RECORD_FIELDS = struct.Struct("<4Q2I")
_UINT = {2: "H", 4: "I", 8: "Q"}


class Record(NamedTuple):
    """An interval of more than INTERVAL_KEYS keys; the records of its children are first_record … end_record − 1."""

    lo: int
    hi: int
    first_child: int
    first_record: int
    branch_depth: int
    num_children: int
    end_record: int


class Place(NamedTuple):
    """Where a node stands: the keys lo … hi − 1 share their first `depth` symbols."""

    node: int
    lo: int
    hi: int
    depth: int
    record: Record | None


def read_arena(buffer) -> list[TrieReader]:
    """A reader for each trie of an arena.

    Args:
        buffer: the bytes, anything with the buffer protocol.

    Raises:
        ValueError: they are not those of a trie, of another version, or their sizes do not fit together.
    """
    data = memoryview(buffer).cast("B")
    if len(data) < HEADER_BYTES or bytes(data[:8]) != MAGIC:
        raise ValueError("not a trie: it does not begin with FMIXTRIE")
    version, _, total, body, _, tries, vocab_size = struct.unpack_from("<IIQQIIQ", data, 8)
    if version != VERSION:
        raise ValueError(f"a trie of format version {version}; this fastmix reads version {VERSION}")
    if total != len(data):
        raise ValueError(f"the trie must have {total} bytes, got {len(data)}")
    bitmap = HEADER_BYTES + ENTRY_BYTES * tries
    if tries == 0 or body % 64 or body > total or bitmap + (vocab_size + 63) // 64 * 8 > body:
        raise ValueError("damaged trie: the header's sizes do not fit together")
    entries = [struct.unpack_from("<11Qq4Q", data, HEADER_BYTES + ENTRY_BYTES * i) for i in range(tries)]
    return [TrieReader(data, entry, vocab_size) for entry in entries]


class TrieReader:
    """One trie of an arena. Tokens are ints, nodes are opaque ints, −1 is none."""

    def __init__(self, data: memoryview, entry: tuple[int, ...], vocab_size: int) -> None:
        kinds, n, key_length, symbols, used, records, narrow, wide, payloads = entry[:9]
        self.num_keys, self.num_nodes, self.root, offset, size, passages, self.max_depth = entry[9:]
        self.vocab_size, self.num_sorted, self.kind = vocab_size, n, kinds & 255
        self._key_length = key_length
        symbol, position, payload, has_offsets, rest = (kinds >> shift & 255 for shift in (8, 16, 24, 32, 40))
        if (
            self.kind > SUFFIXES
            or symbol not in (2, 4)
            or position not in (4, 8)
            or payload not in (0, 4, 8)
            or has_offsets > 1
            or rest
            or (self.kind == FIXED and key_length * n != symbols)
        ):
            raise ValueError("damaged trie: unknown kinds in the directory")
        starts = {FIXED: 0, RAGGED: n + 1, SUFFIXES: n}[self.kind]
        sections = [
            (symbols, _UINT[symbol]),
            (used, "I"),
            (starts, _UINT[position]),
            (records * _RECORD_FIELDS.size, "B"),
            (narrow, _UINT[symbol]),
            (narrow, "H"),
            (wide, _UINT[symbol]),
            (wide, _UINT[position]),
            ((n + 1) * has_offsets, _UINT[position]),
            (payloads if payload else 0, "q" if payload == 8 else "I"),
            (passages, _UINT[position]),
        ]
        views, end = [], 0
        for count, code in sections:
            start = (end + 7) // 8 * 8
            end = start + count * struct.calcsize(code)
            views.append((start, end, code))
        if offset % 8 or max(end, size) > len(data) - offset or end > size:
            raise ValueError("damaged trie: a section does not fit into the bytes")
        block = data[offset : offset + size]
        (
            self._text,
            self._table,
            self._starts,
            self._records,
            self._narrow_symbols,
            self._narrow_begins,
            self._wide_symbols,
            self._wide_begins,
            self._payload_offsets,
            self._payloads,
            self._passage_ends,
        ) = (block[start:end].cast(code) for start, end, code in views)
        self._text_bytes, self._symbol_bytes = block[: symbols * symbol], symbol
        self._num_records = records

    @property
    def is_substrings(self) -> bool:
        return self.kind == SUFFIXES

    def tokens(self, node: int) -> list[int]:
        """The tokens of the children, ascending."""
        return self._tokens(self._children(self._place(node))[0])

    def children(self, node: int) -> tuple[list[int], list[int]]:
        """Tokens, ascending, and nodes of the children."""
        symbols, child = self._children(self._place(node))
        return self._tokens(symbols), [child(j) for j in range(len(symbols))]

    def child(self, node: int, token: int) -> int:
        """The child by a token, or −1."""
        return self._child(self._place(node), token)

    def walk(self, tokens: Iterable[int], node: int | None = None) -> int:
        """The node that tokens lead to from a node (default: the root), or −1."""
        node = self.root if node is None else node
        place = self._place(node)
        for token in tokens:
            node = self._child(place, token)
            place = self._decode(node)  # a child needs no check, which would compare all tokens so far
        return node if place else -1

    def ends(self, node: int) -> bool:
        """Whether a key ends here: a whole key, or any non-empty substring."""
        place = self._place(node)
        if place is None:
            return False
        return place.depth > 0 if self.is_substrings else self._length(place.lo) == place.depth

    def interval(self, node: int) -> tuple[int, int]:
        """The sorted keys lo … hi − 1 below a node."""
        place = self._place(node)
        return (place.lo, place.hi) if place else (0, 0)

    def key(self, i: int) -> list[int]:
        """The i-th sorted key (suffix)."""
        start = self._start(i)
        return self._tokens(self._text[start : start + self._length(i)].tolist())

    def prefix(self, node: int) -> list[int]:
        """The tokens that lead to a node."""
        place = self._place(node)
        if place is None:
            return []
        start = self._start(place.lo)
        return self._tokens(self._text[start : start + place.depth].tolist())

    def payloads(self, node: int) -> list[int]:
        """Payloads of the key that ends at a node; for substrings the numbers of the passages that contain it."""
        if not self.ends(node):
            return []
        lo, hi = self.interval(node)
        if self.is_substrings:
            return sorted({bisect_right(self._passage_ends, self._starts[i]) for i in range(lo, hi)})
        if not self._payload_offsets:
            return self._payloads[lo : lo + 1].tolist()
        return self._payloads[self._payload_offsets[lo] : self._payload_offsets[lo + 1]].tolist()

    def _decode(self, node: int) -> Place | None:
        """What a node says of its place, None if that is not in the trie."""
        if not 0 <= node < 1 << 63:
            return None
        depth = node & MAX_DEPTH
        if node & _RECORD:
            number = (node ^ _RECORD) >> 20
            if number >= self._num_records:
                return None
            record = self._record(number)
            if not record.lo + INTERVAL_KEYS < record.hi <= self.num_sorted or depth > record.branch_depth:
                return None
            return Place(node, record.lo, record.hi, depth, record)
        lo, count = node >> 26, (node >> 20 & 63) + 1
        return Place(node, lo, lo + count, depth, None) if lo + count <= self.num_sorted else None

    def _place(self, node: int) -> Place | None:
        """The place of a node, None for what is no node."""
        place = self._decode(node)
        if place is None:
            return None
        _, lo, hi, depth, _ = place
        # Exactly the keys that share the first `depth` symbols.
        whole = (
            self._share(lo, hi - 1, depth)
            and not (lo > 0 and self._share(lo - 1, lo, depth))
            and not (hi < self.num_sorted and self._share(lo, hi, depth))
        )
        return place if whole else None

    def _child(self, place: Place | None, token: int) -> int:
        symbol = token
        if self._table:
            symbol = bisect_left(self._table, token)
            if symbol == len(self._table) or self._table[symbol] != token:
                return -1
        if place is None:
            return -1
        record = place.record
        if record is not None and record.branch_depth == place.depth:
            table, _ = self._tables(record)
            end = min(record.first_child + record.num_children, len(table))
            j = bisect_left(table, symbol, min(record.first_child, end), end)
            return self._table_child(record, j - record.first_child) if j < end and table[j] == symbol else -1
        symbols, child = self._children(place)
        return child(symbols.index(symbol)) if symbol in symbols else -1

    def _children(self, place: Place | None) -> tuple[list[int], Callable[[int], int]]:
        """The symbols of the children, and the function that gives the j-th one."""
        if place is None or place.depth == MAX_DEPTH:
            return [], int
        node, lo, hi, depth, record = place
        if record is None:
            begins = []
            for i in range(lo, hi):
                if self._length(i) > depth:
                    symbol = self._text[self._start(i) + depth]
                    if not begins or begins[-1][0] != symbol:
                        begins.append((symbol, i))
            bounds = [*(i for _, i in begins), hi]
            return [symbol for symbol, _ in begins], lambda j: self._node(bounds[j], bounds[j + 1], depth + 1)
        if depth < record.branch_depth:
            symbols = [self._text[self._start(lo) + depth]] if self._length(lo) > depth else []
            return symbols, lambda j: node + 1
        first = record.first_child
        symbols = self._tables(record)[0][first : first + record.num_children].tolist()
        return symbols, lambda j: self._table_child(record, j)

    def _table_child(self, record: Record, j: int) -> int:
        """The j-th child of a record, at its branch depth."""
        begins, first, depth = self._tables(record)[1], record.first_child + j, record.branch_depth + 1
        begin = record.lo + begins[first]
        last = j + 1 == record.num_children or first + 1 == len(begins)
        end = record.hi if last else record.lo + begins[first + 1]
        if end - begin <= INTERVAL_KEYS:
            return self._node(begin, end, depth)
        low, high = record.first_record, record.end_record
        while low < high:  # the children's records are together, in order
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._record(middle).lo < begin else (low, middle)
        return _RECORD | low << 20 | depth

    def _record(self, number: int) -> Record:
        size = _RECORD_FIELDS.size
        fields = _RECORD_FIELDS.unpack_from(self._records, number * size)
        if number + 1 == self._num_records:
            return Record(*fields, self._num_records)
        _, _, _, end, _, _ = _RECORD_FIELDS.unpack_from(self._records, (number + 1) * size)
        return Record(*fields, min(end, self._num_records))

    def _tables(self, record: Record) -> tuple[memoryview, memoryview]:
        if record.hi - record.lo <= NARROW_KEYS:
            return self._narrow_symbols, self._narrow_begins
        return self._wide_symbols, self._wide_begins

    def _node(self, lo: int, hi: int, depth: int) -> int:
        return lo << 26 | (hi - lo - 1) << 20 | depth if 0 < hi - lo <= INTERVAL_KEYS else -1

    def _start(self, i: int) -> int:
        return i * self._key_length if self.kind == FIXED else self._starts[i]

    def _length(self, i: int) -> int:
        """Tokens of key i; of damaged bytes never more than the text has."""
        if self.kind == FIXED:
            return self._key_length
        start = self._starts[i]
        if self.kind == RAGGED:
            return max(0, min(self._starts[i + 1], len(self._text)) - start)
        passage = bisect_right(self._passage_ends, start)
        end = self._passage_ends[passage] if passage < len(self._passage_ends) else start
        return max(0, min(end, len(self._text)) - start)

    def _share(self, i: int, j: int, depth: int) -> bool:
        """Whether keys i and j have at least `depth` symbols and the first ones in common."""
        if self._length(i) < depth or self._length(j) < depth:
            return False
        a, b, size = (count * self._symbol_bytes for count in (self._start(i), self._start(j), depth))
        return i == j or self._text_bytes[a : a + size] == self._text_bytes[b : b + size]

    def _tokens(self, symbols: list[int]) -> list[int]:
        if not self._table:
            return symbols
        return [self._table[symbol] if symbol < len(self._table) else -1 for symbol in symbols]
