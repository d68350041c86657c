"""Builds a trie with NumPy, the same bytes as csrc/trie (docs/trie-format.md): its oracle, and where it is missing."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

import numpy as np

from fastmix.generation import _format
from fastmix.reference._trie import FIXED, INTERVAL_KEYS, MAX_DEPTH, NARROW_KEYS, RAGGED, SUFFIXES

_RECORD = np.dtype(
    [
        ("lo", "<u8"),
        ("hi", "<u8"),
        ("first_child", "<u8"),
        ("first_record", "<u8"),
        ("depth", "<u4"),
        ("children", "<u4"),
    ]
)


class Sorted(NamedTuple):
    """Sorted keys or suffixes: key i is symbols[starts[i] : ends[i]]."""

    symbols: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def build_keys(
    tokens: np.ndarray,
    offsets: np.ndarray,
    payloads: np.ndarray | None,
    payload_offsets: np.ndarray | None,
    vocab_size: int | None,
) -> np.ndarray:
    """The arena of a trie of whole sequences, without checksums.

    Args:
        tokens: 1-D, any int dtype.
        offsets: int64 [N + 1]: sequence i is tokens[offsets[i] : offsets[i + 1]].
        payloads: int64, one for each sequence, or with payload_offsets any number; None: the sequences' numbers.
        payload_offsets: int64 [N + 1], as `offsets`.
        vocab_size: every token is smaller; None: the largest token + 1.

    Returns:
        uint8 [nbytes].

    Raises:
        ValueError: a token is outside the vocabulary, or a sequence too long.
    """
    tokens, lengths = tokens[offsets[0] : offsets[-1]], np.diff(offsets)
    starts = offsets[:-1] - offsets[0]
    vocab_size = check_tokens(tokens, starts, lengths, vocab_size, "sequence")
    used, table, symbols = _encode(tokens, vocab_size)
    order, heads, nodes = _sort(symbols, starts, lengths)
    firsts = order[heads]
    n, lengths = len(heads), lengths[firsts]
    text = _ragged(symbols, starts[firsts], lengths)
    ends = np.cumsum(lengths)
    fixed = n == 0 or lengths.min() == lengths.max()

    if payload_offsets is None:
        payloads, bounds = order if payloads is None else payloads[order], np.append(heads, len(order))
    else:
        counts = np.diff(payload_offsets)[order]
        payloads = _ragged(payloads, payload_offsets[:-1][order], counts)
        bounds = np.append(0, np.cumsum(counts))[np.append(heads, len(order))]
    has_offsets = bool((np.diff(bounds) != 1).any())
    position = _position(n, len(text), len(payloads))
    small = len(payloads) == 0 or (payloads.min() >= 0 and payloads.max() < 1 << 32)

    records, narrow, wide = _tables(Sorted(text, ends - lengths, ends))
    sections = [
        text,
        table,
        np.empty(0, position) if fixed else np.append(0, ends).astype(position),
        records,
        *(narrow[0].astype(symbols.dtype), narrow[1].astype("<u2")),
        *(wide[0].astype(symbols.dtype), wide[1].astype(position)),
        bounds.astype(position) if has_offsets else np.empty(0, position),
        payloads.astype("<u4" if small else "<i8"),
    ]
    entry = _format.Entry(
        kinds=_kinds(FIXED if fixed else RAGGED, symbols.dtype, position, 4 if small else 8, has_offsets),
        num_sorted=n,
        key_length=int(lengths[0]) if fixed and n else 0,
        symbols=len(text),
        used=len(table),
        records=len(records),
        narrow=narrow.shape[1],
        wide=wide.shape[1],
        payloads=len(payloads),
        num_keys=n,
        num_nodes=nodes,
        root=_root(n),
        offset=0,
        size=0,
        passages=0,
        depth=int(lengths.max(initial=0)),
    )
    return _format.assemble([(entry, [*sections, np.empty(0, position)])], vocab_size, used)


def build_substrings(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int | None) -> np.ndarray:
    """The arena of a trie of all substrings of passages, some of them not empty; as `build_keys`."""
    tokens, lengths = tokens[offsets[0] : offsets[-1]], np.diff(offsets)
    vocab_size = check_tokens(tokens, offsets[:-1] - offsets[0], lengths, vocab_size, "passage")
    used, table, symbols = _encode(tokens, vocab_size)
    passage_ends = np.cumsum(lengths + 1) - 1
    text = np.insert(symbols, np.cumsum(lengths), np.iinfo(symbols.dtype).max)
    ends = np.repeat(passage_ends, lengths)  # of the suffix of each token
    starts = np.delete(np.arange(len(text)), passage_ends)
    order, substrings = _suffix_array(text, starts, ends)
    position = _position(len(order), len(text), 0)
    records, narrow, wide = _tables(Sorted(text, starts[order], ends[order]))
    sections = [
        text,
        table,
        starts[order].astype(position),
        records,
        *(narrow[0].astype(symbols.dtype), narrow[1].astype("<u2")),
        *(wide[0].astype(symbols.dtype), wide[1].astype(position)),
        np.empty(0, position),
        np.empty(0, "<u4"),
        passage_ends.astype(position),
    ]
    entry = _format.Entry(
        kinds=_kinds(SUFFIXES, symbols.dtype, position, 0, False),
        num_sorted=len(order),
        key_length=0,
        symbols=len(text),
        used=len(table),
        records=len(records),
        narrow=narrow.shape[1],
        wide=wide.shape[1],
        payloads=0,
        num_keys=substrings,
        num_nodes=substrings + 1,
        root=_root(len(order)),
        offset=0,
        size=0,
        passages=len(lengths),
        depth=int(lengths.max()),
    )
    return _format.assemble([(entry, sections)], vocab_size, used)


def check_tokens(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, vocab_size: int | None, what: str) -> int:
    """Refuses tokens outside the vocabulary and sequences that are too long; returns the vocabulary's size."""
    long = np.flatnonzero(lengths > MAX_DEPTH)
    if len(long):
        raise ValueError(f"{what} {long[0]} must have at most {MAX_DEPTH} tokens, got {lengths[long[0]]}")
    if vocab_size is None:
        # The largest symbol of 4 bytes is a separator.
        limit, vocab_size = (1 << 32) - 1, int(tokens.max()) + 1 if len(tokens) else 0
    else:
        limit = vocab_size
    wrong = np.flatnonzero((tokens < 0) | (tokens >= limit)) if len(tokens) else ()
    if len(wrong):
        i = int(np.searchsorted(starts, wrong[0], side="right")) - 1
        raise ValueError(f"{what} {i} must have tokens from 0 to {limit - 1}, got {tokens[wrong[0]]}")
    return vocab_size


