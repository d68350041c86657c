"""Arenas of tries as bytes (docs/trie-format.md): putting them together, checksums, files."""

from __future__ import annotations

import contextlib
import mmap as memory_map
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmix.reference._trie import ENTRY_BYTES, HEADER_BYTES, MAGIC, VERSION

_HEADER = struct.Struct("<8sIIQQIIQ16x")
_ENTRY = struct.Struct("<11Qq4Q")
_HEADER_CHECKSUM, _BODY_CHECKSUM = 12, 32  # where they stand
_CHECKED_BYTES = 64 << 20  # `load` checks the body of a file up to this size in any case


class Entry(NamedTuple):
    """What the directory says about one trie."""

    kinds: int
    num_sorted: int
    key_length: int
    symbols: int
    used: int
    records: int
    narrow: int
    wide: int
    payloads: int
    num_keys: int
    num_nodes: int
    root: int
    offset: int
    size: int
    passages: int
    depth: int


class Header(NamedTuple):
    """The first bytes of an arena."""

    magic: bytes
    version: int
    checksum: int
    size: int
    body: int
    body_checksum: int
    num_tries: int
    vocab_size: int


def align(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to


def body_offset(num_tries: int, vocab_size: int) -> int:
    """Where the first trie of an arena starts."""
    return align(HEADER_BYTES + ENTRY_BYTES * num_tries + bitmap_words(vocab_size) * 8, 64)


def bitmap_words(vocab_size: int) -> int:
    """How many uint64 the bitmap of the tokens that occur has."""
    return -(-vocab_size // 64)


def header(arena: np.ndarray) -> Header:
    """The header of an arena that has one."""
    return Header(*_HEADER.unpack_from(arena))


def entries(arena: np.ndarray) -> list[Entry]:
    """The directory of an arena."""
    count = header(arena).num_tries
    return [Entry(*_ENTRY.unpack_from(arena, HEADER_BYTES + ENTRY_BYTES * i)) for i in range(count)]


def bitmap(arena: np.ndarray) -> np.ndarray:
    """The bitmap of the tokens that occur, as uint64 that share the arena's memory."""
    fields = header(arena)
    start = HEADER_BYTES + ENTRY_BYTES * fields.num_tries
    return arena[start : start + bitmap_words(fields.vocab_size) * 8].view("<u8")


def assemble(tries: Sequence[tuple[Entry, Sequence[np.ndarray]]], vocab_size: int, used: np.ndarray) -> np.ndarray:
    """An arena without checksums from the sections of its tries, the vocabulary size and the bitmap."""
    body = end = body_offset(len(tries), vocab_size)
    directory, places = [], []
    for entry, sections in tries:
        offset = end = align(end, 64)
        for section in sections:
            start = align(end, 8)
            end = start + section.nbytes
            places.append((start, section))
        directory.append(entry._replace(offset=offset, size=end - offset))
    arena = np.zeros(end, np.uint8)
    _HEADER.pack_into(arena, 0, MAGIC, VERSION, 0, end, body, 0, len(tries), vocab_size)
    for i, entry in enumerate(directory):
        _ENTRY.pack_into(arena, HEADER_BYTES + ENTRY_BYTES * i, *entry)
    bitmap(arena)[: len(used)] = used
    for start, section in places:
        arena[start : start + section.nbytes] = section.view(np.uint8)
    return arena


def seal(arena: np.ndarray) -> np.ndarray:
    """Writes the checksums of an arena into it."""
    body = header(arena).body
    struct.pack_into("<I", arena, _BODY_CHECKSUM, zlib.crc32(arena[body:]))
    struct.pack_into("<I", arena, _HEADER_CHECKSUM, _header_checksum(arena))
    return arena


def concat(arenas: Sequence[np.ndarray]) -> np.ndarray:
    """One arena with the tries of several, one after another."""
    vocab_size = max(header(arena).vocab_size for arena in arenas)
    used = np.zeros(bitmap_words(vocab_size), np.uint64)
    tries = []
    for arena in arenas:
        words = bitmap(arena)
        used[: len(words)] |= words
        tries += [(entry, [arena[entry.offset : entry.offset + entry.size]]) for entry in entries(arena)]
    return seal(assemble(tries, vocab_size, used))


def check(arena: np.ndarray, body: bool = True) -> None:
    """Refuses bytes that are not what was written.

    Args:
        arena: the bytes.
        body: also compare the body's checksum, which reads everything.

    Raises:
        ValueError: what is wrong with them.
    """
    if len(arena) < HEADER_BYTES or bytes(arena[:8]) != MAGIC:
        raise ValueError("not a trie: it does not begin with FMIXTRIE")
    fields = header(arena)
    if fields.version != VERSION:
        raise ValueError(f"a trie of format version {fields.version}; this fastmix reads version {VERSION}")
    if fields.size != len(arena):
        raise ValueError(f"the trie must have {fields.size} bytes, got {len(arena)}")
    if not HEADER_BYTES <= fields.body <= len(arena) or _header_checksum(arena) != fields.checksum:
        raise ValueError("damaged trie: the checksum of the header does not match")
    if body and zlib.crc32(arena[fields.body :]) != fields.body_checksum:
        raise ValueError("damaged trie: the checksum of the body does not match")


def read(path: os.PathLike | str, mmap: bool, verify: bool) -> np.ndarray:
    """The bytes of a file, checked; with `mmap` a private mapping of it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not mmap or size == 0:  # nothing can't be mapped
            arena = np.fromfile(file, np.uint8)
        else:
            # Private and writable, though nobody writes: torch warns about tensors over read-only memory.
            arena = np.frombuffer(memory_map.mmap(file.fileno(), size, access=memory_map.ACCESS_COPY), np.uint8)
    try:
        check(arena, body=verify or not mmap or size <= _CHECKED_BYTES)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    return arena


def write(path: os.PathLike | str, arena: np.ndarray) -> None:
    """Writes a file beside its place and renames it, so that there is the whole file or none."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            # As a file made by open(): mkstemp's are for their owner alone.
            os.fchmod(descriptor, 0o666 & ~_umask())
            file.write(arena)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _header_checksum(arena: np.ndarray) -> int:
    end = _HEADER_CHECKSUM + 4
    first = zlib.crc32(bytes(4), zlib.crc32(arena[:_HEADER_CHECKSUM]))
    return zlib.crc32(arena[end : header(arena).body], first)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
