"""What the kernels of scaled attention share: which rows and keys a program has, scores of a tile, dropout, rotary.

The keys that a query attends to are an interval [low, high), whatever structure is asked for, and both ends rise with
the query: so a block of queries has a range of keys which all its rows see, whose tiles need no mask, and an edge on
either side. A dense mask makes every tile an edge; a relative bias those near the diagonal.

Scores are natural ones times UNIT: beside halves log2(e), which makes them those of base 2; in float32, where rounding
of that factor and of the log-sum-exp would show, 1, and base 2 comes after the difference.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIMITS = tl.constexpr(8)  # numbers a sequence has in `limits`


@triton.jit
def locate(
    program, limits_ptr, heads, length, sequences, COLUMN: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's sequence, head, and first row within the sequence.

    A packed sequence that begins at row r owns the blocks from r // BLOCK + its number on: enough for any lengths.
    """
    if PACKED:
        slots = length // BLOCK + sequences
        slot = program % slots
        head = program // slots
        sequence, after = slot * 0, slot * 0 + sequences
        while after - sequence > 1:
            middle = (sequence + after) // 2
            owns = tl.load(limits_ptr + middle * LIMITS + COLUMN) // BLOCK + middle <= slot
            sequence, after = tl.where(owns, middle, sequence), tl.where(owns, after, middle)
        block = slot - tl.load(limits_ptr + sequence * LIMITS + COLUMN) // BLOCK - sequence
        block = tl.maximum(block, 0)
    else:
        blocks = tl.cdiv(length, BLOCK)
        sequence, head, block = program // blocks // heads, program // blocks % heads, program % blocks
        # Under a causal mask the last queries see most keys, the first keys are seen by most queries: they begin.
        if COLUMN == 0:
            block = blocks - 1 - block
    return sequence, head, block * BLOCK


@triton.jit
def limits_of(limits_ptr, sequence, T, S, offset):
    """First packed query and key, number of queries, keys [begin, end), p_i − i, prefix, number of keys."""
    query, key, rows, begin, end, prefix, keys = 0, 0, T, 0, S, 0, S
    if limits_ptr is not None:
        at = limits_ptr + sequence * LIMITS
        query, key, rows, begin = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        end, offset, prefix, keys = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    return query, key, rows, begin, end, offset, prefix, keys


