"""Attention full, causal and with structure, biases and rotary embedding, against SDPA, FlexAttention and eager."""

from __future__ import annotations

from typing import Any

import torch

from fastmix.benchmarks import attention_models
from fastmix.benchmarks.attention_peers import peers_of
from fastmix.benchmarks.harness import BOTH, FORWARD, BenchCase
from fastmix.benchmarks.models import ModelCase
from fastmix.testing.scaled_attention import scaled_attention_case

# B, H, T, S, D
Shape = tuple[int, int, int, int, int]
FULL = {
    64: ((2, 8, 512, 512, 64), (1, 8, 1024, 1024, 64), (1, 4, 2048, 2048, 64)),
    128: ((2, 4, 512, 512, 128), (1, 4, 1024, 1024, 128), (1, 2, 2048, 2048, 128)),
}
S512, S1024, S2048 = FULL[64]
CAUSAL = {"is_causal": True}
T5 = {"scale": 1.0, "buckets": 32}
LLAMA = {"is_causal": True, "rotary": 64, "interleaved": False}
FORWARD_ONLY = {"fixed": ("query", "key", "value")}
# MiniLM's heads and a batch of sentences.
SENTENCES, LENGTHS = (8, 12, 128, 128, 32), (128, 97, 80, 64, 51, 40, 33, 20)
# Of different lengths, in one row.
PACKED = (0, 300, 812, 1000, 2048)


def cases(device: str) -> list[BenchCase]:
    return _gpu_cases() if device == "cuda" else _cpu_cases()


def models(device: str, full: bool) -> list[ModelCase]:
    return attention_models.cases(device, full)


def _cpu_cases() -> list[BenchCase]:
    single, half = torch.float32, (torch.bfloat16, torch.float16)
    causal_left_padding = {"key_start": [128 - length for length in LENGTHS], **CAUSAL}
    return [
        *(
            _attention("full", shape, single, headline=shape == S1024, full_only=shape not in (S1024, FULL[128][1]))
            for shapes in FULL.values()
            for shape in shapes
        ),
        _attention("causal", S512, single, headline=True, **CAUSAL),
        _attention("causal", S2048, single, **CAUSAL),
        _attention("prefix", (2, 4, *S1024[2:]), single, prefix_len=[256, 512]),
        _attention("T5 bias, fixed", S512, single, fixed=("bias_weight",), **T5),
        _attention("T5 bias", S512, single, **T5),
        _attention("T5 decoder's bias", S512, single, full_only=True, bidirectional=False, **CAUSAL, **T5),
        *(
            _attention(name, S512, dtype, full_only=dtype == torch.float16, **options)
            for dtype in half
            for name, options in (("full", {}), ("causal", CAUSAL))
        ),
        _attention("one query", (4, 8, 1, 4096, 64), single, **FORWARD_ONLY),
        _attention("one query", (4, 16, 1, 4096, 128), single, kv_heads=4, **FORWARD_ONLY),
        _attention("one query", (4, 16, 1, 4096, 128), torch.bfloat16, kv_heads=4, full_only=True, **FORWARD_ONLY),
        _attention("right padding", SENTENCES, single, key_lengths=list(LENGTHS)),
        _attention("left padding, causal", SENTENCES, single, **causal_left_padding),
        _attention("window", S2048, single, window_size=(256, 0)),
        _attention("rotary, causal", S1024, single, **LLAMA),
        _attention("packed, causal", S2048, single, **_packed(PACKED), **CAUSAL),
    ]


