"""`fastmix trie build | info | lookup`."""

from __future__ import annotations

import argparse
import json
import sys
from array import array

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from fastmix.generation import Trie
from fastmix.reference._trie import TrieReader

_SHOWN = 20  # tokens and payloads in a line of text
_KINDS = {False: "sequences", True: "substrings of passages"}


def main(arguments: argparse.Namespace) -> int:
    """Runs a command; what the user can do about goes to stderr as one line, with exit code 2."""
    try:
        return {"build": _build, "info": _info, "lookup": _lookup}[arguments.action](arguments)
    except (OSError, ValueError, TypeError) as error:
        print(f"fastmix trie {arguments.action}: {error}", file=sys.stderr)
        return 2


def _build(arguments: argparse.Namespace) -> int:
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"OUT must be a file in a folder that is there, got {arguments.out}")
    tokens, offsets = (_array if arguments.keys.suffix == ".npy" else _lines)(arguments)
    try:
        trie = _built(arguments, tokens, offsets)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{arguments.keys}: {error}") from None
    trie.save(arguments.out)
    print(f"{arguments.out}: {trie}")
    return 0


def _built(arguments: argparse.Namespace, tokens: np.ndarray, offsets: np.ndarray | None) -> Trie:
    """The trie of a matrix (no offsets), or of tokens[offsets[i] : offsets[i + 1]]."""
    with tqdm(total=100, desc="building", bar_format="{l_bar}{bar}| {elapsed}", disable=None) as bar:

        def progress(share: float) -> None:
            bar.update(100 * share - bar.n)

        options = {"vocab_size": arguments.vocab_size, "progress": progress}
        if arguments.substrings and offsets is None:
            passages = [row[: _length(row, arguments.pad_id)] for row in tokens]
            return Trie.from_substrings(passages, **options)
        if arguments.substrings:
            return Trie.from_substrings(np.split(tokens, offsets[1:-1]), **options)
        if offsets is None:
            return Trie.from_sequences(tokens, pad_id=arguments.pad_id, **options)
        return Trie.from_arrays(tokens, offsets, **options)


def _array(arguments: argparse.Namespace) -> tuple[np.ndarray, None]:
    """The matrix in a .npy file."""
    try:
        rows = np.load(arguments.keys, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{arguments.keys}: {error}") from None
    if rows.ndim != 2:
        raise ValueError(f"{arguments.keys}: must be a 2-D array of ints, got shape {rows.shape}")
    return rows, None


def _lines(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of the sequences in a file of JSON lines."""
    if arguments.pad_id is not None:
        raise ValueError("--pad-id is for a .npy file")
    path, limit = arguments.keys, arguments.vocab_size or (1 << 32) - 1
    tokens, offsets = array("I"), array("q", [0])
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc="reading", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            try:
                sequence = json.loads(line)
            except ValueError:
                sequence = None
            # bool is an int to isinstance.
            if not isinstance(sequence, list) or not all(type(token) is int for token in sequence):
                text = line.decode(errors="replace").strip()
                raise ValueError(f"{path}, line {number}: must be a list of ints, got {text[:60]!r}")
            if sequence and not 0 <= min(sequence) <= max(sequence) < limit:
                wrong = next(token for token in sequence if not 0 <= token < limit)
                raise ValueError(f"{path}, line {number}: must have tokens from 0 to {limit - 1}, got {wrong}")
            tokens.fromlist(sequence)
            offsets.append(len(tokens))
    return np.frombuffer(tokens, np.uint32), np.frombuffer(offsets, np.int64)


def _length(row: np.ndarray, pad_id: int | None) -> int:
    """How many tokens a row has."""
    pads = () if pad_id is None else np.flatnonzero(row == pad_id)
    return int(pads[0]) if len(pads) else len(row)


def _info(arguments: argparse.Namespace) -> int:
    trie = Trie.load(arguments.file, verify=arguments.verify)
    keys = len(trie)
    rows = [
        ("tries", trie.num_tries),
        ("vocabulary", trie.vocab_size),
        ("bytes", trie.nbytes),
        ("keys", keys),
        ("nodes", trie.num_nodes),
    ]
    if keys:
        rows.append(("bytes a key", f"{trie.nbytes / keys:.1f}"))
    kinds = sorted({reader.is_substrings for reader in trie.readers})
    rows.append(("of", ", ".join(_KINDS[kind] for kind in kinds)))
    rows.append(("longest", max(reader.max_depth for reader in trie.readers)))
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    return 0


def _lookup(arguments: argparse.Namespace) -> int:
    trie = Trie.load(arguments.file)
    nodes = [reader.walk(arguments.tokens) for reader in trie.readers]
    for i, (reader, node) in enumerate(zip(trie.readers, nodes, strict=True)):
        if trie.num_tries > 1:
            print(f"trie {i}")
        print(tabulate(_description(reader, node), tablefmt="plain", disable_numparse=True))
    return 0 if any(node >= 0 for node in nodes) else 1


def _description(reader: TrieReader, node: int) -> list[tuple[str, str]]:
    rows = [("prefix", "yes" if node >= 0 else "no"), ("key", "yes" if reader.ends(node) else "no")]
    if reader.ends(node):
        rows.append(("passages" if reader.is_substrings else "payloads", _listed(reader.payloads(node))))
    if node >= 0:
        rows.append(("next tokens", _listed(reader.tokens(node))))
    return rows


def _listed(numbers: list[int]) -> str:
    more = f" … ({len(numbers)} in all)" if len(numbers) > _SHOWN else ""
    return " ".join(map(str, numbers[:_SHOWN])) + more if numbers else "none"
