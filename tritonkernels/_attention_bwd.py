"""The backward of scaled attention: P = exp(scores − lse), dS = P·(dO·vᵀ − Δ) with Δ = Σ dO·O − dlse for each query.

dq = scale·dS·k (a program owns a block of one head's queries), dk = scale·dSᵀ·q and dv = Pᵀ·dO (one owns a block of
keys, for all heads of queries that share it): no atomics, so sums keep their order. Accumulates in fp32; dS is bfloat16
beside bfloat16, else fp32 in TF32 (three times for fp32), since float16 would lose small gradients.
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
    load_rows,
    locate,
    masked_scores,
    near_tiles,
    num_edges,
    place_of,
    rotated_back,
    tile_ranges,
)


@triton.jit
def operand(x, WIDE: tl.constexpr):
    """A factor of a product with dS."""
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def score_gradient(
    a, b, a_grad, b_grad,  # q, k, dO, v, or for transposed tiles k, q, v, dO
    row_scale, lse, lse_rest, delta, key, low, high, mask_rows, mask_column, table_ptr, table_rows, keep, keep_scale,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P after dropout, and dS, of a tile."""
    products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if MASKED:
        scores = masked_scores(products, row_scale, key, low, high, mask_rows, mask_column, table_ptr, table_rows, UNIT)
    else:
        scores = products * row_scale
    weights = exponential(scores, lse, lse_rest, UNIT)
    gradient = tl.dot(a_grad, tl.trans(b_grad), input_precision=PRECISION)
    left = weights
    if keep is not None:
        left = tl.where(keep, weights * keep_scale, 0.0)
        gradient = tl.where(keep, gradient * keep_scale, 0.0)
    gradient = weights * (gradient - delta)
    if MASKED:
        # Of a pair that is not attended even 0 · NaN has to be 0.
        gradient = tl.where(weights == 0, 0.0, gradient)
    return left, gradient


@triton.jit
def load_statistics(lse_ptr, lse_rest_ptr, at, inside, UNIT: tl.constexpr):
    """log-sum-exp, what is rounded off it, and which rows see anything: the others get 1e38, so that P is 0."""
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    alive, rest = lse != float("-inf"), tl.zeros_like(lse)
    if lse_rest_ptr is not None:
        rest = tl.load(lse_rest_ptr + at, mask=alive, other=0.0)
    return tl.where(alive, lse * UNIT, 1e38), rest, alive


