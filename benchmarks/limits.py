"""What the machine itself can do, measured in the same run: the rate of a large copy and of a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """copy_gbps counts bytes read plus bytes written, product_gflops 2·n³ floating-point operations."""

    copy_gbps: float
    product_gflops: float

    def milliseconds(self, moved_bytes: int, flops: int) -> float:
        """The least time in which this machine moves so many bytes and does so many operations."""
        return 1e3 * max(moved_bytes / (self.copy_gbps * 1e9), flops / (self.product_gflops * 1e9))


def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that runs a call once and returns its milliseconds."""
    return _CudaTimer() if device == "cuda" else _time_on_cpu


def _time_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class _CudaTimer:
    """Times the work on the device. Clearing the L2 cache first also hides the host's launch time behind it."""

    def __init__(self) -> None:
        self.l2_cache = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.l2_cache.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def measure_limits(device: str, dtype: torch.dtype) -> Limits:
    """The best of several runs with the current number of threads; about half a second.

    On a GPU the product is of the case's dtype, float32 with TF32 allowed. On a CPU it is always float32: PyTorch's
    products in bfloat16 and float16 are far slower there on many machines, so they limit nothing.
    """
    on_gpu = device == "cuda"
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1536
    a = torch.ones(size, size, device=device, dtype=dtype if on_gpu else torch.float32)
    time_once = timer(device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        copy_ms = _best(time_once, lambda: target.copy_(source))
        product_ms = _best(time_once, lambda: a @ a)
    finally:
        torch.set_float32_matmul_precision(precision)
    return Limits(2 * source.nbytes / copy_ms / 1e6, 2 * size**3 / product_ms / 1e6)


def _best(time_once: Callable[[Callable[[], object]], float], call: Callable[[], object]) -> float:
    time_once(call)
    return min(time_once(call) for _ in range(5))
