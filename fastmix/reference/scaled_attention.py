"""Scaled attention in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.reference._attention import attended, kept, places, relative_buckets, rotate
from fastmix.reference._dtypes import compute_dtype, no_autocast


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · query·keyᵀ + bias)·value over the pairs that all options allow; `fastmix.scaled_attention`."""
    arguments = op_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, **options)
    output, lse = attend(*arguments)
    return (output, lse) if return_lse else output


def op_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_alignment: str = "top_left",
    prefix_len: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_start: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    relative_bias: tuple[Tensor, bool, int] | None = None,
    rotary: tuple[Tensor, Tensor, bool, Tensor | None, Tensor | None] | None = None,
    query_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_seed: Tensor | int | None = None,
) -> tuple[Any, ...]:
    """What `attend` and the registered op take: integers as int32, vectors in the dtype of computation."""
    (b, _, t, d), s = query.shape, key.shape[2]
    dtype = compute_dtype(query)
    bottom_right = causal_alignment == "bottom_right"
    cos, sin, interleaved, *positions = rotary if rotary is not None else (None, None, True, None, None)
    seed = None
    if dropout_p > 0:
        if dropout_seed is None:
            seed = torch.randint(2**63 - 1, (1,), device=query.device)
        elif isinstance(dropout_seed, int):
            seed = torch.full((1,), dropout_seed, device=query.device)
        else:
            seed = dropout_seed.reshape(1)
    return (
        query,
        key,
        value,
        attn_mask if attn_mask is None else attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape),
        relative_bias if relative_bias is None else bias_table(t, s, bottom_right, dtype, *relative_bias),
        query_scale if query_scale is None else query_scale.to(dtype).expand(b, t),
        cos if cos is None else cos.to(dtype),
        sin if sin is None else sin.to(dtype),
        *(
            value if value is None else value.to(torch.int32).expand(b, length)
            for value, length in zip(positions, (t, s), strict=True)
        ),
        *(
            value if value is None else value.to(torch.int32)
            for value in (prefix_len, query_lengths, key_lengths, key_start, cu_seqlens_q, cu_seqlens_k)
        ),
        seed,
        d**-0.5 if scale is None else float(scale),
        float(dropout_p),
        is_causal or prefix_len is not None,
        bottom_right,
        *(window_size if window_size is not None else (-1, -1)),
        interleaved,
    )


def bias_table(
    t: int, s: int, bottom_right: bool, dtype: torch.dtype, weight: Tensor, bidirectional: bool, max_distance: int
) -> Tensor:
    """[H, T + S − 1] bias of each distance j − p_i, the one at `_zero` being 0."""
    zero, count = _zero(t, s, bottom_right), max(t + s - 1, 0)
    distances = torch.arange(-zero, count - zero, device=weight.device)
    buckets = relative_buckets(distances, weight.shape[0], bidirectional, max_distance)
    return F.embedding(buckets, weight).t().to(dtype, memory_format=torch.contiguous_format)


def _zero(t: int, s: int, bottom_right: bool) -> int:
    return max((s if bottom_right else t) - 1, 0)


def attend(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """(output [B, H, T, Dv], log-sum-exp [B, H, T]) with the arguments of the registered op."""
    weights, lse, allowed = attention_weights(query, key, *options)
    v = value.to(weights.dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    finite = v.isfinite().all(dim=3)  # [B, H, S]
    with no_autocast(query):
        output = weights @ v.where(finite[..., None], 0)
    # 0 · NaN is NaN: a value that is not finite reaches the rows that attend to it, and no others.
    poisoned = (allowed & ~finite[:, :, None]).any(dim=3)
    return output.masked_fill(poisoned[..., None], torch.nan).to(query.dtype), lse


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    bias_table: Tensor | None,
    query_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    prefix_len: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    key_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [B, H, T, S] with dropout applied, log-sum-exp [B, H, T], pairs attended [B, 1 or H, T, S])."""
    dtype = compute_dtype(query)
    (b, h, t, _), s = query.shape, key.shape[2]
    at = places((b, t, s), query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, bottom_right, query.device)
    allowed = attended(at, prefix_len, query_lengths, key_lengths, key_start, causal, window_left, window_right)
    allowed = allowed[:, None]  # [B, 1, T, S]
    if attn_mask is not None:
        allowed = allowed & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
    row_sees, column_is_seen = allowed.any(dim=3), allowed.any(dim=2)  # [B, 1 or H, T], [B, 1 or H, S]

    q = query.to(dtype).where(row_sees[..., None], 0)
    k = key.to(dtype).repeat_interleave(h // key.shape[1], dim=1).where(column_is_seen[..., None], 0)
    if cos is not None:
        row_positions = at.row + at.row_offset.clamp(min=0) if query_positions is None else query_positions
        positions = at.column - at.column_offset.clamp(max=0) if key_positions is None else key_positions
        q, k = (rotate(x, cos, sin, p, interleaved) for x, p in ((q, row_positions), (k, positions)))

    with no_autocast(query):
        factor = scale if query_scale is None else (scale * query_scale)[:, None, :, None]
        scores = (q * factor) @ k.mT
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.to(dtype)
        if bias_table is not None:
            distance = at.column[:, None, :] - (at.row + at.row_offset)[:, :, None]
            index = (distance + _zero(t, s, bottom_right)).clamp(0, max(bias_table.shape[1] - 1, 0))
            scores = scores + bias_table[:, index.long()].transpose(0, 1)
        # Rows that see nothing go through the softmax as zeros: no NaN arises, forwards or backwards.
        scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(~row_sees[..., None], 0)
        lse = torch.logsumexp(scores, dim=3).masked_fill(~row_sees, -torch.inf)
        weights = scores.softmax(dim=3).masked_fill(~allowed, 0)
        if dropout_p > 0:
            weights = weights * kept(at, h, dropout_seed, dropout_p) / (1 - dropout_p)
    return weights, lse, allowed
