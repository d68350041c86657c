"""Scaled attention forward: softmax over a query's keys of scale·(q·kᵀ) + bias, times v, with an online softmax.

A program owns a block of one head's queries and walks their keys: first those that all its rows see, then the edges.
With few queries (GROUPED) its rows are the queries of all heads that share keys, and the keys are split among programs,
whose sums `combine` puts together in their order. Accumulates in fp32. Limit: D, Dv ≤ 256.
"""

import triton
import triton.language as tl

from tritonkernels._attention_tile import (
    block_intervals,
    edge_tile,
    exponential,
    far_bias,
    far_tile,
    finite,
    interval,
    kept,
    less,
    limits_of,
    load_rotated,
    load_rows,
    locate,
    log_sum_exp,
    masked_scores,
    near_tiles,
    num_edges,
    place_of,
    tile_ranges,
)


@triton.jit
def _add_tile(
    acc, largest, total, poisoned,  # of the keys so far
    q, k, v,  # [M, BLOCK_D], [N, BLOCK_D], [N, BLOCK_V]
    row_scale, bias, key, low, high, mask_rows, mask_column, table_ptr, table_rows,
    seed_ptr, row, head, sequence, first_key, drop_below,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = masked_scores(
            products, row_scale[:, None], key[None, :], low[:, None], high[:, None],
            mask_rows, mask_column, table_ptr, table_rows, UNIT,
        )  # fmt: skip
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = exponential(scores, base[:, None], 0.0, UNIT)
    else:
        # row_scale ≥ 0: the product with it is fused into the exponent.
        of_tile = tl.max(products, 1) * row_scale
        if bias is not None:
            of_tile += bias
        now_largest = tl.maximum(largest, of_tile)
        base = now_largest
        without_bias, rest = base, tl.zeros_like(base)
        if bias is not None:
            without_bias, rest = less(base, rest, bias)
        weights = exponential(products * row_scale[:, None], without_bias[:, None], rest[:, None], UNIT)
    shrink = exponential(largest, base, 0.0, UNIT)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        # A value that is not finite reaches the rows that attend to it, and no others.
        bad = tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)
        poisoned = tl.maximum(poisoned, tl.max(tl.where(scores > float("-inf"), bad[None, :], 0), 1))
        v = finite(v)
    if seed_ptr is not None:
        keep = kept(tl.load(seed_ptr), row, head, sequence, first_key, drop_below, BLOCK_N, True)
        weights = tl.where(keep, weights, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, now_largest, total, poisoned


@triton.jit
def scaled_attention_fwd_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, S, D]
    v_ptr,  # [B, H / group, S, DV]
    out_ptr,  # [B, T, H, DV], or [splits, B, T, H, DV] unnormalised
    lse_ptr,  # [B, H, T], or [splits, 2, B, H, T]: largest score, sum of exponentials
    lse_rest_ptr,  # [B, H, T]: what float32 rounds off lse
    limits_ptr,  # [N, 8]
    mask_ptr,  # [B, H, T, S], stride 0 where it is broadcast
    table_ptr,  # [H, T + S − 1]: bias of key − place of query, from −zero on
    bands_ptr,  # [H, 2]: see far_bias
    query_scale_ptr,  # [B, T]
    cos_ptr,  # [table_rows, R / 2]
    sin_ptr,
    query_positions_ptr,  # [B, T]
    key_positions_ptr,  # [B, S]; used with ROTATE_KEYS
    seed_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, lse_batch,
    mask_batch, mask_head, mask_row, mask_column, query_scale_batch, query_scale_row,
    query_positions_batch, query_positions_row, key_positions_batch, key_positions_row, table_rows,
    scale,
    keep_scale,  # 1 / (1 − dropout_p)
    drop_below,  # of a random word less 2³¹
    window_left, window_right, offset, zero, heads, group, T, S, sequences, splits, split_keys,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    local = tl.arange(0, BLOCK_M)
    if GROUPED:
        n, key_head, first = locate(program, limits_ptr, heads // group, group * T, sequences, 0, False, BLOCK_M)
        local_head, row = (first + local) // T, (first + local) % T
        head, first = key_head * group, 0
        exists = local_head < group
        last = T
    else:
        n, head, first = locate(program, limits_ptr, heads, T, sequences, 0, PACKED, BLOCK_M)
        key_head = head // group
        local_head, row = local * 0, first + local
        last = first + BLOCK_M
    first_query, first_key, rows, begin, end, offset, prefix, _ = limits_of(limits_ptr, n, T, S, offset)
    if not GROUPED:
        exists = row < (rows if PACKED else T)
    attends = exists & (row < rows)
    last = tl.minimum(last, rows)
    # A row beyond the end takes the place of the last one, so that no index leaves its tensor; its sums are not stored.
    row_place = tl.minimum(row, rows - 1) + offset

    sample, first_head = tl.cast(n, tl.int64), tl.cast(head, tl.int64)
    row_at = tl.cast(first_query, tl.int64) + row
    q = q_ptr + sample * q_batch + (first_head + local_head[:, None]) * q_head + row_at[:, None] * q_row
    nothing = local * 0
    if cos_ptr is None:
        q = load_rows(q, 0, nothing, attends, D, BLOCK_D, True)
    else:
        if query_positions_ptr is not None:
            query_positions_ptr += sample * query_positions_batch + tl.cast(first_query, tl.int64) * query_positions_row
        place = place_of(row, attends, tl.maximum(offset, 0), query_positions_ptr, query_positions_row, table_rows)
        q = load_rotated(q, 0, nothing, attends, place, cos_ptr, sin_ptr, R, INTERLEAVED, D, BLOCK_D)
    row_scale = scale + tl.zeros([BLOCK_M], tl.float32)
    if query_scale_ptr is not None:
        scale_at = query_scale_ptr + sample * query_scale_batch + row_at * query_scale_row
        row_scale *= tl.load(scale_at, mask=attends, other=0.0)
    # The sign goes into the query, exactly, so that the largest product has the largest score.
    q = tl.where(row_scale[:, None] < 0, -q, q)
    row_scale = tl.abs(row_scale) * UNIT
    table_rows_at = None
    if table_ptr is not None:
        table_rows_at = ((head + local_head) * (T + S - 1) + zero - row_place)[:, None]
    mask_rows = None
    if mask_ptr is not None:
        mask_rows = mask_ptr + sample * mask_batch + tl.cast(first_key, tl.int64) * mask_column
        mask_rows += (first_head + local_head[:, None]) * mask_head + row_at[:, None] * mask_row
    k_at = k_ptr + sample * k_batch + tl.cast(key_head, tl.int64) * k_head + tl.cast(first_key, tl.int64) * k_row
    v_at = v_ptr + sample * v_batch + tl.cast(key_head, tl.int64) * v_head + tl.cast(first_key, tl.int64) * v_row
    if ROTATE_KEYS and key_positions_ptr is not None:
        key_positions_ptr += sample * key_positions_batch + tl.cast(first_key, tl.int64) * key_positions_row

    low, high = interval(row_place, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
    some, some_end, all_, all_end = block_intervals(
        first + offset, last + offset, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT
    )
    if SPLIT:
        split_first = split * split_keys
        some, some_end = tl.maximum(some, split_first), tl.minimum(some_end, split_first + split_keys)
        all_, all_end = tl.maximum(all_, split_first), tl.minimum(all_end, split_first + split_keys)
    # The rows of a group have tables of several heads: none of their tiles is far.
    EDGES_ONLY: tl.constexpr = mask_ptr is not None or (GROUPED and table_ptr is not None)
    tiles, full, full_end, some_end = tile_ranges(some, some_end, all_, all_end, EDGES_ONLY, BLOCK_N)
    near, near_end = full, full
    if table_ptr is not None and not EDGES_ONLY:
        band, band_end, bias_before, bias_behind = far_bias(table_ptr, bands_ptr, head, T + S - 1, UNIT)
        to_first, to_last = first + offset - zero, last - 1 + offset - zero
        near, near_end = near_tiles(full, full_end, band + to_first, band_end + to_last, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    largest, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    poisoned = local * 0
    column, key_shift = tl.arange(0, BLOCK_N), tl.maximum(-offset, 0)
    heads_of_rows = (head + local_head)[:, None]
    if not EDGES_ONLY:
        for tile in range(0, (near - full + full_end - near_end) // BLOCK_N):
            start, before = far_tile(tile, full, near, near_end, BLOCK_N)
            bias = None
            if table_ptr is not None:
                bias = tl.where(before, bias_before, bias_behind)
            at, key = tl.cast(start, tl.int64), column + start
            v = load_rows(v_at + at * v_row, v_row, column, None, DV, BLOCK_V, False)
            if ROTATE_KEYS:
                key_place = place_of(key, key >= 0, key_shift, key_positions_ptr, key_positions_row, table_rows)
                k = load_rotated(
                    k_at + at * k_row, k_row, column, key >= 0, key_place, cos_ptr, sin_ptr,
                    R, INTERLEAVED, D, BLOCK_D,
                )  # fmt: skip
            else:
                k = load_rows(k_at + at * k_row, k_row, column, None, D, BLOCK_D, False)
            acc, largest, total, poisoned = _add_tile(
                acc, largest, total, poisoned, q, k, v,
                row_scale, bias, key, low, high, None, 0, None, None,
                seed_ptr, row, heads_of_rows, n, start, drop_below, PRECISION, UNIT, BLOCK_N, False,
            )  # fmt: skip
    low, high = tl.maximum(low, some), tl.where(attends, tl.minimum(high, some_end), some)
    edges = num_edges(tiles, full, near, near_end, full_end, some_end, BLOCK_N)
    # Copied ahead, the table's entries would take more shared memory than all else, one for each pair.
    for edge in tl.range(0, edges, num_stages=EDGE_STAGES):
        start = edge_tile(edge, tiles, full, near, near_end, full_end, BLOCK_N)
        at, key = tl.cast(start, tl.int64), column + start
        inside = (key >= some) & (key < some_end)
        v = load_rows(v_at + at * v_row, v_row, column, inside, DV, BLOCK_V, True)
        if ROTATE_KEYS:
            key_place = place_of(key, inside, key_shift, key_positions_ptr, key_positions_row, table_rows)
            k = load_rotated(
                k_at + at * k_row, k_row, column, inside, key_place, cos_ptr, sin_ptr, R, INTERLEAVED, D, BLOCK_D
            )
        else:
            k = load_rows(k_at + at * k_row, k_row, column, inside, D, BLOCK_D, True)
        acc, largest, total, poisoned = _add_tile(
            acc, largest, total, poisoned, q, k, v,
            row_scale, None, key, low, high, mask_rows, mask_column, table_ptr, table_rows_at,
            seed_ptr, row, heads_of_rows, n, start, drop_below, PRECISION, UNIT, BLOCK_N, True,
        )  # fmt: skip

    channel = tl.arange(0, BLOCK_V)[None, :]
    out_row = sample * out_batch + (row_at * heads + first_head + local_head) * DV
    lse_row = sample * lse_batch + (first_head + local_head) * T + row_at
    inside_out = exists[:, None] & (channel < DV)
    acc = tl.where(poisoned[:, None] != 0, float("nan"), acc)
    if SPLIT:
        # Sums over no keys are 0, and so are those of rows that do not attend.
        count = tl.cast(sequences, tl.int64) * heads * T
        lse_ptr += tl.cast(split, tl.int64) * 2 * count
        tl.store(out_ptr + split * count * DV + out_row[:, None] + channel, acc, mask=inside_out & attends[:, None])
        tl.store(lse_ptr + lse_row, tl.where(attends, largest, float("-inf")), mask=exists)
        tl.store(lse_ptr + count + lse_row, total, mask=exists)
    else:
        seen = attends & (total != 0)
        total = tl.where(seen, total, 1.0)
        acc = tl.where(seen[:, None], acc * (keep_scale / total)[:, None], 0.0)
        tl.store(out_ptr + out_row[:, None] + channel, acc.to(out_ptr.dtype.element_ty), mask=inside_out)
        lse, rest = log_sum_exp(largest, total, UNIT)
        tl.store(lse_ptr + lse_row, tl.where(seen, lse, float("-inf")), mask=exists)
        if lse_rest_ptr is not None:
            tl.store(lse_rest_ptr + lse_row, tl.where(seen, rest, 0.0), mask=exists)


@triton.jit
def scaled_attention_combine_kernel(
    parts_ptr,  # [splits, B, T, H, DV]
    statistics_ptr,  # [splits, 2, B, H, T]
    out_ptr,  # [B, T, H, DV]
    lse_ptr,  # [B, H, T]
    lse_rest_ptr,  # [B, H, T]
    keep_scale,
    heads,
    T,
    splits,
    count,  # B·H·T
    UNIT: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row."""
    at = tl.program_id(0).to(tl.int64)  # of [B, H, T]
    row = (at // (heads * T) * T + at % T) * heads + at // T % heads  # of [B, T, H]
    channel = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    largest, total = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
    for split in range(splits):
        part_largest = tl.load(statistics_ptr + 2 * split * count + at)
        part_total = tl.load(statistics_ptr + (2 * split + 1) * count + at)
        if part_total != 0:
            now_largest = tl.maximum(largest, part_largest)
            shrink = exponential(largest, now_largest, 0.0, UNIT)
            grow = exponential(part_largest, now_largest, 0.0, UNIT)
            part = tl.load(parts_ptr + (split * count + row) * DV + channel, mask=channel < DV, other=0.0)
            acc = acc * shrink + part * grow
            total = total * shrink + part_total * grow
            largest = now_largest
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    acc = tl.where(seen, acc * (keep_scale / total), 0.0)
    tl.store(out_ptr + row * DV + channel, acc.to(out_ptr.dtype.element_ty), mask=channel < DV)
    lse, rest = log_sum_exp(largest, total, UNIT)
    tl.store(lse_ptr + at, tl.where(seen, lse, float("-inf")))
    if lse_rest_ptr is not None:
        tl.store(lse_rest_ptr + at, tl.where(seen, rest, 0.0))
