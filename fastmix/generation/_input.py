"""What users give a trie as sequences and payloads, as arrays for the builders."""

from __future__ import annotations

import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch


class Sequences(NamedTuple):
    """Token sequences: rows of a matrix up to pad_id, or tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray  # [N, L] or 1-D, of an int dtype
    offsets: np.ndarray | None = None  # int64 [N + 1]
    pad_id: int | None = None

    def __len__(self) -> int:
        return len(self.tokens) if self.offsets is None else len(self.offsets) - 1


def from_anything(sequences: Any, pad_id: int | None, name: str) -> Sequences:
    """A matrix as it is; anything else is iterated over, and each of its elements must be a sequence of ints."""
    if pad_id is not None:
        pad_id = _integer(pad_id, "pad_id")
    matrix = _as_array(sequences)
    if matrix is not None:
        if matrix.ndim != 2:
            raise ValueError(f"{name} must be a 2-D array or a list of sequences, got an array of shape {matrix.shape}")
        return Sequences(_integers(matrix, name), pad_id=pad_id)
    if pad_id is not None:
        raise ValueError(f"pad_id is for a 2-D array of sequences, got {type(sequences).__name__}")
    if isinstance(sequences, (str, bytes)) or not isinstance(sequences, Iterable):
        raise TypeError(f"{name} must be a 2-D int array or a list of lists of ints, got {type(sequences).__name__}")
    return _flattened(sequences, name)


def from_arrays(tokens: Any, offsets: Any) -> Sequences:
    """Checks tokens and offsets."""
    tokens, offsets = vector(tokens, "tokens"), vector(offsets, "offsets").astype(np.int64, copy=False)
    if len(offsets) == 0 or offsets[0] < 0 or offsets[-1] > len(tokens):
        got = f"{offsets[0]} … {offsets[-1]}" if len(offsets) else "none"
        raise ValueError(f"offsets must be N + 1 numbers from 0 to len(tokens) = {len(tokens)}, got {got}")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        i = int(falls[0])
        raise ValueError(f"offsets must not decrease, got {offsets[i]} and then {offsets[i + 1]} at sequence {i}")
    return Sequences(tokens, offsets)


def passages(value: Any) -> Sequences:
    """One passage, or several."""
    matrix = _as_array(value)
    if matrix is not None and matrix.ndim == 1:
        return Sequences(_integers(matrix, "passages"), np.array([0, len(matrix)], np.int64))
    if isinstance(value, (list, tuple)) and len(value) > 0 and not _is_sequence(value[0]):
        tokens = _numbers(value, "passages")
        return Sequences(tokens, np.array([0, len(tokens)], np.int64))
    return from_anything(value, None, "passages")


def payloads(value: Any, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """int64 payloads and offsets (None where every sequence has one) from one int, or one list of ints, a sequence."""
    if value is None:
        return None, None
    found = _as_array(value)
    if found is None:
        value = list(value)
        if any(_is_sequence(item) for item in value):
            lists = _flattened(value, "payloads")
            if len(lists) != count:
                raise ValueError(f"payloads must be one for each of the {count} sequences, got {len(lists)}")
            return lists.tokens.astype(np.int64, copy=False), lists.offsets
        found = _numbers(value, "payloads")
    found = vector(found, "payloads")
    if len(found) != count:
        raise ValueError(f"payloads must be one for each of the {count} sequences, got {len(found)}")
    return np.ascontiguousarray(found, np.int64), None


def vector(value: Any, name: str) -> np.ndarray:
    """A contiguous 1-D int array."""
    found = _as_array(value)
    if found is None:
        found = _numbers(value, name)
    if found.ndim != 1:
        raise ValueError(f"{name} must be a 1-D int array, got shape {found.shape}")
    return np.ascontiguousarray(_integers(found, name))


def size(value: Any) -> int | None:
    """Checks a vocabulary size."""
    if value is None:
        return None
    value = _integer(value, "vocab_size")
    if not 0 <= value < 1 << 32:
        raise ValueError(f"vocab_size must be from 0 to 2³² − 1, got {value}")
    return value


def prefix(value: Any) -> list[int]:
    """The tokens of a prefix or key."""
    found = _as_array(value)
    if found is not None:
        return vector(found, "tokens").tolist()
    if not _is_sequence(value) or not all(isinstance(token, (int, np.integer)) for token in value):
        raise TypeError(f"tokens must be a sequence of ints, got {value!r}")
    return [int(token) for token in value]


def _numbers(value: Any, name: str) -> np.ndarray:
    """The ints of a list or another iterable."""
    try:
        return np.frombuffer(array.array("q", value), np.int64)
    except (TypeError, OverflowError):
        raise TypeError(f"{name} must be 64-bit ints, got {_short(value)}") from None


def _flattened(sequences: Iterable, name: str) -> Sequences:
    flat, ends = array.array("q"), array.array("q", [0])
    for i, sequence in enumerate(sequences):
        found = _as_array(sequence)
        try:
            if found is not None:
                flat.frombytes(vector(found, name).astype(np.int64, copy=False).tobytes())
            elif isinstance(sequence, list):
                flat.fromlist(sequence)
            elif _is_sequence(sequence):
                flat.extend(sequence)
            else:
                raise TypeError
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name} must be sequences of 64-bit ints, number {i} is {_short(sequence)}") from None
        ends.append(len(flat))
    return Sequences(np.frombuffer(flat, np.int64), np.frombuffer(ends, np.int64))


def _as_array(value: Any) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return value if isinstance(value, np.ndarray) else None


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return True
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    """The array in an int dtype that the builders read: int32, int64, uint16 or uint32."""
    if values.dtype.kind not in "iu" and values.size:
        raise TypeError(f"{name} must be of an int dtype, got {values.dtype}")
    if values.dtype in (np.int32, np.int64, np.uint16, np.uint32) and values.dtype.isnative and values.flags.aligned:
        return values if values.ndim == 1 or _has_rows(values) else np.ascontiguousarray(values)
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be 64-bit signed ints, got {values.max()}")
    return np.ascontiguousarray(values, np.int64)


def _has_rows(matrix: np.ndarray) -> bool:
    """Whether the builders can read the rows where they are."""
    rows, columns = matrix.strides
    return matrix.size == 0 or (columns == matrix.itemsize and rows >= 0 and rows % matrix.itemsize == 0)


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
