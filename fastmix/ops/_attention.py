"""What scaled attention's arguments must be, and the two structured ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmix.ops._check import FLOATS, check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops._route import data_is_visible


class RelativeBias(NamedTuple):
    """T5's relative position bias: score[h, i, j] += weight[bucket(j − p_i), h].

    p_i is query i's place among the keys. Buckets are exact for short distances and logarithmic up to max_distance; the
    bias needs no [T, S] memory.

    Attributes:
        weight: [buckets, H], trainable; any floating-point dtype.
        bidirectional: half of the buckets for keys behind the query (an encoder), or none (a decoder).
        max_distance: from here on all distances share one bucket.

    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).
    """

    weight: Tensor
    bidirectional: bool = True
    max_distance: int = 128


class Rotary(NamedTuple):
    """Rotary position embedding of queries and keys: channels (a, b) become (a·cos − b·sin, a·sin + b·cos).

    Attributes:
        cos: [L, R/2], row p for position p; the first R ≤ D channels are rotated, the others stay. No gradient by the
            kernels: tables that require one are served by the slower reference.
        sin: [L, R/2].
        interleaved: pairs are the channels (2i, 2i + 1), RoFormer's, or (i, i + R/2), GPT-NeoX's and Llama's.
        query_positions: int32 or int64 [T] or [B, T], by default each query's place among the keys.
        key_positions: int32 or int64 [S] or [B, S], by default 0 … S − 1. Where a query would stand before the first
            key (T > S, aligned bottom right), all default positions are shifted alike.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv:2104.09864).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None


def broadcast_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value as [B, H, T, D], [B, Hkv, S, D], [B, Hkv, S, Dv], whatever they lack or share expanded."""
    if _fit(query, key, value, enable_gqa):
        return query, key, value
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(name, tensor)
        if not 2 <= tensor.ndim <= 4:
            raise ValueError(f"{name} must be [B, H, length, channels] or lack B and H, got {shape_text(tensor)}")
        if tensor.dtype != query.dtype:
            expected = dtype_name(query.dtype)
            raise TypeError(f"{name} must have the dtype of query, {expected}, got {dtype_name(tensor.dtype)}")
        check_same_device(name, tensor, "query", query)
    if not query.ndim == key.ndim == value.ndim == 4:
        query, key, value = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (query, key, value))
    b = max(query.shape[0], key.shape[0], value.shape[0]) if query.shape[0] else 0
    hkv = max(key.shape[1], value.shape[1])
    h = query.shape[1] if query.shape[1] != 1 else max(hkv, 1)
    s, d = key.shape[2], query.shape[3]
    if key.shape[3] != d or key.shape[0] not in (1, b) or key.shape[1] not in (1, hkv):
        raise ValueError(f"key must be [B, Hkv, S, D] with B = {b}, D = {d}, got {shape_text(key)}")
    if value.shape[2] != s or value.shape[0] not in (1, b) or value.shape[1] not in (1, hkv):
        raise ValueError(f"value must be [B, Hkv, S, Dv] with B = {b}, Hkv = {hkv}, S = {s}, got {shape_text(value)}")
    if query.shape[0] not in (1, b):
        raise ValueError(f"query must be [B, H, T, D] with B = {b}, got {shape_text(query)}")
    if d == 0 or value.shape[3] == 0:
        raise ValueError(f"query and value must have channels, got {shape_text(query)} and {shape_text(value)}")
    if hkv == 0 or h % hkv != 0:
        raise ValueError(f"query must have a multiple of key's {hkv} heads, got {h}")
    if h != hkv and hkv != 1 and not enable_gqa:
        raise ValueError(f"key must have query's {h} heads where enable_gqa is False, got {hkv}")
    if query.shape[:2] != (b, h):
        query = query.expand(b, h, -1, -1)
    if key.shape[:2] != (b, hkv):
        key = key.expand(b, hkv, -1, -1)
    if value.shape[:2] != (b, hkv):
        value = value.expand(b, hkv, -1, -1)
    return query, key, value


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """The quick way past what would be said or changed: four dimensions, all given."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    if not (query.ndim == key.ndim == value.ndim == 4 and query.dtype in FLOATS):
        return False
    (b, h, _, d), (key_b, hkv, s, key_d), value_shape = query.shape, key.shape, value.shape
    return (
        (key_b, key_d) == (b, d)
        and value_shape[:3] == (b, hkv, s)
        and (h == hkv or (enable_gqa and h > 1))
        and hkv > 0
        and h % hkv == 0
        and d > 0
        and value_shape[3] > 0
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )


