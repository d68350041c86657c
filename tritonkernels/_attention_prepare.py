"""What is done once before attention: limits of each sequence, far ends of a relative bias, keys with rotary embedding.

Rotated keys are written once, since every block of queries reads all of them: at 8192 keys a pass over them takes about
1 % of the attention's time, while rotating in every program would read cos and sin, twice the bytes of a key, again and
keep the keys from being copied asynchronously. With up to 16 queries keys are read only once: they are rotated there.
"""

import triton
import triton.language as tl

from tritonkernels._attention_tile import LIMITS, limits_of, load_rotated, locate, place_of


@triton.jit
def scaled_attention_limits_kernel(
    prefix_len_ptr,  # [N]
    query_lengths_ptr,  # [N]
    key_lengths_ptr,  # [N]
    key_start_ptr,  # [N]
    cu_seqlens_q_ptr,  # [N + 1]
    cu_seqlens_k_ptr,  # [N + 1]
    limits_ptr,  # [N, 8]: see limits_of
    T,
    S,
    BOTTOM_RIGHT: tl.constexpr,
):
    """One program a sequence; whatever the numbers are, no row beyond T and S is read."""
    n = tl.program_id(0)
    first_query, first_key, begin, prefix = 0, 0, 0, 0
    rows, keys = T, S
    if cu_seqlens_q_ptr is not None:
        first_query = tl.minimum(tl.maximum(tl.load(cu_seqlens_q_ptr + n), 0), T)
        rows = tl.minimum(tl.load(cu_seqlens_q_ptr + n + 1), T) - first_query
        first_key = tl.minimum(tl.maximum(tl.load(cu_seqlens_k_ptr + n), 0), S)
        keys = tl.minimum(tl.load(cu_seqlens_k_ptr + n + 1), S) - first_key
    end = keys
    if query_lengths_ptr is not None:
        rows = tl.minimum(tl.load(query_lengths_ptr + n), T)
    if key_lengths_ptr is not None:
        end = tl.minimum(tl.load(key_lengths_ptr + n), S)
    rows, end = tl.maximum(rows, 0), tl.maximum(end, 0)
    if key_start_ptr is not None:
        begin = tl.maximum(tl.load(key_start_ptr + n), 0)
    if prefix_len_ptr is not None:
        prefix = tl.load(prefix_len_ptr + n)
    offset = 0
    if BOTTOM_RIGHT:
        offset = end - rows
    limits = limits_ptr + n * LIMITS
    tl.store(limits, first_query)
    tl.store(limits + 1, first_key)
    tl.store(limits + 2, rows)
    tl.store(limits + 3, begin)
    tl.store(limits + 4, end)
    tl.store(limits + 5, offset)
    tl.store(limits + 6, prefix)
    tl.store(limits + 7, keys)


@triton.jit
def scaled_attention_bands_kernel(
    table_ptr,  # [H, length]
    bands_ptr,  # [H, 2]: how many entries equal the first, and from where on they equal the last
    length,
    BLOCK: tl.constexpr,
):
    """One program a head."""
    head, column = tl.program_id(0), tl.arange(0, BLOCK)
    table_ptr += head * length
    first, last = tl.load(table_ptr), tl.load(table_ptr + length - 1)
    equal_first, before_last = tl.full([BLOCK], 0, tl.int32) + length, tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + column
        bias = tl.load(table_ptr + at, mask=at < length, other=0.0)
        equal_first = tl.where((at < length) & (bias != first), tl.minimum(equal_first, at), equal_first)
        before_last = tl.where((at < length) & (bias != last), at + 1, before_last)
    tl.store(bands_ptr + 2 * head, tl.min(equal_first, 0))
    tl.store(bands_ptr + 2 * head + 1, tl.max(before_last, 0))


@triton.jit
def scaled_attention_rotate_kernel(
    x_ptr,  # [B, H, T, D], or keys
    rotated_ptr,  # the same, contiguous
    x_batch,
    x_head,
    x_row,
    rotated_batch,
    limits_ptr,
    cos_ptr,  # [table_rows, R / 2]
    sin_ptr,
    positions_ptr,  # [B, T]
    positions_batch,
    positions_row,
    table_rows,
    heads,
    length,
    sequences,
    offset,
    COLUMN: tl.constexpr,  # 0: queries, 1: keys
    PACKED: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n, head, first = locate(tl.program_id(0), limits_ptr, heads, length, sequences, COLUMN, PACKED, BLOCK_M)
    first_query, first_key, rows, _, _, offset, _, keys = limits_of(limits_ptr, n, length, length, offset)
    if COLUMN == 0:
        start, shift = first_query, tl.maximum(offset, 0)
        count = rows if PACKED else length
    else:
        start, shift = first_key, tl.maximum(-offset, 0)
        count = keys
    n, head, start = tl.cast(n, tl.int64), tl.cast(head, tl.int64), tl.cast(start, tl.int64) + first
    local = tl.arange(0, BLOCK_M)
    inside = first + local < count
    if positions_ptr is not None:
        positions_ptr += n * positions_batch + start * positions_row
    place = place_of(local, inside, first + shift, positions_ptr, positions_row, table_rows)
    x = x_ptr + n * x_batch + head * x_head + start * x_row
    x = load_rotated(x, x_row, local, inside, place, cos_ptr, sin_ptr, R, INTERLEAVED, D, BLOCK_D)
    channel = tl.arange(0, BLOCK_D)[None, :]
    to = rotated_ptr + n * rotated_batch + (head * length + start) * D + local[:, None] * D + channel
    tl.store(to, x, mask=inside[:, None] & (channel < D))
