"""What else computes scaled attention: SDPA with each backend, FlexAttention, the plain composition.

Peers take a parity case's flat arguments. What a model makes once for all layers and steps (a dense mask, a block mask,
a bias without a gradient) a peer makes in its first call, which is not timed; a bias with a gradient in every call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.peers import missing
from fastmix.reference import _attention as reference

_CPU_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_GPU_BACKENDS = _CPU_BACKENDS | {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def peers_of(dtype: torch.dtype, device: str, packed: bool, rotary: bool) -> tuple[Provider, ...]:
    """The peers of a case; on a CPU those that take long only with --full."""
    on_gpu = device == "cuda"
    peers = [Provider("SDPA", Sdpa())]
    for name, backend in (_GPU_BACKENDS if on_gpu else _CPU_BACKENDS).items():
        peers.append(Provider(f"SDPA, {name}", Sdpa(backend), full_only=not on_gpu))
    if dtype != torch.float32 and not on_gpu:
        peers.append(Provider("SDPA, float32", _in_float32(Sdpa())))
    if packed:
        peers.append(Provider("SDPA, a sequence at a time", sdpa_by_sequence))
    if rotary:
        peers.append(Provider("SDPA, transformers' rotary", Sdpa(rotate=_Llama()), missing("transformers")))
    peers.append(Provider("FlexAttention", Flex(), backward=on_gpu, full_only=True))
    peers.append(Provider("eager", Eager(), full_only=not on_gpu))
    return tuple(peers)


class _Once:
    """make(**inputs), made anew only for other inputs than last time: other tensors, or unequal values."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make, self.inputs, self.made = make, None, None

    def __call__(self, **inputs: Any) -> Any:
        if self.inputs is None or not self._are_last_times(inputs):
            self.inputs, self.made = inputs, self.make(**inputs)
        return self.made

    def _are_last_times(self, inputs: dict[str, Any]) -> bool:
        pairs = [(value, self.inputs.get(name)) for name, value in inputs.items()]
        return len(inputs) == len(self.inputs) and all(
            value is last if isinstance(value, Tensor) else value == last for value, last in pairs
        )


# Masks and biases


