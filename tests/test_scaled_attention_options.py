"""Combinations of scaled_attention's options, the reference against loops, and PyTorch's own sample inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import sample_inputs_scaled_dot_product_attention

import fastmix
from fastmix.reference import scaled_attention as reference
from fastmix.reference._attention import relative_buckets
from fastmix.testing.cases import check_case
from fastmix.testing.parity import check_parity
from fastmix.testing.scaled_attention import ALIGNMENTS, scaled_attention_case

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Every combination of options


def _maybe(draw, values: st.SearchStrategy) -> dict:
    return draw(values) if draw(st.booleans()) else {}


def _named(name: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda value: {name: value})


@st.composite
def _options(draw, few: int, longest: int) -> dict:
    """Arguments of scaled_attention_case: any sizes and any options together.

    A sequence is empty or has at least `few` tokens, and a window spans as many: an error relative to what is left of a
    gradient after one or two terms cancelled is luck. Such lengths are among CASES.
    """
    t, s = draw(st.integers(few, longest)), draw(st.integers(few, 2 * longest))
    packed = draw(st.booleans())
    b = 1 if packed else draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 2))
    h = kv_heads * draw(st.integers(1, 3))
    d = draw(st.integers(2, 20))
    options: dict = {"kv_heads": kv_heads, "value_size": draw(st.integers(few, 20)), "return_lse": True}
    options["causal_alignment"] = draw(st.sampled_from(ALIGNMENTS))
    count = b
    if packed:
        lengths = draw(st.lists(st.tuples(*(st.sampled_from([0, few, few + 3, longest]),) * 2), min_size=1, max_size=4))
        for name, sizes in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*lengths, strict=True), strict=True):
            options[name] = torch.tensor([0, *sizes]).cumsum(0).tolist()
        t, s = (max(options[name][-1], 1) + draw(st.integers(0, 3)) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        count = len(lengths)
    else:
        options |= _maybe(draw, _named("query_lengths", _integers(b, few, t)))
        options |= _maybe(draw, _named("key_lengths", _integers(b, few, s)))
        if draw(st.booleans()):
            last = options.get("key_lengths", [s] * b)
            options["key_start"] = [draw(st.integers(0, max(n - few, 0)) | st.just(s)) for n in last]
    options |= _maybe(draw, _named("is_causal", st.just(True)) | _named("prefix_len", _integers(count, few, s)))
    window = st.tuples(st.integers(few, longest) | st.just(-1), st.integers(0, longest) | st.just(-1))
    options |= _maybe(draw, _named("window_size", window))
    options |= _maybe(draw, _named("scale", st.sampled_from([1.0, 0.1, -0.5])))
    options |= _maybe(draw, _named("query_scale", st.sampled_from(["T", "BT"])))
    options |= _maybe(draw, _masks((b, h, t, s)))
    options |= _maybe(draw, _biases())
    options |= _maybe(draw, _rotaries(d))
    return {"shape": (b, h, t, s, d), **options}


def _integers(count: int, few: int, high: int) -> st.SearchStrategy:
    return st.lists(st.integers(min(few, high), high) | st.just(0), min_size=count, max_size=count)


def _masks(full: tuple[int, ...]) -> st.SearchStrategy:
    """A float mask has its keys: what is the same for a whole row cancels in all but the log-sum-exp."""
    sizes = [st.sampled_from([1, size]) for size in full]
    kinds = st.just("bool"), st.sampled_from(["float", "-inf"])
    shapes = st.tuples(*sizes), st.tuples(*sizes[:3], st.just(full[3]))
    pairs = (st.fixed_dictionaries({"mask": k, "mask_shape": s}) for k, s in zip(kinds, shapes, strict=True))
    return st.one_of(*pairs)


def _biases() -> st.SearchStrategy:
    return st.fixed_dictionaries({
        "buckets": st.integers(4, 32), "bidirectional": st.booleans(), "max_distance": st.integers(20, 200),
    })  # fmt: skip


def _rotaries(d: int) -> st.SearchStrategy:
    return st.fixed_dictionaries({
        "rotary": st.integers(1, d // 2).map(lambda half: 2 * half),
        "interleaved": st.booleans(),
        "positions": st.booleans(),
    })  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(options=_options(few=6, longest=90), dropout_p=st.sampled_from([0.0, 0.2]), dtype=st.sampled_from(DTYPES[1:]))
def test_every_combination(options, dropout_p, dtype):
    """In half precision: in float32 slices of a few small numbers have luck with rounding, good or bad."""
    check_case(scaled_attention_case("drawn", **options, dropout_p=dropout_p, dropout_seed=1), dtype)


# The reference against loops


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=_options(few=1, longest=6))
@example(options={"shape": (1, 1, 3, 0, 2), "return_lse": True})
@example(options={"shape": (2, 1, 1, 1, 2), "return_lse": True, "query_lengths": [0, 1]})
def test_the_reference_is_a_dense_mask_by_loops(options):
    case = scaled_attention_case("drawn", **options)
    inputs = case.inputs(torch.float64)
    torch.testing.assert_close(case.reference(**inputs), _dense(**inputs))


def _dense(query, key, value, *, scale=None, query_scale=None, cos=None, sin=None, return_lse=True, **options):
    """F.scaled_dot_product_attention and the log-sum-exp with a mask that loops fill, pair by pair."""
    (b, h, t, d), s = query.shape, key.shape[2]
    bias = torch.full((b, h, t, s), -torch.inf, dtype=query.dtype)
    query_positions, key_positions = torch.zeros(b, t).int(), torch.zeros(b, s).int()
    for n, sample, rows, columns, start in _sequences(b, t, s, **options):
        bottom_right = options.get("causal_alignment") == "bottom_right"
        offset = len(columns) - len(rows) if bottom_right else 0
        for i, row in enumerate(rows):
            query_positions[sample, row] = i + max(offset, 0)
            for j, column in enumerate(columns):
                key_positions[sample, column] = j + max(-offset, 0)
                if j >= start and _structure_allows(i + offset, j, n, **options):
                    for head in range(h):
                        bias[sample, head, row, column] = _bias_of(
                            sample, head, row, column, j - i - offset, bias, **options
                        )
    if cos is not None:
        given = [options.get(f"{name}_positions") for name in ("query", "key")]
        positions = [p if g is None else g for p, g in zip((query_positions, key_positions), given, strict=True)]
        turns = torch.complex(cos, sin)
        rotated = [
            _turned(x, turns, p, options.get("interleaved", True)) for x, p in zip((query, key), positions, strict=True)
        ]
        query, key = rotated
    if query_scale is not None:
        query = query * query_scale.expand(b, t)[:, None, :, None]
    scale = d**-0.5 if scale is None else scale
    key, value = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    output = output.masked_fill((bias == -torch.inf).all(dim=3, keepdim=True), 0)
    return output, (query @ key.mT * scale + bias).logsumexp(dim=3)


def _sequences(
    b, t, s, *, query_lengths=None, key_lengths=None, key_start=None, cu_seqlens_q=None, cu_seqlens_k=None, **_
):
    """(number, sample, its rows, its columns, the first key that counts) of each sequence."""
    if cu_seqlens_q is not None:
        q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return [(n, 0, range(q[n], q[n + 1]), range(k[n], k[n + 1]), 0) for n in range(len(q) - 1)]
    rows = [t] * b if query_lengths is None else query_lengths.tolist()
    columns = [s] * b if key_lengths is None else key_lengths.tolist()
    starts = [0] * b if key_start is None else key_start.tolist()
    return [(n, n, range(rows[n]), range(columns[n]), starts[n]) for n in range(b)]


def _structure_allows(place, j, n, *, is_causal=False, prefix_len=None, window_size=None, **_) -> bool:
    left, right = window_size or (-1, -1)
    if (is_causal or prefix_len is not None) and j > place and not (prefix_len is not None and j < prefix_len[n]):
        return False
    return (left == -1 or j >= place - left) and (right == -1 or j <= place + right)


def _bias_of(
    sample,
    head,
    row,
    column,
    distance,
    like,
    *,
    attn_mask=None,
    bias_weight=None,
    bidirectional=True,
    max_distance=128,
    **_,
) -> float:
    total = 0.0
    if attn_mask is not None:
        entry = attn_mask.expand(like.shape)[sample, head, row, column].item()
        total += entry if attn_mask.dtype != torch.bool else 0.0 if entry else -torch.inf
    if bias_weight is not None:
        bucket = relative_buckets(torch.tensor(distance), bias_weight.shape[0], bidirectional, max_distance)
        total += bias_weight[bucket, head].item()
    return total


def _turned(x, turns, positions, interleaved):
    """Channels in pairs are complex numbers, times those of the table."""
    half = turns.shape[1]
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns[positions.long()].unsqueeze(1))
    turned = turned if interleaved else turned.mT
    return torch.cat([turned.flatten(-2), x[..., 2 * half :]], dim=-1)


# PyTorch's sample inputs


_SAMPLES = list(sample_inputs_scaled_dot_product_attention(None, "cpu", torch.float64, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("i", range(len(_SAMPLES)))
def test_sample_inputs_of_pytorch(i, dtype):
    """The oracle is PyTorch's function in float64, where nothing is drawn at random.

    With a smaller scale, since the samples' numbers reach 9: one weight of a row would be all that is left.
    """
    sample = _SAMPLES[i]
    tensors = [x.to(dtype) for x in (sample.input, *sample.args)]
    options = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in sample.kwargs.items()}
    options["scale"] = 0.02
    exact_options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    actual = fastmix.scaled_attention(*tensors, **options, dropout_seed=7)
    full = [x if x.ndim == 4 else x[None] for x in tensors]  # the reference takes four dimensions
    full = [x.expand(full[1].shape[0], -1, -1, -1) for x in full]
    expected = reference.scaled_attention(*full, **options, dropout_seed=7).reshape(actual.shape)
    exact = [x.double() for x in full]
    if options["dropout_p"] == 0:
        oracle = F.scaled_dot_product_attention(*exact, **exact_options)
    else:
        oracle = reference.scaled_attention(*exact, **exact_options, dropout_seed=7)
    check_parity(f"sample {i}", actual, expected, oracle.reshape(actual.shape))
