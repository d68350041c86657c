"""Trie-masked beam search: a step, a whole search in transformers' generate, building and opening the index."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sized
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastmix
from fastmix import Trie
from fastmix.benchmarks import trie_data, trie_peers
from fastmix.benchmarks.harness import FORWARD, BenchCase, Provider
from fastmix.benchmarks.peers import missing
from fastmix.benchmarks.trie_data import MILLION, SID, TEXT, Setting
from fastmix.testing.beam_search import step_case
from fastmix.testing.cases import Case

# What fills a GPU, and the vocabulary of a large language model.
GPU_SID = dataclasses.replace(SID, name="SID 20M keys", batch=8, count=20 * MILLION)
GPU_SID_LARGE = dataclasses.replace(GPU_SID, name="SID 100M keys", count=100 * MILLION)
GPU_TEXT = dataclasses.replace(TEXT, name="text", batch=8, beams=50, vocab_size=152_000)
SEARCH = dataclasses.replace(TEXT, count=100_000)


def cases(device: str) -> list[BenchCase]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    if device == "cuda":
        return [
            *(_step(GPU_SID, depth, float32, device) for depth in (1, 2, 3)),
            *(_step(GPU_TEXT, depth, bfloat16, device) for depth in (2, 3)),
            _step(GPU_SID_LARGE, 3, float32, device, full_only=True),
            _search(SEARCH, device),
        ]
    return [
        *(_step(SID, depth, float32, device) for depth in (1, 2, 3)),
        _step(SID, 1, bfloat16, device),
        *(_step(TEXT, depth, float32, device) for depth in (1, 2)),
        _step(TEXT, 1, bfloat16, device),
        _search(SEARCH, device),
        _build(MILLION),
        _build(10 * MILLION),
        _open(MILLION),
        _open(3 * MILLION),  # above the size up to which the body's checksum is read too
    ]


# A step


def _step(setting: Setting, depth: int, dtype: torch.dtype, device: str, full_only: bool = False) -> BenchCase:
    b, k, v = setting.shape
    case = step_case(
        f"{setting.name} {b}x{k}x{v}, token {depth}",
        setting.shape,
        lambda generator: trie_data.trie(setting, device),
        depth=0,
        num_candidates=2 * k,
        change=lambda inputs: inputs | {"nodes": trie_data.nodes(setting, depth)},
    )
    peers = trie_peers.step_peers(setting, depth)
    if dtype != torch.float32:
        peers += (Provider("fastmix, float32 logits", _with_float32_logits, yardstick=True),)
    if device == "cuda":
        peers += (Provider("fastmix, replay of a CUDA graph", _replayed, yardstick=True),)
    # Logits are read once. exp(x) in float32 takes some 18 operations (reduction of the range, a polynomial of degree
    # 6, the exponent), the maximum and the sum two more; walks and the selection are left out.
    return BenchCase(
        case,
        dtype,
        moved_bytes={FORWARD: b * k * v * dtype.itemsize},
        flops={FORWARD: 20 * b * k * v},
        peers=peers,
        headline=True,
        full_only=full_only,
    )


def _with_float32_logits(logits: Tensor, **inputs) -> Tensor:
    return fastmix.trie_beam_step(_float32(logits), **inputs).scores


def _replayed(**inputs) -> Tensor:
    graph, scores = _captured(**inputs)
    graph.replay()
    return scores


@functools.lru_cache(maxsize=1)
def _captured(**inputs) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    fastmix.trie_beam_step(**inputs)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = fastmix.trie_beam_step(**inputs)
    return graph, step.scores


@functools.lru_cache(maxsize=1)
def _float32(logits: Tensor) -> Tensor:
    return logits.float()


# A whole search


def _search(setting: Setting, device: str) -> BenchCase:
    """Beam search of a small GPT-2 with random weights; its output are the sequences found."""
    reason = missing("transformers")
    depth = int(np.diff(trie_data.keys(setting).offsets).max())
    options = {"num_beams": setting.beams, "num_return_sequences": setting.beams, "max_new_tokens": depth + 1}

    def make(generator):
        prompt = torch.randint(trie_data.FIRST_TOKEN, setting.vocab_size, (setting.batch, 16), generator=generator)
        return {"prompt": prompt, "weights": torch.empty(0, dtype=torch.float64)}  # of the dtype to compute in

    def fused(prompt, weights):
        from fastmix.integrations.transformers import generate_with_trie

        index = trie_data.trie(setting, device)
        return _generate(prompt, weights.dtype, **options, custom_generate=generate_with_trie, trie=index)

    def masked(prompt, weights):
        root = trie_peers.dict_of_keys(setting)
        length = prompt.shape[1]
        return _generate(
            prompt,
            weights.dtype,
            **options,
            prefix_allowed_tokens_fn=lambda _, sent: trie_peers.allowed_tokens(root, sent[length:].tolist()),
        )

    b, k, v = setting.shape
    case = Case("beam_search", f"generate_with_trie GPT-2 {b}x{k}x{v}, {setting.count} keys", fused, masked, make)
    peer = Provider("generate(prefix_allowed_tokens_fn)", masked, reason)
    return BenchCase(case, torch.float32, moved_bytes={}, flops={}, peers=(peer,), missing=reason)


def _generate(prompt: Tensor, dtype: torch.dtype, **options) -> Tensor:
    return _gpt2(dtype, prompt.device).generate(prompt, attention_mask=torch.ones_like(prompt), **options).float()


@functools.cache
def _gpt2(dtype: torch.dtype, device: torch.device):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": TEXT.vocab_size, "n_layer": 2, "n_head": 4, "n_embd": 128}
    config = GPT2Config(**sizes, eos_token_id=trie_data.EOS, pad_token_id=trie_data.PAD)
    return GPT2LMHeadModel(config).eval().to(device, dtype)


# The index


def _build(count: int) -> BenchCase:
    case = Case(
        "beam_search",
        f"Trie.from_sequences {count}x8",
        lambda keys: _count(Trie.from_sequences(keys.numpy())),
        lambda keys: _count(np.unique(keys.numpy().view("V32"))),
        lambda generator: {"keys": torch.from_numpy(trie_data.random_matrix(count))},
    )
    peers = _BUILDERS if count == MILLION else ()
    return _index_case(case, count, peers=peers, full_only=count > MILLION)


def _open(count: int) -> BenchCase:
    setting = dataclasses.replace(SID, count=count)

    @functools.cache
    def folder():
        return tempfile.TemporaryDirectory(prefix="fastmix-bench-")

    def make(generator):
        path = Path(folder().name, "index.trie")
        if not path.exists():
            trie_data.trie(setting).save(path)
        return {"path": path}

    case = Case(
        "beam_search",
        f"Trie.load {count}x8",
        lambda path: _count(Trie.load(path)),
        lambda path: _count(trie_data.trie(setting)),
        make,
    )
    return _index_case(case, count)


def _index_case(case: Case, count: int, peers: tuple[Provider, ...] = (), **options) -> BenchCase:
    """A case whose output is the number of distinct keys; what a trie answers is a matter of the tests."""
    size = functools.partial(_bytes_per_key, count)
    return BenchCase(case, torch.int32, moved_bytes={}, flops={}, peers=peers, bytes_per_key=size, **options)


def _count(index: Sized) -> Tensor:
    return torch.tensor([float(len(index))])


def _bytes_per_key(count: int) -> float:
    index = trie_data.trie(dataclasses.replace(SID, count=count))
    return index.nbytes / len(index)


def _marisa_bytes_per_key() -> float:
    index = trie_peers.marisa_keys(trie_data.random_matrix(MILLION))
    return len(index.tobytes()) / len(index)


_BUILDERS = (
    Provider(
        "marisa-trie, keys only",
        lambda keys: _count(trie_peers.marisa_keys(keys.numpy())),
        missing("marisa_trie"),
        bytes_per_key=_marisa_bytes_per_key,
    ),
    Provider(
        "marisa-trie, keys and payloads",
        lambda keys: _count(trie_peers.marisa_records(keys.numpy())),
        missing("marisa_trie"),
        full_only=True,
    ),
)