def check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        wanted = " or ".join(sorted({"float32", dtype_name(query.dtype)}))
        raise TypeError(f"attn_mask must be bool, {wanted}, got {dtype_name(attn_mask.dtype)}")
    check_same_device("attn_mask", attn_mask, "query", query)
    full = (*query.shape[:3], key.shape[2])
    sizes = attn_mask.shape
    if len(sizes) > 4 or any(size not in (1, n) for size, n in zip(sizes[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask must be broadcastable to [B, H, T, S] = {list(full)}, got {shape_text(attn_mask)}")


def check_options(
    query: Tensor,
    key: Tensor,
    prefix_len: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_start: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    relative_bias: RelativeBias | None = None,
    rotary: Rotary | None = None,
    query_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> None:
    b, t, s = query.shape[0], query.shape[2], key.shape[2]
    sequences = b
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        for name, value in (("query_lengths", query_lengths), ("key_lengths", key_lengths), ("key_start", key_start)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None for packed sequences, whose lengths cu_seqlens_q tells, got a Tensor"
                )
        if b != 1:
            raise ValueError(f"query must have B = 1 for packed sequences, got {shape_text(query)}")
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, t)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, s)
        sequences = cu_seqlens_q.shape[0] - 1
        if cu_seqlens_k.shape[0] != sequences + 1:
            raise ValueError(f"cu_seqlens_k must be [{sequences + 1}] as cu_seqlens_q, got {shape_text(cu_seqlens_k)}")
    _check_bounds("prefix_len", prefix_len, query, sequences, s)
    _check_bounds("query_lengths", query_lengths, query, b, t)
    _check_bounds("key_lengths", key_lengths, query, b, s)
    _check_bounds("key_start", key_start, query, b, s)
    if window_size is not None:
        _check_window(window_size)
    if relative_bias is not None:
        _check_relative_bias(relative_bias, query)
    if rotary is not None:
        _check_rotary(rotary, query, s)
    if query_scale is not None:
        _check_query_scale(query_scale, query)


def _check_bounds(name: str, value: Tensor | None, query: Tensor, count: int, high: int) -> None:
    """One int of 0 … high for each of `count` sequences."""
    if value is None:
        return
    _check_int(name, value, query)
    if value.shape != (count,):
        raise ValueError(f"{name} must be [{count}], one for each sequence, got {shape_text(value)}")
    _check_range(name, value, high)


def _check_cu_seqlens(name: str, value: Tensor, query: Tensor, total: int) -> None:
    _check_int(name, value, query)
    if value.ndim != 1 or value.shape[0] < 2:
        raise ValueError(f"{name} must be [N + 1] with N ≥ 1, got {shape_text(value)}")
    if value.is_cpu and data_is_visible(value):
        steps = value.diff()
        if int(value[0]) != 0 or int(steps.min()) < 0 or int(value[-1]) > total:
            raise ValueError(f"{name} must rise from 0 to at most {total}, got {value.tolist()}")


def _check_positions(name: str, value: Tensor | None, query: Tensor, length: int, table: int) -> None:
    if value is None:
        return
    _check_int(name, value, query)
    if value.shape not in ((length,), (query.shape[0], length)):
        raise ValueError(f"{name} must be [{length}] or [{query.shape[0]}, {length}], got {shape_text(value)}")
    _check_range(name, value, table - 1)


def _check_relative_bias(bias: RelativeBias, query: Tensor) -> None:
    if not isinstance(bias, RelativeBias):
        raise TypeError(f"relative_bias must be a RelativeBias, got {type(bias).__name__}")
    check_float("relative_bias.weight", bias.weight)
    check_same_device("relative_bias.weight", bias.weight, "query", query)
    smallest = 4 if bias.bidirectional else 2
    sizes = bias.weight.shape
    if len(sizes) != 2 or sizes[1] != query.shape[1] or sizes[0] < smallest:
        wanted = f"[buckets, H] with buckets ≥ {smallest}, H = {query.shape[1]}"
        raise ValueError(f"relative_bias.weight must be {wanted}, got {shape_text(bias.weight)}")
    exact = sizes[0] // smallest
    if bias.max_distance <= exact:
        raise ValueError(f"relative_bias.max_distance must be above {exact}, got {bias.max_distance}")


def _check_rotary(rotary: Rotary, query: Tensor, s: int) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary, got {type(rotary).__name__}")
    t, d = query.shape[2:]
    for name, table in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        check_float(name, table)
        check_same_device(name, table, "query", query)
        if table.ndim != 2 or table.shape != rotary.cos.shape or 2 * table.shape[1] > d:
            raise ValueError(f"{name} must be [L, R/2] with R ≤ D = {d}, cos and sin alike, got {shape_text(table)}")
    length = rotary.cos.shape[0]
    given = rotary.query_positions is not None, rotary.key_positions is not None
    shortest = 1 if all(given) else max(t, s)
    if length < min(shortest, max(t, s)):
        raise ValueError(f"rotary.cos must have a row for each of {shortest} positions, got {shape_text(rotary.cos)}")
    _check_positions("rotary.query_positions", rotary.query_positions, query, t, length)
    _check_positions("rotary.key_positions", rotary.key_positions, query, s, length)


def _check_query_scale(query_scale: Tensor, query: Tensor) -> None:
    check_float("query_scale", query_scale)
    check_same_device("query_scale", query_scale, "query", query)
    b, _, t, _ = query.shape
    if query_scale.shape not in ((t,), (b, t)):
        raise ValueError(f"query_scale must be [T] = [{t}] or [B, T] = [{b}, {t}], got {shape_text(query_scale)}")


def _check_window(window_size: tuple[int, int]) -> None:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size!r}")
    if not all(isinstance(size, int) for size in window_size):
        raise TypeError(f"window_size must be two ints, got {window_size!r}")
    if min(window_size) < -1:
        raise ValueError(f"window_size must be -1 (unlimited) or more on each side, got {tuple(window_size)}")


def check_dropout(dropout_p: float, dropout_seed: Tensor | int | None, query: Tensor) -> None:
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in 0..1, got {dropout_p}")
    if dropout_seed is None or (isinstance(dropout_seed, int) and not isinstance(dropout_seed, bool)):
        return
    if not isinstance(dropout_seed, Tensor) or dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        raise TypeError(f"dropout_seed must be an int or an int64 tensor of one element, got {dropout_seed!r}")
    check_same_device("dropout_seed", dropout_seed, "query", query)


def _check_int(name: str, value: Tensor, query: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {dtype_name(value.dtype)}")
    check_same_device(name, value, "query", query)


def _check_range(name: str, value: Tensor, high: int) -> None:
    """On a CPU; elsewhere reading values would wait for the device, and the kernels clamp them."""
    if value.is_cpu and value.numel() > 0 and data_is_visible(value):
        few = value.flatten() if value.numel() < 64 else torch.stack(value.aminmax())
        values = few.tolist()  # quicker in Python
        smallest, largest = min(values), max(values)
        if smallest < 0 or largest > high:
            raise ValueError(f"{name} must be in 0..{high}, got values from {smallest} to {largest}")
