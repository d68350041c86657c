"""Gradients of a dense mask, in the mask's own shape, and of the table of relative biases: sums of dS.

A program owns a tile of what it sums for and adds the dS of all tiles that share it, which it computes again: of the
mask, the same queries and keys in all sequences and heads over which the mask is broadcast, and all queries or keys
where it has one row or column; of the table, the tiles along one diagonal of a head, whose distances are the same, at
the end summed along the diagonals. The launcher adds the splits of a program's tiles, in their order. Sums are fp32.
"""

import triton
import triton.language as tl

from tritonkernels._attention_bwd import load_statistics, score_gradient
from tritonkernels._attention_tile import interval, kept, limits_of, load_rows


@triton.jit
def scaled_attention_dbias_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, S, D]
    v_ptr,  # [B, H / group, S, DV]
    do_ptr,  # [B, H, T, DV]
    lse_ptr,  # [B, H, T]
    lse_rest_ptr,  # [B, H, T]
    delta_ptr,  # [B, H, T]
    dbias_ptr,  # [splits, *mask's shape], or [splits, H, diagonals, 2·BLOCK]
    limits_ptr,  # and so on: see scaled_attention_fwd_kernel
    mask_ptr, table_ptr, query_scale_ptr, seed_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, lse_batch,
    mask_batch, mask_head, mask_row, mask_column, query_scale_batch, query_scale_row,
    scale, keep_scale, drop_below, window_left, window_right, offset, zero, heads, group, T, S, sequences,
    bias_batches,  # of the mask's shape, each 1 or full
    bias_heads,
    bias_rows,
    bias_columns,
    diagonals,
    first_diagonal,  # in tiles
    splits,
    split_tiles,
    num_tiles,  # that a program and its splits add
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,  # queries, and keys
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    if DIAGONAL:
        own_head, diagonal = program // diagonals, program % diagonals
    else:
        own_columns, own_rows = tl.cdiv(bias_columns, BLOCK), tl.cdiv(bias_rows, BLOCK)
        own_column, own_row = program % own_columns, program // own_columns % own_rows
        own_head = program // own_columns // own_rows % bias_heads
        own_batch = program // own_columns // own_rows // bias_heads
        # Tiles to add of the dimensions in which the mask has one element.
        some_columns = tl.where(bias_columns < S, tl.cdiv(S, BLOCK), 1)
        some_rows = tl.where(bias_rows < T, tl.cdiv(T, BLOCK), 1)
        some_heads = tl.where(bias_heads < heads, heads, 1)
    local = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, num_tiles)):
        if DIAGONAL:
            row_tiles = tl.cdiv(T, BLOCK)
            n, head = tile // row_tiles, own_head
        else:
            head = own_head + tile // some_columns // some_rows % some_heads
            n = own_batch + tile // some_columns // some_rows // some_heads
        first_query, first_key, rows, begin, end, own_offset, prefix, _keys = limits_of(limits_ptr, n, T, S, offset)
        if DIAGONAL:
            first_row = tile % row_tiles * BLOCK
            first_of_keys = first_row + own_offset + (diagonal + first_diagonal) * BLOCK
        else:
            first_row = (own_row + tile // some_columns % some_rows) * BLOCK - first_query
            first_of_keys = (own_column + tile % some_columns) * BLOCK - first_key
        row, key = first_row + local, first_of_keys + local
        inside_rows = (row >= 0) & (row < rows)
        low, high = interval(row + own_offset, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
        high = tl.where(inside_rows, high, low)
        some = (tl.max(tl.where(high > low, high, 0), 0) > first_of_keys) & (
            tl.min(tl.where(high > low, low, S), 0) < first_of_keys + BLOCK
        )
        if some:
            sample, head_at, kv_head = tl.cast(n, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
            query_at = tl.cast(first_query, tl.int64) + first_row
            key_at = tl.cast(first_key, tl.int64) + first_of_keys
            statistics = sample * lse_batch + head_at * T + query_at
            lse, lse_rest, alive = load_statistics(lse_ptr, lse_rest_ptr, statistics + local, inside_rows, UNIT)
            delta = tl.load(delta_ptr + statistics + local, mask=alive, other=0.0)
            q = q_ptr + sample * q_batch + head_at * q_head + query_at * q_row
            do = do_ptr + sample * do_batch + head_at * do_head + query_at * do_row
            k = k_ptr + sample * k_batch + kv_head * k_head + key_at * k_row
            v = v_ptr + sample * v_batch + kv_head * v_head + key_at * v_row
            inside_keys = (key >= begin) & (key < end)
            q = load_rows(q, q_row, local, alive, D, BLOCK_D, True)
            do = load_rows(do, do_row, local, alive, DV, BLOCK_V, True)
            k = load_rows(k, k_row, local, inside_keys, D, BLOCK_D, True)
            v = load_rows(v, v_row, local, inside_keys, DV, BLOCK_V, True)
            factor = scale * UNIT + tl.zeros([BLOCK], tl.float32)
            if query_scale_ptr is not None:
                at = query_scale_ptr + sample * query_scale_batch + query_at * query_scale_row
                factor *= tl.load(at + local * query_scale_row, mask=alive, other=0.0)
            mask_rows, table_rows, keep = None, None, None
            if mask_ptr is not None:
                mask_rows = mask_ptr + sample * mask_batch + head_at * mask_head + query_at * mask_row
                mask_rows += tl.cast(first_key, tl.int64) * mask_column + local[:, None] * mask_row
            if table_ptr is not None:
                table_rows = (head * (T + S - 1) + zero - row - own_offset)[:, None]
            if seed_ptr is not None:
                keep = kept(tl.load(seed_ptr), row, head, n, first_of_keys, drop_below, BLOCK, False)
            _weights, ds = score_gradient(
                q, k, do, v, factor[:, None], lse[:, None], lse_rest[:, None], delta[:, None], key[None, :],
                low[:, None], high[:, None], mask_rows, mask_column, table_ptr, table_rows, keep, keep_scale,
                PRECISION, UNIT, True,
            )  # fmt: skip
            acc += ds
    part = tl.cast(split, tl.int64)
    if DIAGONAL:
        # Row m shifted by −m, so that a column holds one distance between query and key.
        wide = tl.arange(0, 2 * BLOCK)
        source = wide[None, :] - BLOCK + local[:, None]
        inside = (source >= 0) & (source < BLOCK)
        sheared = tl.gather(acc, tl.where(inside, source, 0), 1)
        sums = tl.sum(tl.where(inside, sheared, 0.0), 0)
        to = dbias_ptr + ((part * heads + own_head) * diagonals + diagonal) * 2 * BLOCK
        tl.store(to + wide, sums)
    else:
        row, column = own_row * BLOCK + local, own_column * BLOCK + local
        to = dbias_ptr + (part * bias_batches + own_batch) * bias_heads * bias_rows * bias_columns
        to += tl.cast(own_head, tl.int64) * bias_rows * bias_columns
        if ONE_ROW and ONE_COLUMN:
            tl.store(to, tl.sum(tl.sum(acc, 1), 0))
        elif ONE_ROW:
            tl.store(to + column, tl.sum(acc, 0), mask=column < bias_columns)
        elif ONE_COLUMN:
            tl.store(to + row, tl.sum(acc, 1), mask=row < bias_rows)
        else:
            inside = (row < bias_rows)[:, None] & (column < bias_columns)[None, :]
            tl.store(to + row.to(tl.int64)[:, None] * bias_columns + column[None, :], acc, mask=inside)