@triton.jit
def scaled_attention_dq_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, S, D]
    v_ptr,  # [B, H / group, S, DV]
    do_ptr,  # [B, H, T, DV]
    out_ptr,  # [B, H, T, DV]
    lse_ptr,  # [B, H, T]
    lse_rest_ptr,  # [B, H, T]
    dlse_ptr,  # [B, H, T]
    dq_ptr,  # [B, T, H, D]
    delta_ptr,  # [B, H, T]
    dquery_scale_ptr,  # [B, H, T]
    limits_ptr,  # and so on: see scaled_attention_fwd_kernel
    mask_ptr, table_ptr, bands_ptr, query_scale_ptr, cos_ptr, sin_ptr, query_positions_ptr, seed_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    out_batch, out_head, out_row, dq_batch, lse_batch,
    mask_batch, mask_head, mask_row, mask_column, query_scale_batch, query_scale_row,
    query_positions_batch, query_positions_row, table_rows,
    scale, keep_scale, drop_below, window_left, window_right, offset, zero, heads, group, T, S, sequences,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    n, head, first = locate(tl.program_id(0), limits_ptr, heads, T, sequences, 0, PACKED, BLOCK_M)
    first_query, first_key, rows, begin, end, offset, prefix, _ = limits_of(limits_ptr, n, T, S, offset)
    local = tl.arange(0, BLOCK_M)
    row = first + local
    exists = row < (rows if PACKED else T)
    attends = row < rows
    last = tl.minimum(first + BLOCK_M, rows)
    row_place = tl.minimum(row, rows - 1) + offset

    sample, first_head, key_head = tl.cast(n, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    row_at, start_key = tl.cast(first_query, tl.int64) + first, tl.cast(first_key, tl.int64)
    statistics = sample * lse_batch + first_head * T + row_at
    lse, lse_rest, alive = load_statistics(lse_ptr, lse_rest_ptr, statistics + local, attends, UNIT)
    q = q_ptr + sample * q_batch + first_head * q_head + row_at * q_row
    do = do_ptr + sample * do_batch + first_head * do_head + row_at * do_row
    out = out_ptr + sample * out_batch + first_head * out_head + row_at * out_row
    q = load_rows(q, q_row, local, alive, D, BLOCK_D, True)
    do = load_rows(do, do_row, local, alive, DV, BLOCK_V, True)
    out = load_rows(out, out_row, local, alive, DV, BLOCK_V, True)
    if UNIT == 1:
        # Added as dO·vᵀ is: a row that attends to one key alone then has a dS of 0.
        products = tl.dot(do, tl.trans(out), input_precision=PRECISION)
        delta = tl.sum(tl.where(local[:, None] == local[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + statistics + local, mask=alive, other=0.0)
    tl.store(delta_ptr + statistics + local, delta, mask=exists)
    factor = scale + tl.zeros([BLOCK_M], tl.float32)
    if query_scale_ptr is not None:
        scale_at = query_scale_ptr + sample * query_scale_batch + row_at * query_scale_row + local * query_scale_row
        factor *= tl.load(scale_at, mask=attends, other=0.0)
    row_scale = (factor * UNIT)[:, None]
    table_rows_at = None
    if table_ptr is not None:
        table_rows_at = (head * (T + S - 1) + zero - row_place)[:, None]
    mask_rows = None
    if mask_ptr is not None:
        mask_rows = mask_ptr + sample * mask_batch + first_head * mask_head + row_at * mask_row
        mask_rows += start_key * mask_column + local[:, None] * mask_row
    k_at = k_ptr + sample * k_batch + key_head * k_head + start_key * k_row
    v_at = v_ptr + sample * v_batch + key_head * v_head + start_key * v_row

    low, high = interval(row_place, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
    low, high = low[:, None], tl.where(attends, high, low)[:, None]
    some, some_end, all_, all_end = block_intervals(
        first + offset, last + offset, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT
    )
    EDGES_ONLY: tl.constexpr = mask_ptr is not None
    tiles, full, full_end, some_end = tile_ranges(some, some_end, all_, all_end, EDGES_ONLY, BLOCK_N)
    near, near_end = full, full
    if table_ptr is not None:
        band, band_end, bias_before, bias_behind = far_bias(table_ptr, bands_ptr, head, T + S - 1, UNIT)
        to_first, to_last = first + offset - zero, last - 1 + offset - zero
        near, near_end = near_tiles(full, full_end, band + to_first, band_end + to_last, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    if not EDGES_ONLY:
        for tile in range(0, (near - full + full_end - near_end) // BLOCK_N):
            start, before = far_tile(tile, full, near, near_end, BLOCK_N)
            lse_far, rest_far = lse, lse_rest
            if table_ptr is not None:
                lse_far, rest_far = less(lse, lse_rest, tl.where(before, bias_before, bias_behind))
            at = tl.cast(start, tl.int64)
            k = load_rows(k_at + at * k_row, k_row, column, None, D, BLOCK_D, False)
            v = load_rows(v_at + at * v_row, v_row, column, None, DV, BLOCK_V, False)
            keep = None
            if seed_ptr is not None:
                keep = kept(tl.load(seed_ptr), row, head, n, start, drop_below, BLOCK_N, True)
            _weights, ds = score_gradient(
                q, k, do, v, row_scale, lse_far[:, None], rest_far[:, None], delta[:, None], None, None, None,
                None, 0, None, None, keep, keep_scale, PRECISION, UNIT, False,
            )  # fmt: skip
            ds = ds.to(tl.float32 if WIDE else k.dtype)
            dq = tl.dot(ds, operand(k, WIDE), dq, input_precision=PRECISION)
    edges = num_edges(tiles, full, near, near_end, full_end, some_end, BLOCK_N)
    for edge in tl.range(0, edges, num_stages=EDGE_STAGES):
        start = edge_tile(edge, tiles, full, near, near_end, full_end, BLOCK_N)
        at, key = tl.cast(start, tl.int64), column + start
        inside = (key >= some) & (key < some_end)
        k = load_rows(k_at + at * k_row, k_row, column, inside, D, BLOCK_D, True)
        v = load_rows(v_at + at * v_row, v_row, column, inside, DV, BLOCK_V, True)
        keep = None
        if seed_ptr is not None:
            keep = kept(tl.load(seed_ptr), row, head, n, start, drop_below, BLOCK_N, True)
        _weights, ds = score_gradient(
            q, k, do, v, row_scale, lse[:, None], lse_rest[:, None], delta[:, None], key[None, :], low, high,
            mask_rows, mask_column, table_ptr, table_rows_at, keep, keep_scale, PRECISION, UNIT, True,
        )  # fmt: skip
        ds = ds.to(tl.float32 if WIDE else k.dtype)
        dq = tl.dot(ds, operand(finite(k), WIDE), dq, input_precision=PRECISION)

    if dquery_scale_ptr is not None:
        gradient = scale * tl.sum(q.to(tl.float32) * dq, 1)
        tl.store(dquery_scale_ptr + statistics + local, gradient, mask=exists)
    dq *= factor[:, None]
    if cos_ptr is not None:
        if query_positions_ptr is not None:
            query_positions_ptr += sample * query_positions_batch + row_at * query_positions_row
        shift = first + tl.maximum(offset, 0)
        place = place_of(local, attends, shift, query_positions_ptr, query_positions_row, table_rows)
        dq = rotated_back(dq, attends, place, cos_ptr, sin_ptr, R, INTERLEAVED, BLOCK_D)
    channel = tl.arange(0, BLOCK_D)[None, :]
    to = dq_ptr + sample * dq_batch + ((row_at + local[:, None]) * heads + first_head) * D + channel
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=exists[:, None] & (channel < D))


@triton.jit
def _query_rows(
    rows, begin_key, end_key, begin, end, prefix, window_left, window_right, offset,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Queries [first, last) that see some of the keys [begin_key, end_key), [whole, whole_end) that see all of them."""
    first, last, whole, whole_end = rows * 0, rows, rows * 0, rows
    if CAUSAL:
        first = tl.where(begin_key < prefix, first, tl.maximum(first, begin_key - offset))
        whole = tl.where(end_key <= prefix, whole, tl.maximum(whole, end_key - 1 - offset))
    if RIGHT:
        first = tl.maximum(first, begin_key - window_right - offset)
        whole = tl.maximum(whole, end_key - 1 - window_right - offset)
    if LEFT:
        last = tl.minimum(last, end_key + window_left - offset)
        whole_end = tl.minimum(whole_end, begin_key + window_left + 1 - offset)
    last = tl.where((begin_key < end) & (end_key > begin), last, first)
    whole_end = tl.where((begin_key >= begin) & (end_key <= end), whole_end, whole)
    return first, last, whole, whole_end


@triton.jit
def scaled_attention_dkv_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, S, D]
    v_ptr,  # [B, H / group, S, DV]
    do_ptr,  # [B, H, T, DV]
    lse_ptr,  # [B, H, T]
    lse_rest_ptr,  # [B, H, T]
    delta_ptr,  # [B, H, T]
    dk_ptr,  # [B, S, H / group, D]
    dv_ptr,  # [B, S, H / group, DV]
    limits_ptr,  # and so on: see scaled_attention_fwd_kernel
    mask_ptr, table_ptr, bands_ptr, query_scale_ptr, cos_ptr, sin_ptr, key_positions_ptr, seed_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dv_batch, lse_batch,
    mask_batch, mask_head, mask_row, mask_column, query_scale_batch, query_scale_row,
    key_positions_batch, key_positions_row, table_rows,
    scale, keep_scale, drop_below, window_left, window_right, offset, zero, heads, group, T, S, sequences,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    n, key_head, first = locate(tl.program_id(0), limits_ptr, heads // group, S, sequences, 1, PACKED, BLOCK_N)
    first_query, first_key, rows, begin, end, offset, prefix, keys = limits_of(limits_ptr, n, T, S, offset)
    local = tl.arange(0, BLOCK_N)
    exists = first + local < keys
    last = tl.minimum(first + BLOCK_N, keys)
    key = (first + local)[:, None]
    sample, start_query = tl.cast(n, tl.int64), tl.cast(first_query, tl.int64)
    start_key, kv_head = tl.cast(first_key, tl.int64) + first, tl.cast(key_head, tl.int64)
    k = k_ptr + sample * k_batch + kv_head * k_head + start_key * k_row
    v = v_ptr + sample * v_batch + kv_head * v_head + start_key * v_row
    k = load_rows(k, k_row, local, exists, D, BLOCK_D, True)
    v = load_rows(v, v_row, local, exists, DV, BLOCK_V, True)
    some, some_end, all_, all_end = _query_rows(
        rows, first, last, begin, end, prefix, window_left, window_right, offset, CAUSAL, LEFT, RIGHT
    )
    some_end = tl.where(first < last, some_end, some)
    EDGES_ONLY: tl.constexpr = mask_ptr is not None
    tiles, full, full_end, some_end = tile_ranges(some, some_end, all_, all_end, EDGES_ONLY, BLOCK_M)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    query = tl.arange(0, BLOCK_M)
    for head_of_group in range(0, group):
        head = key_head * group + head_of_group
        head_at = tl.cast(head, tl.int64)
        q_at = q_ptr + sample * q_batch + head_at * q_head + start_query * q_row
        do_at = do_ptr + sample * do_batch + head_at * do_head + start_query * do_row
        statistics = sample * lse_batch + head_at * T + start_query
        scale_at = query_scale_ptr
        if query_scale_ptr is not None:
            scale_at += sample * query_scale_batch + start_query * query_scale_row
        near, near_end = full, full
        if table_ptr is not None:
            # Early queries see these keys far behind them, late ones far before.
            band, band_end, bias_behind, bias_before = far_bias(table_ptr, bands_ptr, head, T + S - 1, UNIT)
            before_end, behind_begin = zero + first + 1 - band_end - offset, zero + first + BLOCK_N - band - offset
            near, near_end = near_tiles(full, full_end, before_end, behind_begin, BLOCK_M)
        if not EDGES_ONLY:
            for tile in range(0, (near - full + full_end - near_end) // BLOCK_M):
                start, before = far_tile(tile, full, near, near_end, BLOCK_M)
                at = tl.cast(start, tl.int64)
                q = load_rows(q_at + at * q_row, q_row, query, None, D, BLOCK_D, False)
                do = load_rows(do_at + at * do_row, do_row, query, None, DV, BLOCK_V, False)
                always = query >= 0
                lse, lse_rest, _alive = load_statistics(lse_ptr, lse_rest_ptr, statistics + at + query, always, UNIT)
                if table_ptr is not None:
                    lse, lse_rest = less(lse, lse_rest, tl.where(before, bias_before, bias_behind))
                delta = tl.load(delta_ptr + statistics + at + query)
                factor = scale + tl.zeros([BLOCK_M], tl.float32)
                if query_scale_ptr is not None:
                    by_query = tl.load(scale_at + at * query_scale_row + query * query_scale_row)
                    factor *= by_query
                keep = None
                if seed_ptr is not None:
                    row = query + start
                    keep = tl.trans(kept(tl.load(seed_ptr), row, head, n, first, drop_below, BLOCK_N, True))
                weights, ds = score_gradient(
                    k, q, v, do, (factor * UNIT)[None, :], lse[None, :], lse_rest[None, :], delta[None, :],
                    None, None, None, None, 0, None, None, keep, keep_scale, PRECISION, UNIT, False,
                )  # fmt: skip
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
                if query_scale_ptr is not None:
                    ds *= by_query[None, :]
                dk = tl.dot(ds.to(tl.float32 if WIDE else q.dtype), operand(q, WIDE), dk, input_precision=PRECISION)
        edges = num_edges(tiles, full, near, near_end, full_end, some_end, BLOCK_M)
        for edge in tl.range(0, edges, num_stages=EDGE_STAGES):
            start = edge_tile(edge, tiles, full, near, near_end, full_end, BLOCK_M)
            at, row = tl.cast(start, tl.int64), query + start
            lse, lse_rest, alive = load_statistics(lse_ptr, lse_rest_ptr, statistics + at + query, row < rows, UNIT)
            q = load_rows(q_at + at * q_row, q_row, query, alive, D, BLOCK_D, True)
            do = load_rows(do_at + at * do_row, do_row, query, alive, DV, BLOCK_V, True)
            delta = tl.load(delta_ptr + statistics + at + query, mask=alive, other=0.0)
            place = tl.minimum(row, rows - 1) + offset
            low, high = interval(place, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
            high = tl.where(alive, high, low)
            factor = scale + tl.zeros([BLOCK_M], tl.float32)
            if query_scale_ptr is not None:
                by_query = tl.load(scale_at + at * query_scale_row + query * query_scale_row, mask=alive, other=0.0)
                factor *= by_query
            mask_rows, table_rows_at = None, None
            if mask_ptr is not None:
                mask_rows = mask_ptr + sample * mask_batch + head_at * mask_head + (start_query + at) * mask_row
                mask_rows += tl.cast(first_key, tl.int64) * mask_column + query[None, :] * mask_row
            if table_ptr is not None:
                table_rows_at = (head * (T + S - 1) + zero - place)[None, :]
            keep = None
            if seed_ptr is not None:
                keep = tl.trans(kept(tl.load(seed_ptr), row, head, n, first, drop_below, BLOCK_N, True))
            weights, ds = score_gradient(
                k, q, v, do, (factor * UNIT)[None, :], lse[None, :], lse_rest[None, :], delta[None, :], key,
                low[None, :], high[None, :], mask_rows, mask_column, table_ptr, table_rows_at, keep, keep_scale,
                PRECISION, UNIT, True,
            )  # fmt: skip
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
            if query_scale_ptr is not None:
                ds *= by_query[None, :]
            dk = tl.dot(ds.to(tl.float32 if WIDE else q.dtype), operand(q, WIDE), dk, input_precision=PRECISION)

    dk *= scale
    if cos_ptr is not None:
        if key_positions_ptr is not None:
            key_positions_ptr += sample * key_positions_batch + start_key * key_positions_row
        shift = first + tl.maximum(-offset, 0)
        place = place_of(local, exists, shift, key_positions_ptr, key_positions_row, table_rows)
        dk = rotated_back(dk, exists, place, cos_ptr, sin_ptr, R, INTERLEAVED, BLOCK_D)
    row = (start_key + local[:, None]) * (heads // group) + kv_head
    channel = tl.arange(0, BLOCK_D)[None, :]
    to = dk_ptr + sample * dk_batch + row * D + channel
    tl.store(to, dk.to(dk_ptr.dtype.element_ty), mask=exists[:, None] & (channel < D))
    channel = tl.arange(0, BLOCK_V)[None, :]
    to = dv_ptr + sample * dv_batch + row * DV + channel
    tl.store(to, dv.to(dv_ptr.dtype.element_ty), mask=exists[:, None] & (channel < DV))
