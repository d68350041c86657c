"""Launchers of scaled attention: kernels in _attention_fwd.py, _attention_bwd.py, _attention_bias_bwd.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tritonkernels._attention_bias_bwd import scaled_attention_dbias_kernel
from tritonkernels._attention_bwd import scaled_attention_dkv_kernel, scaled_attention_dq_kernel
from tritonkernels._attention_call import Call, Options, by_channels
from tritonkernels._attention_fwd import scaled_attention_combine_kernel, scaled_attention_fwd_kernel
from tritonkernels._launch import launch, noted_launches, power_of_two, wide

_FEW_QUERIES = 16  # up to which the queries of a group's heads are the rows of one program
_PROGRAMS = 264  # two for each multiprocessor of an H200


class Tiles(NamedTuple):
    """Queries and keys of a tile, and what the compiler is told."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def forward_tiles(rows: int, size: int, half: bool, table: bool) -> Tiles:
    """By the shape alone; size: the larger of D and Dv, as a power of two. Chosen for few spills, measured nowhere."""
    if not half:
        # Three TF32 products of parts in registers.
        tiles = Tiles(64 if size <= 64 else 32, 32, 4, 2)
    elif size <= 128:
        # The offsets into a table of biases take as many registers as the scores.
        tiles = Tiles(128, 32 if table and size > 64 else 64, 8, 2)
    else:
        tiles = Tiles(64, 64, 8, 2)
    block_m = power_of_two(rows, 16, tiles.block_m)
    return tiles if block_m == tiles.block_m else Tiles(block_m, tiles.block_n, 4, tiles.num_stages)


def splits_of_keys(programs: int, keys: int, block_n: int) -> tuple[int, int]:
    """(splits, keys of one): as many as fill the GPU, of 256 keys at least."""
    blocks = triton.cdiv(keys, block_n)
    wanted = min(triton.cdiv(_PROGRAMS, max(programs, 1)), triton.cdiv(keys, 256), 64)
    split_blocks = triton.cdiv(blocks, max(wanted, 1))
    return max(triton.cdiv(blocks, max(split_blocks, 1)), 1), max(split_blocks, 1) * block_n


