"""Chooses the builder: the compiled one, and NumPy's where the package was installed without."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from fastmix.generation import _format, _numpy_builder
from fastmix.generation._input import Sequences

if importlib.util.find_spec("fastmix._C") is not None:
    from fastmix import _C
else:
    _C = None

Progress = Callable[[float], object]


def keys(
    sequences: Sequences,
    payloads: tuple[np.ndarray | None, np.ndarray | None],
    vocab_size: int | None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The arena of a trie of whole sequences."""
    if _C is not None:
        arena = _C.build_keys(*sequences, *payloads, vocab_size, torch.get_num_threads(), progress)
    else:
        arena = _numpy_builder.build_keys(*_listed(sequences), *payloads, vocab_size)
    return _sealed(arena, progress)


def substrings(passages: Sequences, vocab_size: int | None, progress: Progress | None = None) -> np.ndarray:
    """The arena of a trie of all substrings of passages."""
    tokens, offsets = _listed(passages)
    if offsets[0] == offsets[-1]:
        return keys(Sequences(tokens, np.zeros(1, np.int64)), (None, None), vocab_size, progress)
    if _C is not None:
        arena = _C.build_substrings(tokens, offsets, vocab_size, torch.get_num_threads(), progress)
    else:
        arena = _numpy_builder.build_substrings(tokens, offsets, vocab_size)
    return _sealed(arena, progress)


def _sealed(arena: np.ndarray, progress: Progress | None) -> np.ndarray:
    _format.seal(arena)
    if progress is not None:
        progress(1.0)
    return arena


def _listed(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets, of a matrix's rows up to the first pad_id."""
    matrix, offsets, pad_id = sequences
    if offsets is not None:
        return matrix, offsets
    count, width = matrix.shape
    if pad_id is None:
        return matrix.reshape(-1), np.arange(count + 1) * width
    kept = matrix != pad_id
    lengths = kept.sum(1)
    wrong = np.flatnonzero((kept != (np.arange(width) < lengths[:, None])).any(1))
    if len(wrong):
        raise ValueError(f"sequence {wrong[0]} must have pad_id {pad_id} only behind its tokens")
    return matrix[kept], np.append(0, np.cumsum(lengths))