@triton.jit
def interval(
    place, begin, end, prefix, window_left, window_right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """[low, high): the keys that a query at `place` among them attends to."""
    low, high = place * 0 + begin, place * 0 + end
    if CAUSAL:
        high = tl.minimum(high, tl.maximum(place + 1, prefix))
    if RIGHT:
        high = tl.minimum(high, place + window_right + 1)
    if LEFT:
        low = tl.maximum(low, place - window_left)
    return low, high


@triton.jit
def block_intervals(
    first,
    last,
    begin,
    end,
    prefix,
    window_left,
    window_right,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """For queries at the places [first, last): the keys that some see, and the keys that all see; empty if none is."""
    some, all_end = interval(first, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
    all_, some_end = interval(last - 1, begin, end, prefix, window_left, window_right, CAUSAL, LEFT, RIGHT)
    return some, tl.where(first < last, some_end, some), all_, all_end


@triton.jit
def load_rows(at, stride, row, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK] of a tensor with SIZE channels, 0 beyond them, and where not inside if MASKED."""
    channel = tl.arange(0, BLOCK)[None, :]
    at += row[:, None] * stride + channel
    if MASKED and SIZE == BLOCK:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    elif MASKED:
        x = tl.load(at, mask=inside[:, None] & (channel < SIZE), other=0.0)
    elif SIZE == BLOCK:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=channel < SIZE, other=0.0)
    return x


@triton.jit
def finite(x):
    """x with 0 in place of what is not finite: a factor that is masked by 0 must not make NaN of it."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def tile_ranges(some, some_end, all_, all_end, edges_only: tl.constexpr, BLOCK: tl.constexpr):
    """Of what is seen by some and by all: the first tile, the tiles [full, full_end) without mask, the end."""
    tiles = some // BLOCK * BLOCK
    full, full_end = tl.cdiv(all_, BLOCK) * BLOCK, all_end // BLOCK * BLOCK
    exists = some < some_end
    whole = exists & (full < full_end) & (edges_only == 0)
    return tiles, tl.where(whole, full, tiles), tl.where(whole, full_end, tiles), tl.where(exists, some_end, tiles)


@triton.jit
def far_bias(table_ptr, bands_ptr, head, length, UNIT: tl.constexpr):
    """Of a head's table: where it first differs from its beginning, from where on it equals its end, both biases."""
    table_ptr += head * length
    return (
        tl.load(bands_ptr + 2 * head), tl.load(bands_ptr + 2 * head + 1),
        tl.load(table_ptr) * UNIT, tl.load(table_ptr + length - 1) * UNIT,
    )  # fmt: skip


@triton.jit
def near_tiles(full, full_end, before_end, behind_begin, BLOCK: tl.constexpr):
    """Of the tiles [full, full_end) those that neither end by before_end nor begin at behind_begin."""
    near = tl.minimum(tl.maximum(before_end // BLOCK * BLOCK, full), full_end)
    near_end = tl.minimum(tl.maximum(tl.cdiv(behind_begin, BLOCK) * BLOCK, near), full_end)
    return near, near_end


@triton.jit
def far_tile(tile, full, near, near_end, BLOCK: tl.constexpr):
    """Where the tile begins of those before and behind the near ones, and whether it is before."""
    before = (near - full) // BLOCK
    return tl.where(tile < before, full + tile * BLOCK, near_end + (tile - before) * BLOCK), tile < before


@triton.jit
def edge_tile(tile, tiles, full, near, near_end, full_end, BLOCK: tl.constexpr):
    """Where the tile begins of those before `full`, the near ones, and those from full_end on."""
    before = (full - tiles) // BLOCK
    both = before + (near_end - near) // BLOCK
    start = tl.where(tile < both, near + (tile - before) * BLOCK, full_end + (tile - both) * BLOCK)
    return tl.where(tile < before, tiles + tile * BLOCK, start)


@triton.jit
def num_edges(tiles, full, near, near_end, full_end, end, BLOCK: tl.constexpr):
    return (full - tiles + near_end - near) // BLOCK + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)


@triton.jit
def masked_scores(
    products, row_scale, key, low, high, mask_rows, mask_column, table_ptr, table_rows, UNIT: tl.constexpr
):
    """Scores, −inf where a pair isn't attended; queries along one dimension of the tile, keys the other."""
    scores = products * row_scale
    inside = (key >= low) & (key < high)
    if table_ptr is not None:
        scores += tl.load(table_ptr + table_rows + key, mask=inside, other=0.0) * UNIT
    if mask_rows is not None:
        bias = tl.load(mask_rows + key.to(tl.int64) * mask_column, mask=inside, other=0)
        if bias.dtype.is_floating():
            bias = bias.to(tl.float32)
            inside = inside & (bias != float("-inf"))
            scores += bias * UNIT
        else:
            inside = inside & (bias != 0)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def exponential(score, base, rest, UNIT: tl.constexpr):
    """exp(score − base − rest); in base 2 rest is left out."""
    difference = score - base
    if UNIT == 1:
        # Exact for the scores that count.
        difference = difference * LOG2E - rest * LOG2E
    return tl.exp2(difference)


@triton.jit
def less(x, rest, y):
    """x + rest − y as a float32 and what it rounds off."""
    difference = x - y
    back = difference - x
    return difference, rest + ((x - (difference - back)) - (y + back))


@triton.jit
def log_sum_exp(largest, total, UNIT: tl.constexpr):
    """Natural, of the largest score and the sum of exponentials beside it, and what float32 rounds off."""
    exact = largest.to(tl.float64) / UNIT + tl.log(total.to(tl.float64))
    rounded = exact.to(tl.float32)
    return rounded, (exact - rounded).to(tl.float32)


@triton.jit
def _is_kept(word, drop_below):
    """word ≥ drop_below + 2³¹, of unsigned numbers: the threshold is an int32."""
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= drop_below


@triton.jit
def kept(seed, row, head, sequence, first_key, drop_below, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """[rows, BLOCK_N]: which weights dropout keeps; ALIGNED: first_key is a multiple of 4, the keys of a counter."""
    if ALIGNED:
        four = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    else:
        key = first_key + tl.arange(0, BLOCK_N)
        four = key >> 2
    zero = row[:, None] * 0 + four[None, :] * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + four[None, :], zero + row[:, None], zero + head, zero + sequence)
    if ALIGNED:
        k0, k1 = _is_kept(w0, drop_below).to(tl.int8), _is_kept(w1, drop_below).to(tl.int8)
        k2, k3 = _is_kept(w2, drop_below).to(tl.int8), _is_kept(w3, drop_below).to(tl.int8)
        keep = tl.interleave(tl.interleave(k0, k2), tl.interleave(k1, k3)) != 0
    else:
        which = (key & 3)[None, :]
        word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
        keep = _is_kept(word, drop_below)
    return keep


@triton.jit
def _pairs(R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each channel [1, BLOCK_D]: the one it is rotated with, its angle, whether it leads, whether it is rotated."""
    channel = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        partner, angle, leads = channel ^ 1, channel // 2, channel % 2 == 0
    else:
        leads = channel < R // 2
        partner = tl.where(leads, channel + R // 2, channel - R // 2)
        angle = tl.where(leads, channel, partner)
    turns = channel < R
    return tl.where(turns, partner, channel)[None, :], angle[None, :], leads[None, :], turns[None, :]


@triton.jit
def place_of(row, inside, shift, positions_ptr, stride, table_rows):
    """Row of the tables of cos and sin for each row, by default its own number and `shift`."""
    if positions_ptr is not None:
        place = tl.load(positions_ptr + row.to(tl.int64) * stride, mask=inside, other=0)
    else:
        place = row + shift
    return tl.minimum(tl.maximum(place, 0), table_rows - 1)


@triton.jit
def load_rotated(
    at, stride, row, inside, place, cos_ptr, sin_ptr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`load_rows` with rotary embedding."""
    partner, angle, leads, turns = _pairs(R, INTERLEAVED, BLOCK_D)
    rows = at + row[:, None] * stride
    turned = inside[:, None] & turns
    x = load_rows(at, stride, row, inside, SIZE, BLOCK_D, True)
    y = tl.load(rows + partner, mask=turned, other=0.0).to(tl.float32)
    entry = place[:, None] * (R // 2) + angle
    cos = tl.load(cos_ptr + entry, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + entry, mask=turned, other=0.0)
    return (x.to(tl.float32) * cos + tl.where(leads, -y, y) * sin).to(x.dtype)


@triton.jit
def rotated_back(x, inside, place, cos_ptr, sin_ptr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of rotary embedding, x [rows, BLOCK_D] that of the rotated rows."""
    partner, angle, leads, turns = _pairs(R, INTERLEAVED, BLOCK_D)
    y = tl.gather(x, tl.broadcast_to(partner, x.shape), 1)
    turned = inside[:, None] & turns
    entry = place[:, None] * (R // 2) + angle
    cos = tl.load(cos_ptr + entry, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + entry, mask=turned, other=0.0)
    return x * cos + tl.where(leads, y, -y) * sin