def empty_heads(like: Tensor, b: int, h: int, t: int, d: int, clear: bool) -> Tensor:
    """[B, H, T, D] whose heads of a token lie side by side; cleared where no program may write."""
    make = torch.zeros if clear else torch.empty
    return make(b, t, h, d, device=like.device, dtype=like.dtype).transpose(1, 2)


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, Dv], log-sum-exp [B, H, T] and for float32 what that rounds off; options: see `Options`."""
    call = Call(by_channels(query), by_channels(key), by_channels(value), Options(*options))
    (b, heads, t, _), s, dv = query.shape, key.shape[2], value.shape[3]
    output = empty_heads(query, b, heads, t, dv, call.packed)
    lse = torch.empty(b, heads, t, device=query.device, dtype=torch.float32)
    lse_rest = torch.empty(0 if call.half else lse.shape, device=query.device, dtype=torch.float32)
    if call.packed:
        lse.fill_(float("-inf"))
        lse_rest.zero_()
    if lse.numel() == 0:
        return output, lse, lse_rest
    grouped = t <= _FEW_QUERIES and not call.packed
    block_d, block_v = call.head_blocks
    rows = call.group * t if grouped else triton.cdiv(t, call.sequences if call.packed else 1)
    with_table = call.options.bias_table is not None
    tiles = forward_tiles(rows, max(block_d, block_v), call.half, with_table)
    if grouped:
        programs = b * (heads // call.group) * triton.cdiv(rows, tiles.block_m)
        splits, split_keys = splits_of_keys(programs, s, tiles.block_n)
    else:
        programs, splits, split_keys = heads * call.blocks(t, tiles.block_m), 1, s
    parts, statistics = output, lse
    if splits > 1:
        parts = torch.empty(splits, b, t, heads, dv, device=query.device, dtype=torch.float32)
        statistics = torch.empty(splits, 2, b, heads, t, device=query.device, dtype=torch.float32)
    keys = call.key if grouped else call.rotated(call.key, call.options.key_positions, 1)
    launch(
        scaled_attention_fwd_kernel,
        programs * splits,
        tiles.options,
        **call.tensor("q", call.query, "batch head row"),
        **call.tensor("k", keys, "batch head row"),
        **call.tensor("v", call.value, "batch head row"),
        out_ptr=parts,
        out_batch=0 if call.packed else t * heads * dv,
        lse_ptr=statistics,
        lse_rest_ptr=None if call.half else lse_rest,
        lse_batch=0 if call.packed else heads * t,
        **call.structure,
        **call.rotary,
        **call.positions("query_positions"),
        **call.positions("key_positions"),
        splits=splits,
        split_keys=split_keys,
        GROUPED=grouped,
        SPLIT=splits > 1,
        ROTATE_KEYS=grouped and call.options.cos is not None,
        EDGE_STAGES=1 if with_table else tiles.num_stages,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
    )
    if splits > 1:
        launch(
            scaled_attention_combine_kernel,
            lse.numel(),
            {"num_warps": 1},
            parts_ptr=parts,
            statistics_ptr=statistics,
            out_ptr=output,
            lse_ptr=lse,
            lse_rest_ptr=None if call.half else lse_rest,
            keep_scale=call.structure["keep_scale"],
            heads=heads,
            T=t,
            splits=splits,
            count=lse.numel(),
            UNIT=call.structure["UNIT"],
            DV=dv,
            BLOCK_V=block_v,
        )
    return output, lse, lse_rest


def backward_tiles(size: int, half: bool) -> tuple[Tiles, Tiles]:
    """Tiles of the kernel of dq, and of that of dk and dv; see `forward_tiles`."""
    if not half:
        return Tiles(64 if size <= 64 else 32, 32, 8, 1), Tiles(32, 32, 8, 1)
    if size <= 64:
        return Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)
    if size <= 128:
        return Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2)
    return Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)


def scaled_attention_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias_table: Tensor | None,
    query_scale: Tensor | None,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and those of attn_mask, bias_table and query_scale, of no elements unless asked for.

    `others` are the rest of `Options` and, for each of the last three, whether it is asked for.
    """
    *options, mask_grad, bias_grad, query_scale_grad = others
    call = Call(
        by_channels(query),
        by_channels(key),
        by_channels(value),
        Options(attn_mask, bias_table, query_scale, *options),
    )
    (b, heads, t, d), (kv_heads, s), dv = query.shape, key.shape[1:3], value.shape[3]
    dq = empty_heads(query, b, heads, t, d, call.packed)
    dk = empty_heads(key, b, kv_heads, s, d, call.packed)
    dv_ = empty_heads(value, b, kv_heads, s, dv, call.packed)
    delta = torch.empty(b, heads, t, device=query.device, dtype=torch.float32)
    by_head = torch.zeros_like(delta) if query_scale_grad else None
    rotated = Call(
        call.rotated(call.query, call.options.query_positions, 0),
        call.rotated(call.key, call.options.key_positions, 1),
        call.value,
        call.options,
    )
    block_d, block_v = call.head_blocks
    by_queries, by_keys = backward_tiles(max(block_d, block_v), call.half)
    shared = {
        **call.tensor("q", rotated.query, "batch head row"),
        **call.tensor("k", rotated.key, "batch head row"),
        **call.tensor("v", call.value, "batch head row"),
        **call.tensor("do", by_channels(grad_output), "batch head row"),
        "lse_ptr": lse,
        "lse_rest_ptr": None if call.half else lse_rest,
        "delta_ptr": delta,
        "lse_batch": 0 if call.packed else heads * t,
        **call.structure,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
    }
    rotary = {**call.rotary, "WIDE": wide(query.dtype) == torch.float32}
    if dq.numel() > 0:
        launch(
            scaled_attention_dq_kernel,
            heads * call.blocks(t, by_queries.block_m),
            by_queries.options,
            **shared,
            **rotary,
            **call.positions("query_positions"),
            **call.tensor("out", by_channels(output), "batch head row"),
            dlse_ptr=None if grad_lse is None else grad_lse.contiguous(),
            dq_ptr=dq,
            dq_batch=0 if call.packed else t * heads * d,
            dquery_scale_ptr=by_head,
            EDGE_STAGES=1 if bias_table is not None else by_queries.num_stages,
            BLOCK_M=by_queries.block_m,
            BLOCK_N=by_queries.block_n,
        )
    if dk.numel() > 0:
        launch(
            scaled_attention_dkv_kernel,
            kv_heads * call.blocks(s, by_keys.block_n),
            by_keys.options,
            **shared,
            **rotary,
            **call.positions("key_positions"),
            dk_ptr=dk,
            dv_ptr=dv_,
            dk_batch=0 if call.packed else s * kv_heads * d,
            dv_batch=0 if call.packed else s * kv_heads * dv,
            EDGE_STAGES=1 if bias_table is not None else by_keys.num_stages,
            BLOCK_M=by_keys.block_m,
            BLOCK_N=by_keys.block_n,
        )
    none = query.new_empty(0)
    dmask = _mask_gradient(call, shared) if mask_grad else none
    dbias = _table_gradient(call, shared) if bias_grad else none
    return dq, dk, dv_, dmask, dbias, by_head.sum(1) if query_scale_grad else none


