"""Parts of the attention reference: who attends to whom, rotary embedding, relative buckets, dropout's random words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where rows and columns stand in their sequence: a sample of the batch, or a packed one."""

    row: Tensor  # [B, T] i
    column: Tensor  # [B, S] j
    row_sequence: Tensor  # [B, T]
    column_sequence: Tensor  # [B, S]
    row_offset: Tensor  # [B, T] p_i − i
    column_offset: Tensor  # [B, S] the same of the column's sequence


def places(
    sizes: tuple[int, int, int],
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bottom_right: bool,
    device: torch.device,
) -> Places:
    b, t, s = sizes
    rows, columns = torch.arange(t, device=device), torch.arange(s, device=device)
    if cu_seqlens_q is None:
        row_sequence = column_sequence = torch.arange(b, device=device)[:, None]
        lengths_q = torch.full((b,), t, device=device) if query_lengths is None else query_lengths
        lengths_k = torch.full((b,), s, device=device) if key_lengths is None else key_lengths
        row, column = rows.expand(b, t), columns.expand(b, s)
    else:
        n = cu_seqlens_q.shape[0] - 1
        # Rows behind the last sequence belong to a further one, n, and columns there to n + 1: nobody attends.
        row_sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), rows, right=True)[None]
        column_sequence = torch.searchsorted(cu_seqlens_k[1:].contiguous(), columns, right=True)[None]
        row = rows - cu_seqlens_q[row_sequence]
        column = columns - cu_seqlens_k[column_sequence]
        lengths_q = torch.cat([cu_seqlens_q.diff(), cu_seqlens_q.new_zeros(2)])
        lengths_k = torch.cat([cu_seqlens_k.diff(), cu_seqlens_k.new_zeros(2)])
        column_sequence = torch.where(column_sequence == n, n + 1, column_sequence)
    offset = (lengths_k - lengths_q) * int(bottom_right)
    row_offset, column_offset = offset[row_sequence], offset[column_sequence]
    return Places(row, column, row_sequence, column_sequence, row_offset, column_offset)


def attended(
    at: Places,
    prefix_len: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    key_start: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
) -> Tensor:
    """[B, T, S]: what the structure allows, without a mask."""
    place, column = (at.row + at.row_offset)[:, :, None], at.column[:, None, :]
    allowed = at.row_sequence[:, :, None] == at.column_sequence[:, None, :]
    allowed = allowed & torch.ones_like(place, dtype=torch.bool) & torch.ones_like(column, dtype=torch.bool)
    if causal:
        seen = column <= place
        if prefix_len is not None:
            limit = torch.cat([prefix_len, prefix_len.new_zeros(1)])[at.row_sequence]
            seen = seen | (column < limit[:, :, None])
        allowed = allowed & seen
    if window_left >= 0:
        allowed = allowed & (column >= place - window_left)
    if window_right >= 0:
        allowed = allowed & (column <= place + window_right)
    if query_lengths is not None:
        allowed = allowed & (at.row < query_lengths[:, None])[:, :, None]
    if key_lengths is not None:
        allowed = allowed & (at.column < key_lengths[:, None])[:, None, :]
    if key_start is not None:
        allowed = allowed & (at.column >= key_start[:, None])[:, None, :]
    return allowed


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2·cos.shape[1] channels of x [B, H, T, D] at positions [B, T]."""
    half = cos.shape[1]
    positions = positions.clamp(0, max(cos.shape[0] - 1, 0)).long()
    cos, sin = cos.to(x.dtype)[positions][:, None], sin.to(x.dtype)[positions][:, None]  # [B, 1, T, R/2]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def relative_buckets(relative: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """T5's bucket of each key − query distance: exact below half of a direction's buckets, then logarithmic."""
    first = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        first = (relative > 0).to(relative.dtype) * buckets
        distance = relative.abs()
    else:
        distance = -relative.clamp(max=0)
    exact = buckets // 2
    logarithm = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (logarithm * (buckets - exact)).to(relative.dtype)
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


_MASK32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The four 32-bit words of Philox4x32-10 in int64 tensors.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of 32-bit words wraps in int64 to the right 64 bits.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def kept(at: Places, heads: int, seed: Tensor, dropout_p: float) -> Tensor:
    """[B, H, T, S]: which probabilities dropout keeps, a function of seed and place alone."""
    seed = seed.reshape(())
    head = torch.arange(heads, device=seed.device)[:, None, None]
    row, sequence, column = at.row[:, None, :, None], at.row_sequence[:, None, :, None], at.column[:, None, None, :]
    shape = torch.broadcast_shapes(row.shape, column.shape, head.shape)
    counter = tuple(value.long().expand(shape) for value in (column // 4, row, head, sequence))
    words = philox(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    word = torch.stack(words, dim=-1).gather(-1, (column % 4).long().expand(shape)[..., None])[..., 0]
    return word >= int(dropout_p * 2**32)
