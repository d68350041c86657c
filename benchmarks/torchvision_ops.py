"""Lets timm and transformers be imported beside a torchvision whose C++ operators were built for another PyTorch."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache
def define_torchvision_ops() -> torch.library.Library | None:
    """Defines, without kernels, the operators that importing torchvision takes for given, if its library can't.

    Where that library does not load (one for CUDA beside PyTorch for CPUs), torchvision registers fakes of operators
    that nobody defined, and its import fails; timm needs it, and transformers imports it where it is installed.

    Returns:
        The definitions, which last as long as this object: the cache keeps it. None if there is nothing to define.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)  # as torchvision does; a second time it changes nothing
        except OSError:
            continue
        return None
    definitions = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        definitions.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return definitions