def allowed_pairs(
    sizes: tuple[int, int, int],
    device: torch.device | str = "cpu",
    prefix_len: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_start: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """bool [B, T, S] of sizes (B, T, S): who attends to whom; B = 1 if it is the same for all samples."""
    b, t, s = sizes
    if prefix_len is key_lengths is key_start is None:
        b = 1
    at = reference.places((b, t, s), None, key_lengths, cu_seqlens_q, cu_seqlens_k, False, torch.device(device))
    causal = is_causal or prefix_len is not None
    return reference.attended(at, prefix_len, None, key_lengths, key_start, causal, *window_size)


def _dense_mask(dtype: torch.dtype, **structure: Any) -> Tensor:
    """The float form, 0 or −inf: of a bool mask SDPA makes it in every call."""
    allowed = allowed_pairs(**structure)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _distances(t: int, s: int, device: torch.device) -> Tensor:
    return torch.arange(s, device=device) - torch.arange(t, device=device)[:, None]


def _buckets(t: int, s: int, device: torch.device, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    return reference.relative_buckets(_distances(t, s, device), buckets, bidirectional, max_distance)


def _dense_bias(bias_weight: Tensor, buckets: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, T, S], as transformers' T5 makes it."""
    return F.embedding(buckets, bias_weight).permute(2, 0, 1)[None].to(dtype).contiguous()


class _Bias:
    """A relative bias; made once if it has no gradient. buckets tells the buckets that `make` looks up."""

    def __init__(self, buckets: Callable[..., Tensor], make: Callable[..., Tensor]) -> None:
        self.buckets, self.make, self.made = _Once(buckets), make, _Once(make)

    def __call__(self, query, key, bias_weight, bidirectional=True, max_distance=128) -> Tensor:
        buckets = self.buckets(
            t=query.shape[2],
            s=key.shape[2],
            device=query.device,
            buckets=bias_weight.shape[0],
            bidirectional=bidirectional,
            max_distance=max_distance,
        )
        make = self.make if bias_weight.requires_grad else self.made
        return make(bias_weight=bias_weight, buckets=buckets, dtype=query.dtype)


# Peers


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    places = (torch.arange(x.shape[2], device=x.device)[None] for x in (query, key))
    return tuple(reference.rotate(x, cos, sin, at, interleaved) for x, at in zip((query, key), places, strict=True))


class _Llama:
    """The rotary embedding of transformers' Llama, whose tables have a column for every channel."""

    def __init__(self) -> None:
        self.cos, self.sin = _Once(self._widened), _Once(self._widened)

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        t = query.shape[2]
        if interleaved or key.shape[2] != t:
            raise ValueError("Llama rotates the channels i and i + R/2, queries and keys at the same positions")
        return apply_rotary_pos_emb(query, key, self.cos(table=cos, t=t), self.sin(table=sin, t=t))

    @staticmethod
    def _widened(table: Tensor, t: int) -> Tensor:
        return torch.cat([table, table], dim=-1)[None, :t]


class _Dense:
    """A peer that takes a dense mask; a causal one too if `causal_by_mask`, else as `is_causal`."""

    causal_by_mask = False

    def __init__(self, rotate: Callable[..., tuple[Tensor, ...]] = _rotated) -> None:
        self.rotate, self.mask, self.bias = rotate, _Once(_dense_mask), _Bias(_buckets, _dense_bias)
        self.sum = _Once(lambda bias, mask: bias + mask)

    def __call__(
        self, query, key, value, scale=None, query_scale=None, cos=None, sin=None, interleaved=True, is_causal=False,
        bias_weight=None, bidirectional=True, max_distance=128, **structure,
    ) -> Tensor:  # fmt: skip
        if query_scale is not None:
            query = query * query_scale[:, None]  # [T]
        if cos is not None:
            query, key = self.rotate(query, key, cos, sin, interleaved)
        mask = None
        if structure or (is_causal and (self.causal_by_mask or bias_weight is not None)):
            sizes = (query.shape[0], query.shape[2], key.shape[2])
            structure |= {"is_causal": is_causal, "sizes": sizes, "device": query.device}
            mask, is_causal = self.mask(dtype=query.dtype, **structure), False
        if bias_weight is not None:
            bias = self.bias(query, key, bias_weight, bidirectional, max_distance)
            mask = bias if mask is None else self.sum(bias=bias, mask=mask)
        return self.attend(query, key, value, mask, is_causal, scale)


class Sdpa(_Dense):
    """F.scaled_dot_product_attention by one backend, or by its own choice."""

    def __init__(self, backend: SDPBackend | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.backend = backend

    def attend(self, query, key, value, mask, is_causal, scale) -> Tensor:
        gqa = query.shape[1] != key.shape[1]
        with sdpa_kernel(self.backend) if self.backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)


class Eager(_Dense):
    """Products and softmax, as models wrote attention before SDPA."""

    causal_by_mask = True

    def attend(self, query, key, value, mask, is_causal, scale) -> Tensor:
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
        return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ value


def _in_float32(peer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What users write where a CPU's kernels are slow in bfloat16 and float16."""

    def call(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        return peer(query.float(), key.float(), value.float(), **others).to(query.dtype)

    return call


def sdpa_by_sequence(query, key, value, cu_seqlens_q, cu_seqlens_k, **others) -> Tensor:
    """Packed sequences without a mask."""
    lengths = [cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    pieces = query.split(lengths[0], dim=2), key.split(lengths[1], dim=2), value.split(lengths[1], dim=2)
    return torch.cat([F.scaled_dot_product_attention(*piece, **others) for piece in zip(*pieces, strict=True)], dim=2)


# FlexAttention


class Flex:
    """torch.compile(flex_attention) with the mask as a block mask and the bias as a table of distances."""

    def __init__(self) -> None:
        self.block_mask = _Once(_block_mask)
        self.bias = _Bias(
            _buckets_of_distances, lambda bias_weight, buckets, dtype: bias_weight.T[:, buckets].to(dtype)
        )

    def __call__(
        self, query, key, value, scale=None, query_scale=None, cos=None, sin=None, interleaved=True, bias_weight=None,
        bidirectional=True, max_distance=128, **structure,
    ) -> Tensor:  # fmt: skip
        if query_scale is not None:
            query = query * query_scale[:, None]  # [T]
        if cos is not None:
            query, key = _rotated(query, key, cos, sin, interleaved)
        mask, score = None, None
        if structure:
            sizes = (query.shape[0], query.shape[2], key.shape[2])
            mask = self.block_mask(sizes=sizes, device=query.device, **structure)
        if bias_weight is not None:
            score = _add_bias(self.bias(query, key, bias_weight, bidirectional, max_distance), query.shape[2] - 1)
        gqa = query.shape[1] != key.shape[1]
        return self.compiled(query, key, value, score, mask, scale, gqa)

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor]:
        # Dynamo counts a function's graphs for all cases together, and beyond a few runs it uncompiled.
        torch.compiler.reset()
        return torch.compile(flex_attention, dynamic=False)


def _buckets_of_distances(t: int, s: int, device: torch.device, **others: Any) -> Tensor:
    """[T + S − 1]"""
    return reference.relative_buckets(torch.arange(1 - t, s, device=device), others.pop("buckets"), **others)


def _add_bias(table: Tensor, zero: int) -> Callable[..., Tensor]:
    return lambda score, b, h, i, j: score + table[h, j - i + zero]


def _block_mask(
    sizes: tuple[int, int, int],
    device: torch.device,
    prefix_len: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_start: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
):
    """Of sequences packed alike in queries and keys, whose causal mask is the one of all rows."""
    masks = []
    if cu_seqlens_q is not None:
        at = reference.places((1, *sizes[1:]), None, None, cu_seqlens_q, cu_seqlens_k, False, device)
        rows, columns = at.row_sequence[0], at.column_sequence[0]
        masks.append(lambda b, h, i, j: rows[i] == columns[j])
    if is_causal:
        masks.append(lambda b, h, i, j: j <= i)
    if prefix_len is not None:
        masks.append(or_masks(lambda b, h, i, j: j <= i, lambda b, h, i, j: j < prefix_len[b]))
    if key_lengths is not None:
        masks.append(lambda b, h, i, j: j < key_lengths[b])
    if key_start is not None:
        masks.append(lambda b, h, i, j: j >= key_start[b])
    left, right = window_size
    if left >= 0:
        masks.append(lambda b, h, i, j: j >= i - left)
    if right >= 0:
        masks.append(lambda b, h, i, j: j <= i + right)
    of_samples = any(vector is not None for vector in (prefix_len, key_lengths, key_start))
    return create_block_mask(and_masks(*masks), sizes[0] if of_samples else None, None, *sizes[1:], device=device)