def _encode(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bitmap of the tokens that occur, the symbol table, the symbols."""
    occurs = np.zeros(_format.bitmap_words(vocab_size) * 64, bool)
    occurs[tokens] = True
    bitmap = np.packbits(occurs, bitorder="little").view("<u8")
    if vocab_size <= 65535:
        return bitmap, np.empty(0, "<u4"), tokens.astype("<u2")
    table = np.flatnonzero(occurs)
    if len(table) > 65535:
        return bitmap, np.empty(0, "<u4"), tokens.astype("<u4")
    return bitmap, table.astype("<u4"), (np.cumsum(occurs)[tokens] - 1).astype("<u2")


def _position(*sizes: int) -> np.dtype:
    return np.dtype("<u4" if max(sizes) < (1 << 32) - 1 else "<u8")


def _kinds(kind: int, symbol: np.dtype, position: np.dtype, payload: int, has_offsets: bool) -> int:
    return kind | symbol.itemsize << 8 | position.itemsize << 16 | payload << 24 | has_offsets << 32


def _root(n: int) -> int:
    if n == 0:
        return -1
    return (n - 1) << 20 if n <= INTERVAL_KEYS else 1 << 62


def _ragged(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[starts[i] : starts[i] + lengths[i]], one behind another."""
    ends = np.cumsum(lengths)
    return values[np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)]


