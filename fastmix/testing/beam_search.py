"""Cases of trie_beam_step. Their output is the scores; tests/test_beam_search.py compares the other three as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmix
from fastmix import Trie
from fastmix.reference import beam_search as reference
from fastmix.testing.cases import Case


def step_reference(
    logits: Tensor, beam_scores: Tensor, nodes: Tensor, trie: Trie, **options: Any
) -> tuple[Tensor, ...]:
    """The reference with the public function's arguments."""
    eos, bias = options.pop("eos_token_id"), options.pop("candidate_bias", None)
    return reference.trie_beam_step(
        logits,
        beam_scores,
        nodes,
        trie.arena,
        eos_token_ids=sorted({eos} if isinstance(eos, int) else set(eos)),
        candidate_bias=None if bias is None else bias.expand(logits.shape),
        normalize=options.pop("normalize", "vocab"),
        **options,
    )


def random_keys(
    generator: torch.Generator, count: int, vocab_size: int, lengths: tuple[int, int], exponent: float = 1.0
) -> list[list[int]]:
    """Keys of lengths[0] … lengths[1] tokens, small ones the more frequent the larger the exponent."""
    draw = torch.rand(count, lengths[1], generator=generator, dtype=torch.float64)
    tokens = (draw**exponent * vocab_size).long().tolist()
    length = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
    return [key[:size] for key, size in zip(tokens, length, strict=True)]


