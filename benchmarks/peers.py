"""Peers: other implementations of a case, imported if present and named as "not run" if not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.torchvision_ops import define_torchvision_ops


@functools.cache
def missing(package: str) -> str | None:
    """Why a package can't be imported, or None. A broken one is as good as none."""
    define_torchvision_ops()
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return f"{package} is not installed" if error.name == package else f"{package} can't be imported: {error}"
    except Exception as error:
        return f"{package} can't be imported: {error}"
    return None


def compiled(name: str, function: Callable[..., Tensor]) -> Provider:
    """torch.compile for static shapes; only with --full, since compiling takes long."""

    @functools.cache
    def compile_once() -> Callable[..., Tensor]:
        # Dynamo counts a function's graphs for all cases together, and beyond a few runs it uncompiled.
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return Provider(f"torch.compile({name})", lambda **inputs: compile_once()(**inputs), full_only=True)


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What users write where an op refuses bfloat16 and float16: up, compute, back down."""

    @functools.wraps(function)
    def call(x: Tensor, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            return function(x, *arguments, **keywords)
        return function(x.float(), *arguments, **keywords).to(x.dtype)

    return call
