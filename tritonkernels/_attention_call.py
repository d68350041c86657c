"""A call of scaled attention as its kernels take it: options, strides, limits of the sequences, rotated copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tritonkernels._attention_prepare import (
    scaled_attention_bands_kernel,
    scaled_attention_limits_kernel,
    scaled_attention_rotate_kernel,
)
from tritonkernels._attention_tile import LOG2E
from tritonkernels._launch import launch, power_of_two, tf32

MAX_HEAD_SIZE = 256


class Options(NamedTuple):
    """What follows query, key and value in the op's list of arguments."""

    attn_mask: Tensor | None
    bias_table: Tensor | None
    query_scale: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    prefix_len: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    key_start: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    dropout_p: float
    causal: bool
    bottom_right: bool
    window_left: int
    window_right: int
    interleaved: bool


def by_channels(x: Tensor) -> Tensor:
    """x itself if the channels of a row lie side by side, else a copy for which they do."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


@dataclass(frozen=True)
class Call:
    query: Tensor  # [B, H, T, D]
    key: Tensor
    value: Tensor
    options: Options

    @property
    def packed(self) -> bool:
        return self.options.cu_seqlens_q is not None

    @property
    def half(self) -> bool:
        return self.query.dtype != torch.float32

    @cached_property
    def sequences(self) -> int:
        return self.options.cu_seqlens_q.shape[0] - 1 if self.packed else self.query.shape[0]

    @cached_property
    def head_blocks(self) -> tuple[int, int]:
        """Channels of a tile of queries and keys, and of one of values."""
        sizes = self.query.shape[3], self.value.shape[3]
        if max(sizes) > MAX_HEAD_SIZE:
            raise ValueError(
                f"query and value must have at most {MAX_HEAD_SIZE} channels, got {sizes[0]} and {sizes[1]}"
            )
        return tuple(power_of_two(size, 16, MAX_HEAD_SIZE) for size in sizes)

    @cached_property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @cached_property
    def limits(self) -> Tensor | None:
        """See `limits_of`; None where all sequences are whole and have no prefix."""
        o = self.options
        vectors = {name: getattr(o, name) for name in ("prefix_len", "query_lengths", "key_lengths", "key_start")}
        vectors |= {"cu_seqlens_q": o.cu_seqlens_q, "cu_seqlens_k": o.cu_seqlens_k}
        if all(vector is None for vector in vectors.values()):
            return None
        limits = torch.empty(self.sequences, 8, device=self.query.device, dtype=torch.int32)
        launch(
            scaled_attention_limits_kernel,
            self.sequences,
            {"num_warps": 1},
            **{f"{name}_ptr": None if vector is None else vector.contiguous() for name, vector in vectors.items()},
            limits_ptr=limits,
            T=self.query.shape[2],
            S=self.key.shape[2],
            BOTTOM_RIGHT=o.bottom_right,
        )
        return limits

    @cached_property
    def bias(self) -> dict[str, Tensor | None]:
        """The table of relative biases, and where it is constant."""
        table = self.options.bias_table
        if table is None or table.numel() == 0:
            return {"table_ptr": None, "bands_ptr": None}
        table = table.contiguous()
        heads, length = table.shape
        bands = torch.empty(heads, 2, device=table.device, dtype=torch.int32)
        block = power_of_two(length, 16, 1024)
        launch(
            scaled_attention_bands_kernel,
            heads,
            {"num_warps": 4},
            table_ptr=table,
            bands_ptr=bands,
            length=length,
            BLOCK=block,
        )
        return {"table_ptr": table, "bands_ptr": bands}

    def blocks(self, length: int, block: int) -> int:
        """Blocks of all sequences of a head, at most; see `locate`."""
        return length // block + self.sequences if self.packed else self.sequences * triton.cdiv(length, block)

    def strides(self, name: str, tensor: Tensor | None, dims: str) -> dict[str, int]:
        """`name_dim` for each dimension; sequences that are packed share the batch's first element."""
        strides = dict.fromkeys(dims.split(), 0)
        if tensor is not None:
            sizes = zip(dims.split(), tensor.shape, tensor.stride(), strict=False)
            strides |= {dim: stride if size > 1 else 0 for dim, size, stride in sizes}
        if self.packed:
            strides["batch"] = 0
        return {f"{name}_{dim}": stride for dim, stride in strides.items()}

    def tensor(self, name: str, tensor: Tensor | None, dims: str) -> dict[str, object]:
        return {f"{name}_ptr": tensor, **self.strides(name, tensor, dims)}

    @cached_property
    def structure(self) -> dict[str, object]:
        """Arguments that say which pairs are attended, and the tile-independent rest."""
        o, (_, heads, t, _), s = self.options, self.query.shape, self.key.shape[2]
        # A window that reaches beyond both ends is none; below that no sum of places leaves 32 bits.
        left, right = (size if 0 <= size < t + s else -1 for size in (o.window_left, o.window_right))
        return {
            "limits_ptr": self.limits,
            **self.tensor("mask", o.attn_mask, "batch head row column"),
            **self.bias,
            **self.tensor("query_scale", o.query_scale, "batch row"),
            "seed_ptr": o.dropout_seed if o.dropout_p > 0 else None,
            "scale": o.scale,
            "keep_scale": 1 / (1 - o.dropout_p),
            "drop_below": int(o.dropout_p * 2**32) - 2**31,
            "window_left": left,
            "window_right": right,
            "offset": s - t if o.bottom_right else 0,
            "zero": max((s if o.bottom_right else t) - 1, 0),
            "heads": heads,
            "group": self.group,
            "T": t,
            "S": s,
            "sequences": self.sequences,
            "CAUSAL": o.causal,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "PACKED": self.packed,
            "D": self.query.shape[3],
            "DV": self.value.shape[3],
            "PRECISION": tf32(self.query.dtype),
            "UNIT": LOG2E.value if self.half else 1.0,
        }

    @cached_property
    def rotary(self) -> dict[str, object]:
        """Tables of rotary embedding; without it no more than names."""
        o = self.options
        return {
            "cos_ptr": None if o.cos is None else o.cos.contiguous(),
            "sin_ptr": None if o.sin is None else o.sin.contiguous(),
            "table_rows": 0 if o.cos is None else o.cos.shape[0],
            "R": 0 if o.cos is None else 2 * o.cos.shape[1],
            "INTERLEAVED": o.interleaved,
        }

    def positions(self, name: str) -> dict[str, object]:
        return self.tensor(name, getattr(self.options, name), "batch row")

    def rotated(self, x: Tensor, positions: Tensor | None, column: int) -> Tensor:
        """Queries (column 0) or keys (1) with rotary embedding."""
        if self.options.cos is None:
            return x
        _, heads, length, d = x.shape
        out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        block_d = self.head_blocks[0]
        block = 4096 // block_d
        launch(
            scaled_attention_rotate_kernel,
            heads * self.blocks(length, block),
            {"num_warps": 4},
            **self.tensor("x", x, "batch head row"),
            rotated_ptr=out,
            rotated_batch=0 if self.packed else out.stride(0),
            limits_ptr=self.limits,
            **self.rotary,
            **self.tensor("positions", positions, "batch row"),
            heads=heads,
            length=length,
            sequences=self.sequences,
            offset=self.structure["offset"],
            COLUMN=column,
            PACKED=self.packed,
            D=d,
            BLOCK_M=block,
            BLOCK_D=block_d,
        )
        return out