def nodes_at(trie: Trie, depth: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Nodes of random keys' prefixes of up to `depth` tokens, for each sample of its own trie."""
    batch, beams = shape
    nodes = torch.full(shape, -1, dtype=torch.int64)
    for b in range(batch):
        reader = trie.readers[b if trie.num_tries > 1 else 0]
        for k in range(beams if reader.num_sorted else 0):
            key = reader.key(int(torch.randint(reader.num_sorted, (), generator=generator)))
            nodes[b, k] = reader.walk(key[: int(torch.randint(depth + 1, (), generator=generator))])
    return nodes


def step_case(
    name: str,
    shape: tuple[int, int, int],
    make_trie: Callable[[torch.Generator], Trie],
    *,
    depth: int = 2,
    num_candidates: int | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
    **options: Any,
) -> Case:
    """shape: [B, K, V]; change: of the arguments; options: further ones, if not the defaults."""

    @functools.cache
    def trie_once() -> Trie:
        return make_trie(torch.Generator().manual_seed(1))

    def make(generator):
        trie = trie_once()
        logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        scores = -5 * torch.rand(shape[:2], generator=generator, dtype=torch.float64)
        inputs = {"logits": logits, "beam_scores": scores, "nodes": nodes_at(trie, depth, shape[:2], generator)}
        inputs |= {"trie": trie, "num_candidates": num_candidates or 2 * max(shape[1], 1), "eos_token_id": 1} | options
        return change(inputs)

    return Case(
        "beam_search",
        f"trie_beam_step {name}",
        lambda **inputs: fastmix.trie_beam_step(**inputs).scores,
        lambda **inputs: step_reference(**inputs)[0],
        make,
        independent=1,
    )


def _keys(count: int, vocab_size: int, lengths: tuple[int, int] = (1, 6), exponent: float = 1.0):
    return lambda generator: Trie.from_sequences(random_keys(generator, count, vocab_size, lengths, exponent))


def _changed(**functions: Callable[[Tensor], Tensor]):
    return lambda inputs: inputs | {name: function(inputs[name]) for name, function in functions.items()}


def _with_bias(*shape: int):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return lambda inputs: inputs | {"candidate_bias": draw}


def _set(value: float, *index):
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def _arena(generator: torch.Generator) -> Trie:
    fixed = random_keys(generator, 300, 40, (4, 4))
    ragged = random_keys(generator, 200, 40, (0, 9), 3.0)
    passages = random_keys(generator, 3, 40, (5, 60), 4.0)
    return Trie.concat([Trie.from_sequences(fixed), Trie.from_sequences(ragged), Trie.from_substrings(passages)])


_INF = float("inf")

CASES = [
    step_case("2x5x40", (2, 5, 40), _keys(200, 40)),
    step_case("one beam", (3, 1, 40), _keys(200, 40)),
    step_case("one token", (2, 3, 2), _keys(5, 1, (0, 8))),
    step_case("one key", (2, 3, 17), _keys(1, 17)),
    step_case("the empty key", (2, 3, 17), lambda g: Trie.from_sequences([[]]), depth=0),
    step_case("no key", (2, 3, 17), lambda g: Trie.from_sequences([], vocab_size=17)),
    step_case("no sample", (0, 3, 17), _keys(9, 17)),
    step_case("no beam", (2, 0, 17), _keys(9, 17)),
    step_case("of equal length", (2, 7, 33), _keys(500, 33, (5, 5)), depth=4),
    step_case("large nodes", (2, 6, 300), _keys(4000, 300, (1, 3), 3.0), depth=1),
    step_case("wide root", (1, 4, 1000), _keys(70000, 1000, (3, 3)), depth=1),
    step_case("long chains", (2, 5, 40), _keys(60, 40, (30, 40)), depth=25),
    step_case("chain of many keys", (2, 5, 40), lambda g: Trie.from_sequences(
        [[7, 7, 7, 7, *key] for key in random_keys(g, 150, 40, (0, 3))]), depth=6),
    step_case("V wider than the vocabulary", (2, 5, 101), _keys(200, 40)),
    step_case("V = 50264", (1, 3, 50264), _keys(3000, 50264, (1, 5), 4.0), eos_token_id=50263),
    step_case("table of symbols", (2, 4, 70001), _keys(2000, 70000, (1, 4), 4.0), eos_token_id=70000),
    step_case("several EOS", (2, 5, 40), _keys(200, 40, (1, 3)), eos_token_id=[39, 0, 7]),
    step_case("no EOS", (2, 5, 40), _keys(200, 40, (1, 3)), eos_token_id=[]),
    step_case("allowed only", (2, 5, 40), _keys(200, 40, (1, 4)), normalize="allowed"),
    step_case("not normalised", (2, 5, 40), _keys(200, 40, (1, 4)), normalize=None),
    step_case("more candidates than there are", (2, 5, 40), _keys(50, 40), num_candidates=1000),
    step_case("one candidate", (2, 5, 40), _keys(200, 40), num_candidates=1),
    step_case("many candidates of many", (2, 30, 500), _keys(9000, 500, (1, 4)), num_candidates=70, depth=1),
    step_case("arena", (3, 5, 40), _arena, depth=5),
    step_case("substrings", (2, 5, 30), lambda g: Trie.from_substrings(
        random_keys(g, 2, 30, (200, 300), 3.0)), depth=3),
    step_case("repeated substrings", (2, 5, 30), lambda g: Trie.from_substrings([5] * 500 + [6] + [5] * 300), depth=9),
    step_case("bias", (2, 5, 40), _keys(200, 40), change=_with_bias(2, 5, 40)),
    step_case("bias of tokens", (2, 5, 40), _keys(200, 40), change=_with_bias(40)),
    step_case("bias of beams", (2, 5, 40), _keys(200, 40), change=_with_bias(2, 5, 1), normalize="allowed"),
    step_case("dead beams", (2, 5, 40), _keys(200, 40), change=_changed(
        beam_scores=_set(-_INF, slice(None), slice(2, 4)), nodes=_set(-1, slice(None), 0))),
    step_case("all dead", (2, 5, 40), _keys(200, 40), change=_changed(beam_scores=_set(-_INF))),
    step_case("no node", (2, 5, 40), _keys(200, 40), change=_changed(nodes=lambda nodes: nodes + 12345678901)),
    step_case("−inf logits", (2, 5, 40), _keys(200, 40), change=_changed(
        logits=_set(-_INF, slice(None), slice(None), slice(None, None, 2)))),
    step_case("a row of −inf", (2, 5, 40), _keys(200, 40), change=_changed(logits=_set(-_INF, slice(None), 2))),
    step_case("+inf", (2, 5, 40), _keys(200, 40), change=_changed(logits=_set(_INF, 0, 2, 5))),
    step_case("NaN", (2, 5, 40), _keys(200, 40), change=_changed(logits=_set(float("nan"), 0, 2, 5))),
    step_case("NaN, not normalised", (2, 5, 40), _keys(200, 40), normalize=None,
              change=_changed(logits=_set(float("nan"), 0, slice(None), slice(0, 9)))),
    step_case("large logits", (2, 5, 40), _keys(200, 40), change=_changed(logits=lambda logits: 3e3 * logits)),
    step_case("constant logits", (2, 5, 40), _keys(200, 40), change=_changed(logits=torch.zeros_like)),
    step_case("strided rows", (2, 5, 40), _keys(200, 40), change=_changed(
        logits=lambda logits: logits.repeat(1, 1, 2)[:, :, 7:47])),
    step_case("strided tokens", (2, 5, 40), _keys(200, 40), change=_changed(
        logits=lambda logits: logits.repeat_interleave(2, 2)[:, :, ::2])),
    step_case("one row for all beams", (2, 5, 40), _keys(200, 40), change=_changed(
        logits=lambda logits: logits[:, :1].expand(2, 5, 40))),
    step_case("strided scores and nodes", (2, 5, 40), _keys(200, 40), change=_changed(
        beam_scores=lambda scores: scores.t().contiguous().t(), nodes=lambda nodes: nodes.t().contiguous().t())),
]  # fmt: skip
