"""Keys, tries and beams of the beam-search cases, each made once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmix import Trie

EOS, PAD, FIRST_TOKEN = 1, 2, 3  # keys have neither EOS nor PAD
MILLION = 1_000_000


class Keys(NamedTuple):
    """Key i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray

    def prefix(self, i: int, length: int) -> list[int]:
        return self.tokens[self.offsets[i] : min(self.offsets[i] + length, self.offsets[i + 1])].tolist()


def random_matrix(count: int, vocab_size: int = 2048) -> np.ndarray:
    """Semantic ids: int32 [count, 8], uniformly random."""
    generator = np.random.default_rng(0)
    return generator.integers(FIRST_TOKEN, vocab_size, (count, 8), dtype=np.int32)


def semantic_ids(count: int, vocab_size: int) -> Keys:
    return Keys(random_matrix(count, vocab_size).reshape(-1), np.arange(0, 8 * count + 1, 8))


def zipf_keys(count: int, vocab_size: int) -> Keys:
    """Names: 1 + Poisson(4) tokens of Zipf's distribution with exponent 1.3; 1M begin with 25k different tokens."""
    generator = np.random.default_rng(0)
    offsets = np.append(0, np.cumsum(1 + generator.poisson(4, count)))
    weights = np.arange(1, vocab_size - FIRST_TOKEN + 1) ** -1.3
    ranks = np.searchsorted(np.cumsum(weights / weights.sum())[:-1], generator.random(offsets[-1]))
    tokens = FIRST_TOKEN + generator.permutation(len(weights))
    return Keys(tokens[ranks].astype(np.int32), offsets)


@dataclass(frozen=True)
class Setting:
    """What is decoded: B samples of K beams over V tokens, under one trie."""

    name: str
    batch: int
    beams: int
    vocab_size: int
    draw: Callable[[int, int], Keys]
    count: int = MILLION

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.beams, self.vocab_size


SID = Setting("SID", 2, 70, 2048, semantic_ids)
TEXT = Setting("text", 4, 10, 50264, zipf_keys)


@functools.cache
def keys(setting: Setting) -> Keys:
    return setting.draw(setting.count, setting.vocab_size)


@functools.cache
def trie(setting: Setting, device: str = "cpu") -> Trie:
    if device != "cpu":
        return trie(setting).to(device)
    return Trie.from_arrays(*keys(setting), vocab_size=setting.vocab_size)


@functools.cache
def prefixes(setting: Setting, depth: int) -> list[list[int]]:
    """What B·K beams have decoded when they choose token `depth`, counted from 1: the beginnings of random keys."""
    of, generator = keys(setting), np.random.default_rng(depth)
    long_enough = np.flatnonzero(np.diff(of.offsets) >= depth - 1)
    drawn = generator.choice(long_enough, setting.batch * setting.beams)
    return [of.prefix(i, depth - 1) for i in drawn]


@functools.cache
def nodes(setting: Setting, depth: int) -> Tensor:
    """int64 [B, K]."""
    index = trie(setting)
    found = [index.walk(prefix) for prefix in prefixes(setting, depth)]
    return torch.tensor(found, dtype=torch.int64).view(setting.batch, setting.beams)


@functools.cache
def children(setting: Setting, depth: int) -> list[list[int]]:
    """Of every beam the tokens that may come next, EOS where a key ends."""
    reader, of_beams = trie(setting).readers[0], nodes(setting, depth).view(-1).tolist()
    by_node = {node: sorted(reader.children(node)[0] + [EOS] * reader.ends(node)) for node in set(of_beams)}
    return [by_node[node] for node in of_beams]
