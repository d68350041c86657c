"""trie_beam_step of csrc/cuda, compiled with g++ and run on CPU tensors.

Run as a program, it compares a few cases; the tests do that under the address sanitizer.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, NamedTuple

import emulator
import torch
from torch import Tensor

from fastmix import Trie
from fastmix.testing.beam_search import nodes_at, random_keys, step_reference

SOURCE = "beam_search.cpp"
_NORMALIZE = {None: 0, "vocab": 1, "allowed": 2}
_GUARD = 4096  # bytes before and behind what a kernel may write


class BeamEmulator:
    """The launcher. `order`: a block's threads run ascending (0), descending (1) or shuffled between two barriers."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("workspace_bytes", "splits"):
            getattr(self.library, name).restype = ctypes.c_int64

    def plan(self, name: str, logits: Tensor, num_candidates: int) -> int:
        """`splits` or `workspace_bytes`."""
        sizes = (*logits.shape, logits.element_size(), num_candidates)
        return getattr(self.library, name)(*map(ctypes.c_int64, sizes))

    def step(
        self,
        logits: Tensor,
        beam_scores: Tensor,
        nodes: Tensor,
        trie: Trie | Bytes,
        *,
        num_candidates: int,
        eos_token_id: int | list[int],
        normalize: str | None = "vocab",
        candidate_bias: Tensor | None = None,
        order: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The public function's arguments and results; what is written beyond the results is an error."""
        bias = None if candidate_bias is None else candidate_bias.float().expand(logits.shape)
        eos = sorted({eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id))
        shape = (logits.shape[0], num_candidates)
        sizes = [(self.plan("workspace_bytes", logits, num_candidates), torch.uint8)]
        sizes += [(shape[0] * shape[1], dtype) for dtype in (torch.float32, *[torch.int64] * 3)]
        guarded = [torch.full((2 * _GUARD + size * dtype.itemsize,), 0xFF, dtype=torch.uint8) for size, dtype in sizes]
        parts = [memory[_GUARD:-_GUARD].view(dtype) for memory, (_, dtype) in zip(guarded, sizes, strict=True)]
        results = [part.view(shape) for part in parts[1:]]
        if logits.shape[2] > 1 and logits.stride(2) != 1:
            logits = logits.contiguous()
        rows = beam_scores.float().contiguous(), nodes.contiguous()
        arguments = (logits, *rows, trie.arena, num_candidates, eos)
        self.trie_beam_step_out(*arguments, _NORMALIZE[normalize], bias, parts[0], *results, order=order)
        for memory in guarded:
            assert memory[:_GUARD].eq(0xFF).all(), "a write before a result"
            assert memory[-_GUARD:].eq(0xFF).all(), "a write beyond a result"
        return tuple(results)

    def trie_beam_step_out(
        self,
        logits: Tensor,
        beam_scores: Tensor,
        nodes: Tensor,
        arena: Tensor,
        num_candidates: int,
        eos: list[int],
        normalize: int,
        bias: Tensor | None,
        workspace: Tensor,
        scores: Tensor,
        beam_index: Tensor,
        token: Tensor,
        node: Tensor,
        order: int = 0,
    ) -> None:
        """The op of csrc/cuda/beam_search.cu."""
        assert workspace.numel() == self.plan("workspace_bytes", logits, num_candidates)
        assert logits.stride(2) == 1 or logits.shape[2] <= 1
        if scores.numel() == 0:
            return
        self.library.set_order(order)
        status = self.library.trie_beam_step(
            list(emulator.STORAGE).index(str(logits.dtype).removeprefix("torch.")),
            *map(ctypes.c_int64, logits.shape),
            _pointer(logits, strided=True),
            _integers(logits.stride()[:2]),
            _pointer(beam_scores),
            _pointer(nodes),
            _pointer(arena),
            ctypes.c_int64(arena.numel()),
            ctypes.c_int64(num_candidates),
            _integers(eos),
            ctypes.c_int64(len(eos)),
            ctypes.c_int64(normalize),
            None if bias is None else _pointer(bias, strided=True),
            None if bias is None else _integers(bias.stride()),
            *map(_pointer, (workspace, scores, beam_index, token, node)),
        )
        assert status == 0, "trie_beam_step failed"


def _pointer(tensor: Tensor, strided: bool = False) -> ctypes.c_void_p:
    assert strided or tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _integers(values: Any) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def draw(trie: Trie, shape: tuple[int, int, int], seed: int = 0, depth: int = 2, **options: Any) -> dict[str, Any]:
    """Arguments with small whole numbers: no rounding without a normalisation, and nearly every score is a tie."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "logits": torch.randint(-3, 4, shape, generator=generator).float(),
        "beam_scores": torch.randint(-2, 1, shape[:2], generator=generator).float(),
        "nodes": nodes_at(trie, depth, shape[:2], generator),
        "trie": trie,
        "num_candidates": 2 * shape[1],
        "eos_token_id": 1,
        "normalize": None,
    }
    return inputs | options


class Bytes(NamedTuple):
    """Damaged ones, which no Trie would take."""

    arena: Tensor


def main() -> None:
    kernels = BeamEmulator(emulator.build(sanitize=True, source=SOURCE))
    generator = torch.Generator().manual_seed(0)
    ragged = Trie.from_sequences(random_keys(generator, 3000, 50, (0, 5), 2.0))
    passages = Trie.from_substrings(random_keys(generator, 2, 50, (100, 200), 3.0))
    tries = [ragged, passages, Trie.concat([passages, ragged])]
    for trie, dtype in zip(tries, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        forged = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 2), generator=generator)
        for num_candidates in (2, 40, 2049):
            inputs = draw(trie, (2, 4, 53), num_candidates=num_candidates)
            inputs["logits"] = inputs["logits"].to(dtype)
            inputs["nodes"][:, 2:] = forged if num_candidates == 40 else inputs["nodes"][:, 2:] + 1
            for actual, wanted in zip(kernels.step(**inputs), step_reference(**inputs), strict=True):
                assert torch.equal(actual, wanted)
    wide = draw(ragged, (1, 1, 8193), num_candidates=3, normalize="vocab")
    torch.testing.assert_close(kernels.step(**wide)[0], step_reference(**wide)[0])
    for _ in range(5):
        places = torch.randint(64, len(ragged.arena), (100,), generator=generator)
        damaged = ragged.arena.clone()
        damaged[places] = torch.randint(256, places.shape, generator=generator, dtype=torch.uint8)
        kernels.step(**draw(ragged, (1, 4, 53), num_candidates=3) | {"trie": Bytes(damaged)})
    print("sanitized: ok")


if __name__ == "__main__":
    sys.exit(main())
