"""What scaled_attention refuses, and that its registered ops guard memory themselves."""

from __future__ import annotations

import re
from itertools import zip_longest

import pytest
import torch

import fastmix
from fastmix.reference import scaled_attention as reference
from fastmix.testing.scaled_attention import ALIGNMENTS, scaled_attention_case

pytestmark = pytest.mark.kernel

_VALID = {"query": torch.ones(2, 4, 5, 6), "key": torch.ones(2, 2, 7, 6), "value": torch.ones(2, 2, 7, 3)}


def _ones(*shape: int, dtype=torch.float32, device=None) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _ints(*values, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def _bias(*shape: int, dtype=torch.float32, **options) -> dict:
    return {"relative_bias": fastmix.RelativeBias(_ones(*shape, dtype=dtype), **options)}


def _rotary(*shape: int, sin: tuple[int, ...] | None = None, dtype=torch.float32, **options) -> dict:
    return {"rotary": fastmix.Rotary(_ones(*shape, dtype=dtype), _ones(*(sin or shape)), **options)}


def _refused(error: type[Exception], text: str, **arguments) -> None:
    with pytest.raises(error, match=re.escape(text)):
        fastmix.scaled_attention(**(_VALID | arguments))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors(name):
    valid = _VALID[name]
    _refused(TypeError, f"{name} must be a Tensor, got list", **{name: [1.0]})
    _refused(TypeError, f"{name} must be a Tensor, got NoneType", **{name: None})
    _refused(TypeError, f"{name} must be float32, bfloat16, float16 or float64, got int64", **{name: valid.long()})
    _refused(TypeError, f"{name} must be float32, bfloat16, float16 or float64, got complex64", **{name: valid * 1j})
    _refused(ValueError, f"{name} must be [B, H, length, channels]", **{name: valid[None]})
    _refused(ValueError, f"{name} must be [B, H, length, channels]", **{name: valid[0, 0, 0]})
    if name != "query":
        _refused(TypeError, f"{name} must have the dtype of query, float32, got bfloat16", **{name: valid.bfloat16()})
        _refused(ValueError, f"{name} must be on the device of query, cpu, got meta", **{name: valid.to("meta")})


def test_sizes():
    _refused(ValueError, "key must be [B, Hkv, S, D] with B = 2, D = 6, got [2, 2, 7, 5]", key=_ones(2, 2, 7, 5))
    _refused(ValueError, "key must be [B, Hkv, S, D] with B = 3", query=_ones(3, 4, 5, 6), value=_ones(3, 2, 7, 3))
    _refused(ValueError, "value must be [B, Hkv, S, Dv] with B = 2, Hkv = 2, S = 7, got [2, 2, 8, 3]",
             value=_ones(2, 2, 8, 3))  # fmt: skip
    _refused(ValueError, "query must have a multiple of key's 2 heads, got 3", query=_ones(2, 3, 5, 6))
    _refused(ValueError, "query must have a multiple of key's 3 heads, got 4",
             key=_ones(2, 3, 7, 6), value=_ones(2, 3, 7, 3))  # fmt: skip
    _refused(ValueError, "key must have query's 4 heads where enable_gqa is False, got 2", enable_gqa=False)
    _refused(ValueError, "query and value must have channels, got [2, 4, 5, 0] and [2, 2, 7, 3]",
             query=_ones(2, 4, 5, 0), key=_ones(2, 2, 7, 0))  # fmt: skip
    _refused(ValueError, "query and value must have channels", value=_ones(2, 2, 7, 0))


def test_masks():
    _refused(TypeError, "attn_mask must be a Tensor, got list", attn_mask=[[True]])
    _refused(TypeError, "attn_mask must be bool, float32, got int64", attn_mask=_ones(5, 7, dtype=torch.int64))
    _refused(TypeError, "attn_mask must be bool, float32, got bfloat16", attn_mask=_ones(5, 7, dtype=torch.bfloat16))
    half = {name: value.half() for name, value in _VALID.items()}
    _refused(TypeError, "attn_mask must be bool, float16 or float32, got float64", **half,
             attn_mask=_ones(5, 7, dtype=torch.float64))  # fmt: skip
    _refused(
        ValueError, "attn_mask must be on the device of query, cpu, got meta", attn_mask=_ones(5, 7, device="meta")
    )
    for shape in ((7, 5), (5, 6), (2, 5, 7), (4, 1, 5, 7), (2, 2, 5, 7), (1, 2, 4, 5, 7), (0, 7)):
        message = f"attn_mask must be broadcastable to [B, H, T, S] = [2, 4, 5, 7], got {list(shape)}"
        _refused(ValueError, message, attn_mask=_ones(*shape))


def test_numbers():
    _refused(ValueError, "dropout_p must be in 0..1, got -0.1", dropout_p=-0.1)
    _refused(ValueError, "dropout_p must be in 0..1, got 1.5", dropout_p=1.5)
    _refused(ValueError, "dropout_p must be in 0..1, got nan", dropout_p=float("nan"))
    _refused(TypeError, "dropout_p must be a float, got str", dropout_p="0.1")
    _refused(TypeError, "dropout_seed must be an int or an int64 tensor of one element", dropout_seed=1.5)
    _refused(TypeError, "dropout_seed must be an int or an int64 tensor of one element", dropout_seed=_ints(1, 2))
    _refused(TypeError, "dropout_seed must be an int or an int64 tensor of one element", dropout_seed=_ones(1))
    _refused(ValueError, "dropout_seed must be on the device of query", dropout_seed=_ints(1).to("meta"))
    message = "causal_alignment must be one of 'top_left', 'bottom_right', got 'bottom'"
    _refused(ValueError, message, causal_alignment="bottom")


def test_windows():
    _refused(ValueError, "window_size must be -1 (unlimited) or more on each side, got (-2, 0)", window_size=(-2, 0))
    _refused(ValueError, "window_size must be -1 (unlimited) or more on each side, got (0, -5)", window_size=(0, -5))
    _refused(TypeError, "window_size must be (left, right), got 3", window_size=3)
    _refused(TypeError, "window_size must be (left, right), got (1, 2, 3)", window_size=(1, 2, 3))
    _refused(TypeError, "window_size must be two ints, got (1.0, 2)", window_size=(1.0, 2))


@pytest.mark.parametrize(
    ("name", "high"), [("prefix_len", 7), ("query_lengths", 5), ("key_lengths", 7), ("key_start", 7)]
)
def test_lengths(name, high):
    _refused(TypeError, f"{name} must be a Tensor, got list", **{name: [1, 2]})
    _refused(TypeError, f"{name} must be int32 or int64, got float32", **{name: _ones(2)})
    _refused(ValueError, f"{name} must be [2], one for each sequence, got [1]", **{name: _ints(1)})
    _refused(ValueError, f"{name} must be [2], one for each sequence, got [2, 1]", **{name: _ints([1], [1])})
    _refused(ValueError, f"{name} must be on the device of query, cpu, got meta", **{name: _ints(1, 1).to("meta")})
    _refused(ValueError, f"{name} must be in 0..{high}, got values from 1 to {high + 1}", **{name: _ints(1, high + 1)})
    _refused(ValueError, f"{name} must be in 0..{high}, got values from -1 to 1", **{name: _ints(-1, 1)})
    fastmix.scaled_attention(**_VALID, **{name: _ints(0, high)})
    fastmix.scaled_attention(**_VALID, **{name: _ints(0, high, dtype=torch.int32)})


def test_packed_sequences():
    one = {name: value[:1] for name, value in _VALID.items()}
    q, k = {"cu_seqlens_q": _ints(0, 2, 5)}, {"cu_seqlens_k": _ints(0, 2, 7)}
    fastmix.scaled_attention(**one, **q, **k)
    _refused(TypeError, "cu_seqlens_k must be a Tensor, got NoneType", **one, **q)
    _refused(TypeError, "cu_seqlens_q must be a Tensor, got NoneType", **one, **k)
    _refused(ValueError, "query must have B = 1 for packed sequences, got [2, 4, 5, 6]", **q, **k)
    for name in ("query_lengths", "key_lengths", "key_start"):
        _refused(ValueError, f"{name} must be None for packed sequences", **one, **q, **k, **{name: _ints(1)})
    _refused(
        ValueError, "cu_seqlens_k must be [3] as cu_seqlens_q, got [4]", **one, **q, cu_seqlens_k=_ints(0, 1, 2, 7)
    )
    _refused(ValueError, "prefix_len must be [2], one for each sequence, got [1]", **one, **q, **k, prefix_len=_ints(1))
    for wrong in (_ints(1, 2, 5), _ints(0, 3, 2), _ints(0, 2, 6), _ints(0, -1, 5)):
        message = f"cu_seqlens_q must rise from 0 to at most 5, got {wrong.tolist()}"
        _refused(ValueError, message, **one, **k, cu_seqlens_q=wrong)
    for wrong in (_ints(0), _ints([0, 5]), torch.tensor(0)):
        _refused(ValueError, "cu_seqlens_q must be [N + 1] with N ≥ 1", **one, **k, cu_seqlens_q=wrong)
    _refused(TypeError, "cu_seqlens_q must be int32 or int64, got float32", **one, **k, cu_seqlens_q=_ones(3))


def test_relative_bias():
    _refused(TypeError, "relative_bias must be a RelativeBias, got Tensor", relative_bias=_ones(8, 4))
    _refused(TypeError, "relative_bias.weight must be float32", **_bias(8, 4, dtype=torch.int64))
    for shape in ((8, 2), (8,), (3, 4), (8, 4, 1)):
        message = f"relative_bias.weight must be [buckets, H] with buckets ≥ 4, H = 4, got {list(shape)}"
        _refused(ValueError, message, **_bias(*shape))
    _refused(ValueError, "with buckets ≥ 2", **_bias(1, 4, bidirectional=False))
    _refused(ValueError, "relative_bias.max_distance must be above 8, got 8", **_bias(32, 4, max_distance=8))
    _refused(ValueError, "relative_bias.max_distance must be above 16, got 16",
             **_bias(32, 4, bidirectional=False, max_distance=16))  # fmt: skip
    meta = fastmix.RelativeBias(_ones(8, 4, device="meta"))
    _refused(ValueError, "relative_bias.weight must be on the device of query, cpu, got meta", relative_bias=meta)


def test_rotary():
    tables = _ones(7, 3), _ones(7, 3)
    _refused(TypeError, "rotary must be a Rotary, got tuple", rotary=tables)
    _refused(TypeError, "rotary.cos must be float32", **_rotary(7, 3, dtype=torch.int64))
    _refused(ValueError, "rotary.cos must be [L, R/2] with R ≤ D = 6", **_rotary(7, 4))
    _refused(ValueError, "rotary.cos must be [L, R/2] with R ≤ D = 6", **_rotary(7))
    _refused(ValueError, "rotary.sin must be [L, R/2] with R ≤ D = 6", **_rotary(7, 3, sin=(7, 2)))
    _refused(ValueError, "rotary.cos must have a row for each of 7 positions, got [6, 3]", **_rotary(6, 3))
    for name, length in (("query", 5), ("key", 7)):
        given = f"{name}_positions"
        _refused(ValueError, f"rotary.{given} must be [{length}] or [2, {length}], got [4]",
                 **_rotary(9, 3, **{given: _ints(1, 2, 3, 4)}))  # fmt: skip
        _refused(ValueError, f"rotary.{given} must be in 0..8, got values from 0 to 9",
                 **_rotary(9, 3, **{given: _ints(*range(length - 1), 9)}))  # fmt: skip
        _refused(ValueError, f"rotary.{given} must be in 0..8, got values from -1",
                 **_rotary(9, 3, **{given: _ints(*range(length - 1), -1)}))  # fmt: skip
        _refused(TypeError, f"rotary.{given} must be int32 or int64, got float32",
                 **_rotary(9, 3, **{given: _ones(length)}))  # fmt: skip


def test_query_scale():
    _refused(TypeError, "query_scale must be a Tensor, got float", query_scale=0.5)
    _refused(TypeError, "query_scale must be float32", query_scale=_ones(5, dtype=torch.int64))
    for shape in ((7,), (5, 1), (2, 1), (1, 5), (2, 4, 5)):
        message = f"query_scale must be [T] = [5] or [B, T] = [2, 5], got {list(shape)}"
        _refused(ValueError, message, query_scale=_ones(*shape))


# The registered ops, called without the public function's checks, as a compiled program may

_NAMES = (
    "query", "key", "value", "attn_mask", "bias_table", "query_scale", "cos", "sin", "query_positions", "key_positions",
    "prefix_len", "query_lengths", "key_lengths", "key_start", "cu_seqlens_q", "cu_seqlens_k", "dropout_seed",
    "scale", "dropout_p",
)  # fmt: skip


def _arguments(**options) -> list:
    """What the public function would hand to the op."""
    case = scaled_attention_case("op", **({"shape": (2, 4, 5, 7, 6), "kv_heads": 2, "value_size": 3} | options))
    found: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attend", lambda *arguments: found.extend(arguments) or (None, None))
        case.reference(**case.inputs(torch.float32))
    return found


def _changed(arguments: list, changes: dict) -> list:
    return [changes.get(name, value) for name, value in zip_longest(_NAMES, arguments)]


def _forward(arguments: list) -> tuple[torch.Tensor, ...]:
    return torch.ops.fastmix.scaled_attention.default(*arguments)


def _backward(arguments: list, outputs: tuple[torch.Tensor, ...], *, asked=(False, False, False), **changes) -> tuple:
    given = {"grad_output": outputs[0], "grad_lse": None, "output": outputs[0], "lse": outputs[1]} | changes
    grad_output, grad_lse, output, lse = given.values()
    inputs, options = arguments[:6], arguments[6:]
    op = torch.ops.fastmix.scaled_attention_bwd.default
    return op(grad_output, grad_lse, *inputs, output, lse, *outputs[2:], *options, *asked)


@pytest.mark.parametrize(
    "changes",
    [
        {"query": _ones(2, 4, 5)},
        {"query": _ones(2, 4, 5, 8)},
        {"query": _ones(2, 3, 5, 6)},
        {"query": _ones(1, 4, 5, 6)},
        {"query": _ones(2, 4, 5, 6).half()},
        {"query": _ones(2, 4, 5, 6).double(), "key": _ones(2, 2, 7, 6).double(), "value": _ones(2, 2, 7, 3).double()},
        {"key": _ones(2, 2, 8, 6)},
        {"key": _ones(2, 2, 7, 5)},
        {"key": _ones(2, 0, 7, 6), "value": _ones(2, 0, 7, 3)},
        {"value": _ones(2, 1, 7, 3)},
        {"value": _ones(2, 2, 6, 3)},
        {"value": _ones(2, 2, 7, 0)},
        {"attn_mask": _ones(5, 7)},
        {"attn_mask": _ones(2, 4, 5, 6)},
        {"attn_mask": _ones(2, 4, 5, 7).half()},
        {"attn_mask": _ones(2, 4, 5, 7).int()},
        {"bias_table": _ones(4, 10)},
        {"bias_table": _ones(2, 11)},
        {"bias_table": _ones(4, 11).double()},
        {"query_scale": _ones(5)},
        {"query_scale": _ones(2, 7)},
        {"query_scale": _ones(2, 5).half()},
        {"cos": _ones(7, 3), "sin": None},
        {"cos": _ones(7, 3), "sin": _ones(6, 3)},
        {"cos": _ones(7, 4), "sin": _ones(7, 4)},
        {"cos": _ones(0, 3), "sin": _ones(0, 3)},
        {"cos": _ones(7, 3).double(), "sin": _ones(7, 3).double()},
        {"query_positions": _ones(2, 4).int()},
        {"query_positions": _ones(2, 5).long()},
        {"key_positions": _ones(7).int()},
        {"prefix_len": _ints(1, 2)},
        {"prefix_len": _ints(1, 2, 3, dtype=torch.int32)},
        {"query_lengths": _ints(1, dtype=torch.int32)},
        {"key_lengths": _ones(2)},
        {"key_start": _ones(2, 1).int()},
        {"cu_seqlens_q": _ints(0, 5, dtype=torch.int32)},
        {"cu_seqlens_q": _ints(0, 5, dtype=torch.int32), "cu_seqlens_k": _ints(0, 7, dtype=torch.int32)},
        {"dropout_p": 0.5},
        {"dropout_p": 0.5, "dropout_seed": _ints(1, 2)},
        {"dropout_p": 0.5, "dropout_seed": _ones(1)},
        {"dropout_p": 1.0, "dropout_seed": _ints(1)},
        {"dropout_p": -0.5},
    ],
)
def test_the_ops_guard_memory_themselves(changes, needs_kernels):
    arguments = _arguments()
    outputs, changed = _forward(arguments), _changed(arguments, changes)
    with pytest.raises(ValueError, match="must"):
        _forward(changed)
    with pytest.raises(ValueError, match="must"):
        _backward(changed, outputs)


def test_the_backward_op_guards_memory_itself(needs_kernels):
    arguments = _arguments(mask="bool")
    outputs = _forward(arguments)
    output, lse = outputs[:2]
    _backward(arguments, outputs)
    for wrong in (output[:1], output[..., :2], output.double(), output[0]):
        for name in ("grad_output", "output"):
            with pytest.raises(ValueError, match="grad_output and output must be"):
                _backward(arguments, outputs, **{name: wrong})
    for wrong in (lse[:1], lse.double(), lse[..., None]):
        for name in ("lse", "grad_lse"):
            with pytest.raises(ValueError, match="grad_lse must be float32"):
                _backward(arguments, outputs, **{name: wrong})
    for i, name in enumerate(("attn_mask", "bias_table", "query_scale")):
        with pytest.raises(ValueError, match=f"a gradient of {name} needs a"):
            _backward(arguments, outputs, asked=[i == j for j in range(3)])


_LARGE = 2**31 - 1


_ALIGNED = pytest.mark.parametrize("alignment", ALIGNMENTS)


def _assert_finite(arguments: list, changes: dict[str, torch.Tensor]) -> None:
    """Compiled programs can't check integers: results may mean nothing then, but they come from the inputs."""
    changed = _changed(arguments, changes)
    outputs = _forward(changed)
    asked = [x is not None for x in changed[3:6]]
    assert all(x.isfinite().all() for x in (outputs[0], *_backward(changed, outputs, asked=asked)))


@_ALIGNED
@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("prefix_len",), (_LARGE, -_LARGE)),
        (("query_lengths",), (_LARGE, -_LARGE)),
        (("key_lengths",), (_LARGE, -_LARGE)),
        (("key_lengths", "query_lengths"), (-_LARGE, _LARGE)),
        (("key_start",), (_LARGE, -_LARGE)),
        (("key_start", "key_lengths"), (-_LARGE, _LARGE)),
    ],
)
def test_lengths_out_of_range(names, values, alignment, needs_kernels):
    structure = {"is_causal": True, "causal_alignment": alignment, **{name: [0, 0] for name in names}}
    arguments = _arguments(buckets=8, rotary=4, query_scale="BT", mask="float", **structure)
    _assert_finite(arguments, {name: _ints(*values, dtype=torch.int32) for name in names})


@_ALIGNED
@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((0, _LARGE, _LARGE), (0, _LARGE, _LARGE)),
        ((0, -5, 5), (0, -7, 7)),
        ((3, 2, 1), (7, 0, 3)),
        ((-_LARGE, 2, _LARGE), (-_LARGE, 2, _LARGE)),
        ((0, 4, 2), (0, 5, 1)),
    ],
)
def test_sequences_out_of_range(q, k, alignment, needs_kernels):
    packed = {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 2, 7], "causal_alignment": alignment, "is_causal": True}
    arguments = _arguments(shape=(1, 4, 5, 7, 6), buckets=8, rotary=4, query_scale="BT", mask="float", **packed)
    changes = {"cu_seqlens_q": q, "cu_seqlens_k": k}
    _assert_finite(arguments, {name: _ints(*value, dtype=torch.int32) for name, value in changes.items()})


@pytest.mark.parametrize("value", [_LARGE, -_LARGE, 12, -1])
def test_positions_out_of_range(value, needs_kernels):
    shapes = {"query_positions": (2, 5), "key_positions": (2, 7)}
    changes = {name: torch.full(shape, value, dtype=torch.int32) for name, shape in shapes.items()}
    _assert_finite(_arguments(rotary=4, positions=True), changes)
