"""Launches of the kernels. On the meta device a launch is only noted, for the test that compiles it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTERS |= {torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64"}
_noted: list[dict[str, object]] = []


def launch(kernel: triton.JITFunction, programs: int, options: dict[str, int], **arguments: object) -> None:
    """kernel[(programs,)](**arguments, **options) on the device of its tensors; options: num_warps, num_stages."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        _noted.append(_as_compile_case(kernel, options, arguments))
    elif programs > 0:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options)


def noted_launches(label: str, main: bool, function: Callable[..., object], *arguments: object) -> list[dict]:
    """What function(*arguments), whose tensors are on the meta device, would launch, for tests/triton_compile.py."""
    _noted.clear()
    function(*arguments)
    return [case | {"label": label, "main": main} for case in _noted]


def _as_compile_case(kernel, options: dict[str, int], arguments: dict[str, object]) -> dict[str, object]:
    types, integers, constants = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            integers[name] = value
    return {"kernel": kernel, "types": types, "integers": integers, "constants": constants, "options": options}


def rows(tensor: Tensor) -> Tensor:
    """The tensor [B, S, C] itself if its channels lie side by side, else a copy for which they do."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of values whose size only float32's exponents hold: a hidden layer, a gradient."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def tf32(dtype: torch.dtype) -> str:
    """How float32 operands that stem from an x of this dtype multiply: TF32 has as many bits as float16."""
    allowed = dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """A block for `size` rows or columns."""
    return min(largest, max(smallest, triton.next_power_of_2(size)))
