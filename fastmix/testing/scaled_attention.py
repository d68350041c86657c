"""Cases of scaled_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmix
from fastmix.reference import scaled_attention as reference
from fastmix.testing.cases import Case

# Arguments that are a number for each sample or sequence.
_VECTORS = ("prefix_len", "query_lengths", "key_lengths", "key_start", "cu_seqlens_q", "cu_seqlens_k", "dropout_seed")


def scaled_attention_case(
    name: str,
    shape: tuple[int, int, int, int, int],
    *,
    kv_heads: int | None = None,
    value_size: int | None = None,
    logits: float = 1.0,
    mask: str | None = None,
    mask_shape: tuple[int, ...] | None = None,
    buckets: int | None = None,
    rotary: int | None = None,
    positions: bool = False,
    query_scale: str | None = None,
    fixed: tuple[str, ...] = (),
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
    **options: Any,
) -> Case:
    """A case whose arguments are flat: those of the public function, and bias_weight, cos and sin beside its options.

    Args:
        name: what is special about it.
        shape: [B, H, T, S, D].
        kv_heads: heads of key and value, H by default.
        value_size: Dv, D by default.
        logits: standard deviation of the logits without options.
        mask: "bool" (70 % True), "float", or "-inf" (float, 30 % −inf); of mask_shape, [B, H, T, S] by default.
        mask_shape: see mask.
        buckets: rows of the relative bias; bidirectional and max_distance are options.
        rotary: channels that are rotated; interleaved is an option.
        positions: rotary positions are drawn instead of counted.
        query_scale: "T" or "BT", its shape.
        fixed: arguments that get no gradient.
        change: of the arguments, after they were drawn.
        **options: the public function's; where it takes integer tensors, a list of the integers.
    """
    b, h, t, s, d = shape
    kv_heads = kv_heads or h
    scale = options.get("scale", d**-0.5)
    if rotary is None and positions:
        raise ValueError("positions are of a rotary embedding")

    def make(generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"query": draw(b, h, t, d), "key": draw(b, kv_heads, s, d)}
        inputs["value"] = draw(b, kv_heads, s, d if value_size is None else value_size)
        if scale:
            inputs["query"] *= logits / (abs(scale) * d**0.5)
        if mask:
            inputs["attn_mask"] = _mask(mask, mask_shape or (b, h, t, s), generator)
        if buckets:
            inputs["bias_weight"] = draw(buckets, h)
        if rotary:
            inputs |= _rotary(rotary, (b, t, s), positions, generator)
        if query_scale:
            size = (t,) if query_scale == "T" else (b, t)
            inputs["query_scale"] = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        vectors = {key: torch.tensor(options[key]) for key in _VECTORS if key in options}
        vectors |= {key: value.int() for key, value in vectors.items() if key != "dropout_seed"}
        return change(inputs | options | vectors)

    gradients = {"query": 2, "key": 2, "value": 2}
    if mask and mask != "bool":
        gradients["attn_mask"] = 0
    if buckets:
        gradients["bias_weight"] = 0
    if query_scale:
        gradients["query_scale"] = 0
    gradients = {key: count for key, count in gradients.items() if key not in fixed}
    return Case(
        "scaled_attention", f"scaled_attention {name}", _public, _plain, make, independent=2, gradients=gradients
    )


def _public(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    return fastmix.scaled_attention(**_nested(inputs))


def _plain(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    return reference.scaled_attention(**_nested(inputs))


def _nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """The public function's arguments: a case's are flat, so that each tensor gets its dtype and its gradient."""
    arguments = dict(inputs)

    def taken(*names: str) -> dict[str, Any]:
        return {name: arguments.pop(name) for name in names if name in arguments}

    if "bias_weight" in arguments:
        weight = arguments.pop("bias_weight")
        arguments["relative_bias"] = fastmix.RelativeBias(weight, **taken("bidirectional", "max_distance"))
    if "cos" in arguments:
        names = ("cos", "sin", "interleaved", "query_positions", "key_positions")
        arguments["rotary"] = fastmix.Rotary(**taken(*names))
    return arguments


def _mask(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "bool":
        return drawn < 0.7
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    return bias.masked_fill(drawn >= 0.7, -torch.inf) if kind == "-inf" else bias


def _rotary(channels: int, sizes: tuple[int, int, int], positions: bool, generator: torch.Generator) -> dict[str, Any]:
    """cos and sin as RoFormer has them, with a few rows to spare."""
    b, t, s = sizes
    length = max(t, s) + 5
    frequency = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    inputs = {"cos": angle.cos(), "sin": angle.sin()}
    if positions:
        for name, size in (("query_positions", t), ("key_positions", s)):
            inputs[name] = torch.randint(length, (b, size), generator=generator)
    return inputs


def changed(**functions: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: inputs | {name: function(inputs[name]) for name, function in functions.items()}


def tokens_before_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] as a view of [B, T, H, D], the way a projection leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _chunk(x: Tensor) -> Tensor:
    """As one part of a fused projection."""
    return torch.cat([x, x], dim=3)[..., x.shape[3] :]


def _expanded(x: Tensor) -> Tensor:
    """One sample, one head, one token for all."""
    return x[:1, :1, :1].expand(x.shape)


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _rows_of_nothing(mask: Tensor) -> Tensor:
    nothing = False if mask.dtype == torch.bool else -torch.inf
    return mask.index_fill(-2, torch.tensor([0, 3, mask.shape[-2] - 1]), nothing)


ALIGNMENTS = ("top_left", "bottom_right")
PACKED = {"cu_seqlens_q": [0, 5, 5, 40, 41, 60], "cu_seqlens_k": [0, 9, 12, 12, 90, 101]}
_BOTTOM = {"causal_alignment": "bottom_right"}
_CAUSAL_BOTTOM = {"is_causal": True, **_BOTTOM}

# One key alone leaves no gradient in the output: there, and where a row sees little else, the lse brings one.
_SIZES = [
    scaled_attention_case("1x1x1", (1, 1, 1, 1, 1), return_lse=True),
    scaled_attention_case("one key", (2, 3, 7, 1, 8), return_lse=True),
    scaled_attention_case("one query", (2, 3, 1, 37, 8)),
    scaled_attention_case("one query, many keys", (2, 4, 1, 700, 64), kv_heads=2),
    scaled_attention_case("one query, bottom right", (2, 4, 1, 300, 40), kv_heads=1, **_CAUSAL_BOTTOM,
                          return_lse=True),
    *(
        scaled_attention_case(f"{t}x{s}x{d}", (b, h, t, s, d))
        for b, h, t, s, d in [
            (2, 2, 5, 3, 1), (2, 3, 17, 31, 32), (1, 2, 65, 129, 40), (2, 1, 64, 64, 64), (1, 2, 131, 67, 80),
            (1, 1, 33, 70, 128), (1, 1, 20, 50, 256), (1, 2, 9, 33, 300), (2, 2, 3, 200, 16), (3, 1, 41, 6, 7),
            (1, 2, 197, 193, 24),
        ]
    ),
    *(
        scaled_attention_case(f"values of {size}", (2, 2, 19, 37, d), value_size=size)
        for d, size in [(40, 1), (16, 256), (8, 33)]
    ),
    *(
        scaled_attention_case(f"{h} heads, {kv} of keys", (2, h, 19, 70, 24), kv_heads=kv)
        for h, kv in [(6, 2), (4, 1)]
    ),
    *(
        scaled_attention_case(name, shape, kv_heads=1, return_lse=True)
        for name, shape in [
            ("no keys", (2, 2, 5, 0, 8)), ("no queries", (2, 2, 0, 5, 8)), ("empty batch", (0, 2, 5, 7, 8)),
        ]
    ),
]  # fmt: skip

_STRUCTURE = [
    *(
        scaled_attention_case(f"causal {t}x{s}, {alignment}", (2, 2, t, s, 16), is_causal=True, return_lse=True,
                              causal_alignment=alignment)
        for t, s in [(70, 70), (33, 140), (140, 33)] for alignment in ALIGNMENTS
    ),
    *(
        scaled_attention_case(f"prefix {t}x{s}, {alignment}", (4, 2, t, s, 16), prefix_len=[0, 7, s, s // 2],
                              causal_alignment=alignment)
        for t, s in [(70, 70), (33, 140), (140, 33)] for alignment in ALIGNMENTS
    ),
    scaled_attention_case("query_lengths", (4, 2, 70, 33, 16), query_lengths=[0, 70, 7, 39], return_lse=True),
    scaled_attention_case("key_lengths", (4, 2, 33, 140, 16), key_lengths=[0, 140, 9, 65], return_lse=True),
    scaled_attention_case("key_start", (4, 2, 33, 140, 16), key_start=[0, 140, 131, 66], return_lse=True),
    scaled_attention_case("padding on both sides", (4, 2, 33, 140, 16), key_start=[0, 130, 60, 5],
                          key_lengths=[140, 120, 71, 70], query_lengths=[33, 30, 7, 0], return_lse=True),
    *(
        scaled_attention_case(f"window {window}", (2, 2, 70, 140, 16), window_size=window, return_lse=True)
        for window in [(3, -1), (-1, 2), (20, 7), (-1, -1), (1000, 1000)]
    ),
    # In float32 one key's share of a gradient is what rounding leaves of a difference.
    scaled_attention_case("window (0, 0)", (2, 2, 70, 140, 16), window_size=(0, 0), fixed=("query", "key")),
    scaled_attention_case("window, bottom right", (2, 2, 70, 140, 16), window_size=(30, 0), **_BOTTOM),
    scaled_attention_case("causal window", (2, 2, 140, 140, 16), window_size=(40, -1), is_causal=True),
    scaled_attention_case("causal, padding, bottom right", (3, 2, 70, 140, 16), **_CAUSAL_BOTTOM,
                          key_lengths=[140, 70, 40], query_lengths=[70, 30, 60], return_lse=True),
    scaled_attention_case("causal, left padding", (3, 2, 70, 70, 16), is_causal=True, key_start=[0, 3, 65],
                          return_lse=True),
    scaled_attention_case("prefix, window, padding", (3, 2, 70, 140, 16), prefix_len=[30, 0, 100],
                          window_size=(50, 60), key_lengths=[140, 90, 130], key_start=[5, 0, 20]),
]  # fmt: skip

_BIAS = [
    *(
        scaled_attention_case(f"{kind} mask {list(shape)}", (2, 3, 33, 70, 16), mask=kind, mask_shape=shape)
        for kind, shape in [
            ("bool", (2, 3, 33, 70)), ("bool", (2, 1, 1, 70)), ("bool", (33, 70)), ("bool", (2, 1, 33, 1)),
            ("float", (2, 3, 33, 70)), ("float", (33, 70)), ("float", (2, 1, 1, 70)), ("float", (70,)),
            ("-inf", (2, 3, 33, 70)), ("-inf", (3, 1, 70)),
        ]
    ),
    # One number for a whole row changes the lse alone.
    *(
        scaled_attention_case(f"{kind} mask {list(shape)}", (2, 3, 33, 70, 16), mask=kind, mask_shape=shape,
                              return_lse=True)
        for kind, shape in [("float", (1, 3, 33, 1)), ("float", (1, 1, 1, 1)), ("-inf", (2, 1, 33, 1))]
    ),
    *(
        scaled_attention_case(f"rows of nothing, {kind} mask", (2, 2, 33, 70, 16), mask=kind, return_lse=True,
                              change=changed(attn_mask=_rows_of_nothing))
        for kind in ("bool", "float")
    ),
    *(
        scaled_attention_case(f"relative bias {t}x{s}, {alignment}", (2, 3, t, s, 16), buckets=32, scale=1.0,
                              causal_alignment=alignment)
        for t, s in [(33, 140), (140, 33)] for alignment in ALIGNMENTS
    ),
    scaled_attention_case("relative bias, causal", (2, 3, 70, 70, 16), buckets=16, scale=1.0, bidirectional=False,
                          max_distance=40, is_causal=True),
    scaled_attention_case("relative bias, padding", (2, 3, 33, 70, 16), buckets=8, max_distance=20,
                          key_lengths=[60, 70], query_lengths=[33, 20]),
    scaled_attention_case("relative bias and mask", (2, 2, 33, 70, 16), buckets=8, mask="-inf", mask_shape=(33, 70)),
    *(
        scaled_attention_case(f"scale {scale}", (2, 2, 33, 70, 16), scale=scale) for scale in (1.0, 0.01, -0.25, 0.0)
    ),
    scaled_attention_case("query_scale [T]", (2, 2, 33, 70, 16), query_scale="T", is_causal=True),
    scaled_attention_case("query_scale [B, T]", (2, 2, 33, 70, 16), query_scale="BT", scale=0.5),
]  # fmt: skip

_ROTARY = [
    *(
        scaled_attention_case(f"rotary {r} of {d}, {interleaved=}", (2, 2, 33, 70, d), rotary=r,
                              interleaved=interleaved)
        for r, d in [(16, 16), (20, 40), (2, 7)] for interleaved in (True, False)
    ),
    scaled_attention_case("rotary, bottom right", (2, 4, 33, 70, 16), kv_heads=2, rotary=16, **_CAUSAL_BOTTOM),
    scaled_attention_case("rotary, bottom right, more queries", (2, 2, 70, 33, 16), rotary=16, **_CAUSAL_BOTTOM),
    scaled_attention_case("rotary, bottom right, padding", (3, 2, 33, 70, 16), rotary=8, **_BOTTOM,
                          key_lengths=[70, 50, 20], query_lengths=[33, 10, 30]),
    scaled_attention_case("rotary, positions", (2, 4, 33, 70, 16), kv_heads=1, rotary=8, positions=True),
    scaled_attention_case("rotary, one query", (2, 4, 1, 150, 64), kv_heads=2, rotary=64, interleaved=False,
                          **_CAUSAL_BOTTOM),
    scaled_attention_case("rotary, prefix, query_scale", (2, 2, 70, 70, 32), rotary=32, prefix_len=[20, 51],
                          query_scale="BT"),
]  # fmt: skip

_DROPOUT = [
    *(
        scaled_attention_case(f"dropout {p}", (2, 4, 33, 70, 16), kv_heads=2, dropout_p=p, dropout_seed=2**40 + 3,
                              return_lse=True)
        for p in (0.1, 0.9)
    ),
    scaled_attention_case("dropout, causal, bias", (2, 2, 70, 70, 16), dropout_p=0.5, dropout_seed=1, is_causal=True,
                          mask="float", mask_shape=(1, 2, 70, 70), buckets=8),
]  # fmt: skip

_VALUES = [
    scaled_attention_case("tokens before heads", (2, 4, 33, 70, 24), kv_heads=2, change=changed(
        query=tokens_before_heads, key=tokens_before_heads, value=tokens_before_heads)),
    scaled_attention_case("chunks", (2, 2, 33, 70, 24), change=changed(query=_chunk, key=_chunk, value=_chunk)),
    scaled_attention_case("transposed", (2, 2, 33, 70, 24), change=changed(
        query=_transposed, key=_transposed, value=_transposed)),
    scaled_attention_case("expanded", (2, 2, 33, 70, 24), return_lse=True, change=changed(
        query=_expanded, key=_expanded)),
    scaled_attention_case("large logits", (2, 2, 70, 70, 16), logits=20.0, return_lse=True),
    scaled_attention_case("one key takes all", (2, 2, 70, 70, 16), logits=1e4, return_lse=True,
                          fixed=("query", "key", "value")),
    scaled_attention_case("tiny logits", (2, 2, 33, 70, 16), logits=1e-3),
    scaled_attention_case("large values", (2, 2, 33, 70, 16), change=changed(value=lambda x: x * 1e3)),
    scaled_attention_case("small values", (2, 2, 33, 70, 16), change=changed(value=lambda x: x * 1e-3)),
]  # fmt: skip

_SEQUENCES = [
    scaled_attention_case("packed", (1, 2, 60, 101, 16), **PACKED, return_lse=True),
    scaled_attention_case("packed, rows outside", (1, 4, 67, 120, 16), kv_heads=2, **PACKED, return_lse=True),
    scaled_attention_case("packed, one sequence", (1, 2, 33, 70, 16), cu_seqlens_q=[0, 33], cu_seqlens_k=[0, 70]),
    scaled_attention_case("packed, nothing", (1, 2, 33, 70, 16), cu_seqlens_q=[0, 0], cu_seqlens_k=[0, 0],
                          return_lse=True),
    scaled_attention_case("packed, causal", (1, 2, 60, 101, 16), **PACKED, is_causal=True),
    scaled_attention_case("packed, causal, bottom right", (1, 2, 60, 101, 16), **PACKED, **_CAUSAL_BOTTOM,
                          return_lse=True),
    scaled_attention_case("packed, prefix", (1, 2, 60, 101, 16), **PACKED, prefix_len=[4, 3, 0, 60, 11]),
    scaled_attention_case("packed, window", (1, 2, 60, 101, 16), **PACKED, **_BOTTOM, window_size=(10, 3)),
    scaled_attention_case("packed, relative bias", (1, 2, 60, 101, 16), **PACKED, **_BOTTOM, buckets=8,
                          max_distance=30),
    scaled_attention_case("packed, rotary", (1, 4, 60, 101, 16), kv_heads=2, **PACKED, **_CAUSAL_BOTTOM, rotary=16),
    scaled_attention_case("packed, positions, query_scale", (1, 2, 60, 101, 16), **PACKED, rotary=8, positions=True,
                          query_scale="BT"),
    scaled_attention_case("packed, mask", (1, 2, 60, 101, 16), **PACKED, mask="-inf", mask_shape=(1, 2, 60, 101)),
    scaled_attention_case("packed, dropout", (1, 2, 60, 101, 16), **PACKED, dropout_p=0.3, dropout_seed=7,
                          is_causal=True),
]  # fmt: skip

CASES = [*_SIZES, *_STRUCTURE, *_BIAS, *_ROTARY, *_DROPOUT, *_VALUES, *_SEQUENCES]