def _gpu_cases() -> list[BenchCase]:
    """Shapes that fill a GPU, and whose float64 reference fits in its memory."""
    long, shorter = (1, 8, 8192, 8192, 128), (2, 8, 4096, 4096, 64)
    cases = [
        ("full", long, {}),
        ("causal", long, CAUSAL),
        ("causal", (1, 8, 4096, 4096, 128), {"kv_heads": 2, **CAUSAL}),
        ("full", shorter, {}),
        ("causal", shorter, CAUSAL),
        ("full", (32, 12, 512, 512, 64), {}),
        ("prefix", long, {"prefix_len": [4096]}),
        ("T5 bias, fixed", shorter, {"fixed": ("bias_weight",), **T5}),
        ("T5 bias", shorter, T5),
        ("query_scale", long, {"query_scale": "T"}),
        ("rotary, causal", long, {**LLAMA, "rotary": 128}),
        ("window", long, {"window_size": (1024, 0)}),
        ("packed, causal", long, {**_packed(tuple(4 * bound for bound in PACKED)), **CAUSAL}),
        ("right padding", (64, *SENTENCES[1:]), {"key_lengths": list(LENGTHS) * 8}),
        ("one query", (16, 32, 1, 8192, 128), {"kv_heads": 8, **FORWARD_ONLY}),
    ]
    return [
        *(_attention(name, shape, torch.bfloat16, device="cuda", **options) for name, shape, options in cases),
        *(_attention(name, shape, torch.float16, device="cuda", **options) for name, shape, options in cases[:2]),
        *(_attention(name, shape, torch.float32, device="cuda", **options) for name, shape, options in cases[3:5]),
    ]


def _packed(bounds: tuple[int, ...]) -> dict[str, list[int]]:
    return {"cu_seqlens_q": list(bounds), "cu_seqlens_k": list(bounds)}


def _attention(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    headline: bool = False,
    full_only: bool = False,
    **options: Any,
) -> BenchCase:
    """options: of scaled_attention_case."""
    b, h, t, s, d = shape
    kv_heads = options.get("kv_heads", h)
    heads = f"H{h}" if kv_heads == h else f"H{h}/{kv_heads}"
    # A pair of a query and a key that is attended costs 2·D operations in each product, and an exponential. Forward:
    # query·keyᵀ and weights·value. Backward: those of dq, dk, dv and of the weights' gradient, and, since nothing of
    # size T × S may be kept, query·keyᵀ and the exponential again.
    pairs = h * _pairs(b, t, s, options)
    product = 2 * d * pairs
    # Forward: read query, key and value, write the output. Backward: read them, the output and its gradient, write
    # three gradients.
    query_bytes, key_bytes = (x * d * b * dtype.itemsize for x in (h * t, kv_heads * s))
    forward_bytes = 2 * query_bytes + 2 * key_bytes
    return BenchCase(
        scaled_attention_case(f"{name} B{b} {heads} T{t} S{s} D{d}", shape, **options),
        dtype,
        moved_bytes={FORWARD: forward_bytes, BOTH: forward_bytes + 4 * query_bytes + 4 * key_bytes},
        flops={FORWARD: 2 * product, BOTH: 7 * product},
        exps={FORWARD: pairs, BOTH: 2 * pairs},
        peers=peers_of(dtype, device, packed="cu_seqlens_q" in options, rotary="rotary" in options),
        headline=headline,
        full_only=full_only,
    )


def _pairs(b: int, t: int, s: int, options: dict[str, Any]) -> int:
    """How many pairs of a query and a key are attended in one head: each query's keys are consecutive ones."""
    bounds = torch.tensor(options.get("cu_seqlens_q", [0, t]))
    sequence = torch.searchsorted(bounds[1:-1], torch.arange(t), right=True)
    place = torch.arange(t)  # among all keys: packed sequences are as long in keys as in queries
    first = bounds[sequence].expand(b, t)
    last = (bounds[sequence + 1] if "cu_seqlens_q" in options else torch.tensor(s)).expand(b, t)
    if options.get("is_causal") or "prefix_len" in options:
        last = torch.minimum(last, place + 1)
    if "prefix_len" in options:
        last = torch.maximum(last, torch.tensor(options["prefix_len"])[:, None])
    if "key_lengths" in options:
        last = torch.minimum(last, torch.tensor(options["key_lengths"])[:, None])
    if "key_start" in options:
        first = torch.maximum(first, torch.tensor(options["key_start"])[:, None])
    left, right = options.get("window_size", (-1, -1))
    if left >= 0:
        first = torch.maximum(first, place - left)
    if right >= 0:
        last = torch.minimum(last, place + right + 1)
    return int((last - first).clamp(min=0).sum())