def _words(symbols: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, int]:
    """The next 64 bits of symbols of each sequence, and bits per symbol: symbol + 1, and 0 behind the end."""
    bits = symbols.itemsize * 8
    words = np.zeros(len(starts), np.uint64)
    if len(symbols):
        for j in range(64 // bits):
            symbol = symbols[np.minimum(starts + j, len(symbols) - 1)].astype(np.uint64) + np.uint64(1)
            words = words << np.uint64(bits) | np.where(starts + j < ends, symbol, np.uint64(0))
    return words, bits


def _sort(symbols: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Sorts sequences: their numbers in order (equal ones ascending), where distinct ones begin, number of prefixes.

    Sorts by the first word of symbols, then the groups of equal ones by the next, and so on.
    """
    n = len(starts)
    order, head = np.arange(n), np.zeros(n, bool)
    head[:1] = True
    shared = np.zeros(n, np.int64)  # symbols in common with the key before, at heads
    places, depth = np.arange(n), 0
    while len(places):
        ids = order[places]
        words, bits = _words(symbols, starts[ids] + depth, (starts + lengths)[ids])
        by = np.lexsort((words, np.cumsum(head)[places]))
        words = words[by]
        order[places] = ids[by]
        differ = words[1:] ^ words[:-1]
        new = np.flatnonzero(~head[places[1:]] & (differ != 0))
        shared[places[1:][new]] = depth + sum(
            differ[new] >> np.uint64(64 - bits * j) == 0 for j in range(1, 64 // bits)
        )
        head[places[1:][new]] = True
        single = head[places] & np.append(head, True)[places + 1]
        going = ~single & (words & np.uint64((1 << bits) - 1) != 0)
        places, depth = places[going], depth + 64 // bits
    heads = np.flatnonzero(head)
    return order, heads, int(n > 0) + int((lengths[order[heads]] - shared[heads]).sum())


def _suffix_array(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, int]:
    """The suffixes text[starts[i] : ends[i]] in order (equal ones ascending), and how many distinct substrings.

    Prefix doubling: from the ranks by the first h symbols follow those by the first 2h.
    """
    n = len(starts)
    number = np.zeros(len(text) + 1, np.int64)  # of the suffix that starts at a place
    number[starts] = np.arange(n)
    ranks, h = [np.unique(text[starts], return_inverse=True)[1]], 1
    while True:
        following = np.where(starts + h < ends, ranks[-1][number[np.minimum(starts + h, len(text))]] + 1, 0)
        rank = np.unique(ranks[-1] * (n + 1) + following, return_inverse=True)[1]
        if rank.max() == ranks[-1].max():
            break
        ranks.append(rank)
        h *= 2
    order = np.argsort(rank, kind="stable")
    # Common prefixes of neighbours: the same ranks are the same next h symbols, up to the end.
    a, b = order[:-1], order[1:]
    shortest = np.minimum((ends - starts)[a], (ends - starts)[b])
    shared = np.zeros(n - 1, np.int64)
    for part in reversed(ranks):
        at = [number[np.minimum(starts[side] + shared, len(text))] for side in (a, b)]
        shared += np.where(part[at[0]] == part[at[1]], h, 0)
        h //= 2
    shared = np.where(rank[a] == rank[b], shortest, np.minimum(shared, shortest))
    return order, int((ends - starts).sum() - shared.sum())


def _tables(keys: Sorted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records of intervals of many keys, breadth first, and their narrow and wide children: symbols and begins."""
    n = len(keys.starts)
    records, tables, num_children = [], ([np.empty((2, 0), np.int64)], [np.empty((2, 0), np.int64)]), [0, 0]
    queue = deque([(0, n, 0)] if n > INTERVAL_KEYS else [])
    numbered = len(queue)
    while queue:
        lo, hi, depth = queue.popleft()
        depth = _common(keys, lo, hi - 1, depth)
        children = _branches(keys, lo, hi, depth)
        is_wide = hi - lo > NARROW_KEYS
        records.append((lo, hi, num_children[is_wide], numbered, depth, children.shape[1]))
        tables[is_wide].append(children)
        num_children[is_wide] += children.shape[1]
        begins = lo + children[1]
        sizes = np.append(begins[1:], hi) - begins
        for j in np.flatnonzero(sizes > INTERVAL_KEYS):
            queue.append((int(begins[j]), int(begins[j] + sizes[j]), depth + 1))
            numbered += 1
    return np.array(records, _RECORD), *(np.concatenate(children, axis=1) for children in tables)


def _common(keys: Sorted, i: int, j: int, depth: int) -> int:
    """How many symbols keys i and j have in common, at least `depth`."""
    end = min(keys.ends[k] - keys.starts[k] for k in (i, j))
    size = 64
    while depth < end:
        a, b = (keys.symbols[keys.starts[k] + depth : keys.starts[k] + min(depth + size, end)] for k in (i, j))
        differ = np.flatnonzero(a != b)
        if len(differ):
            return depth + int(differ[0])
        depth, size = min(depth + size, int(end)), size * 2
    return depth


def _branches(keys: Sorted, lo: int, hi: int, depth: int) -> np.ndarray:
    """Next symbols of the keys lo … hi − 1, which share `depth`, and where each one's keys begin: [2, children]."""
    first = lo + bisect_left(range(lo, hi), True, key=lambda i: keys.ends[i] - keys.starts[i] > depth)
    if first == hi:
        return np.empty((2, 0), np.int64)
    if keys.symbols[keys.starts[first] + depth] == keys.symbols[keys.starts[hi - 1] + depth]:
        begins = np.zeros(1, np.int64)  # a chain, whose keys need not all be looked at
    else:
        symbols = keys.symbols[keys.starts[first:hi] + depth]
        begins = np.append(0, np.flatnonzero(symbols[1:] != symbols[:-1]) + 1)
    return np.stack([keys.symbols[keys.starts[first + begins] + depth], first - lo + begins])