def _add_bias_tiles(
    shared: dict[str, object], half: bool, shape: tuple[int, ...], programs: int, num_tiles: int, block: int, **own: int
) -> Tensor:
    """A float32 tensor of `shape`, which `programs` fill that each add num_tiles tiles."""
    splits = max(1, min(triton.cdiv(_PROGRAMS, programs), num_tiles, 64))
    split_tiles = triton.cdiv(num_tiles, splits)
    splits = triton.cdiv(num_tiles, split_tiles)
    parts = torch.empty(splits, *shape, device=shared["lse_ptr"].device, dtype=torch.float32)
    launch(
        scaled_attention_dbias_kernel,
        programs * splits,
        {"num_warps": 4 if half else 8, "num_stages": 1},
        **{name: value for name, value in shared.items() if name != "bands_ptr"},
        dbias_ptr=parts,
        **own,
        splits=splits,
        split_tiles=split_tiles,
        num_tiles=num_tiles,
        BLOCK=block,
    )
    return parts[0] if splits == 1 else parts.sum(0)


_BIAS_BLOCK = 64


def _mask_gradient(call: Call, shared: dict[str, object]) -> Tensor:
    mask = call.options.attn_mask
    (batch, bias_heads, rows, columns), (_, heads, t, _), s = mask.shape, call.query.shape, call.key.shape[2]
    if 0 in (call.query.numel(), s):
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    block = _BIAS_BLOCK if call.half else _BIAS_BLOCK // 2
    programs = batch * bias_heads * triton.cdiv(rows, block) * triton.cdiv(columns, block)
    tiles = (1 if rows == t else triton.cdiv(t, block)) * (1 if columns == s else triton.cdiv(s, block))
    tiles *= (1 if bias_heads == heads else heads) * (1 if batch == call.sequences else call.sequences)
    own = {"bias_batches": batch, "bias_heads": bias_heads, "bias_rows": rows, "bias_columns": columns}
    own |= {"diagonals": 1, "first_diagonal": 0, "DIAGONAL": False, "ONE_ROW": rows == 1, "ONE_COLUMN": columns == 1}
    return _add_bias_tiles(shared, call.half, mask.shape, programs, tiles, block, **own).to(mask.dtype)


def _table_gradient(call: Call, shared: dict[str, object]) -> Tensor:
    table = call.options.bias_table
    (heads, length), t, s, zero = table.shape, call.query.shape[2], call.key.shape[2], call.structure["zero"]
    if 0 in (call.query.numel(), s):
        return torch.zeros_like(table, memory_format=torch.contiguous_format)
    block = _BIAS_BLOCK if call.half else _BIAS_BLOCK // 2
    # Distances −zero … length − zero − 1 lie on these diagonals of tiles and the next.
    first, last = -triton.cdiv(zero, block), (length - zero - 1) // block + 1
    diagonals = last - first + 1
    own = {"bias_batches": 1, "bias_heads": heads, "bias_rows": t, "bias_columns": s}
    own |= {"diagonals": diagonals, "first_diagonal": first, "DIAGONAL": True, "ONE_ROW": False, "ONE_COLUMN": False}
    shape, tiles = (heads, diagonals, 2 * block), call.sequences * triton.cdiv(t, block)
    sums = _add_bias_tiles(shared, call.half, shape, heads * diagonals, tiles, block, **own)
    sums = (sums[:, :-1, block:] + sums[:, 1:, :block]).flatten(1)
    return sums[:, -zero - first * block :][:, :length].contiguous()


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative calls, for tests/triton_compile.py; `main` are prefix masks at head size 64."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    def launches(label, shape, dtype, backward=True, **given):
        b, heads, kv_heads, t, s, d = shape
        q, k = meta(b, heads, t, d, dtype=dtype), meta(b, kv_heads, s, d, dtype=dtype)
        numbers = {"scale": d**-0.5, "dropout_p": 0.0, "window_left": -1, "window_right": -1}
        flags = dict.fromkeys(("causal", "bottom_right", "interleaved"), False)
        options = Options(**{**dict.fromkeys(Options._fields), **numbers, **flags, **given})
        label = f"{label} {str(dtype).removeprefix('torch.')}"
        cases = noted_launches(label, label.startswith("prefix"), scaled_attention, q, k, k, *options)
        if backward:
            grads = [x is not None and x.is_floating_point() for x in options[:3]]
            out = meta(b, t, heads, d, dtype=dtype).transpose(1, 2)
            lse, lse_rest = meta(b, heads, t), meta(b, heads, t)
            arguments = (out, None, q, k, k, *options[:3], out, lse, lse_rest, *options[3:], *grads)
            cases += noted_launches(label, label.startswith("prefix"), scaled_attention_bwd, *arguments)
        return cases

    bf16, n = torch.bfloat16, 1024
    integers = meta(4, dtype=torch.int32)
    angles = {"cos": meta(n, 32), "sin": meta(n, 32)}
    cases = [
        *launches("prefix", (4, 12, 12, n, n, 64), bf16, causal=True, prefix_len=integers),
        *launches("t5, rotary", (4, 8, 2, n, n, 64), bf16, causal=True, bias_table=meta(8, 2 * n - 1), **angles),
        *launches("decode", (4, 32, 8, 1, n, 128), bf16, False, causal=True, bottom_right=True, key_lengths=integers),
    ]
    if target == 90:
        seed = {"dropout_p": 0.1, "dropout_seed": meta(1, dtype=torch.int64)}
        packed = {"cu_seqlens_q": integers, "cu_seqlens_k": integers, "attn_mask": meta(1, 8, n, n), **seed}
        cases += launches("packed, mask, dropout", (1, 8, 8, n, n, 64), torch.float32, **packed)
        cases += launches("window", (4, 8, 8, n, n, 64), torch.float16, window_left=256, query_scale=meta(4, n))
    else:  # each kernel once
        cases = list({case["kernel"].__name__: case for case in reversed(cases)}.values())
    # Those of one small tile each have no product.
    products = ("fwd", "dq", "dkv", "dbias")
    return [case | {"main": case["main"] and case["kernel"].__name__.split("_")[2] in products} for case in cases]
