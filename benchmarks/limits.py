"""What the machine itself can do, measured in the same run: the rates of a copy, a matrix product and an exp."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """copy_gbps counts bytes read plus bytes written, product_gflops 2·n³ floating-point operations.

    exp_gops counts exponentials of float32 in the cache; None on a GPU, which computes them beside its products.
    """

    copy_gbps: float
    product_gflops: float
    exp_gops: float | None = None

    def milliseconds(self, moved_bytes: int, flops: int, exps: int = 0) -> float:
        """The least time in which this machine moves so many bytes and does so many operations and exponentials."""
        computing = flops / self.product_gflops + (exps / self.exp_gops if self.exp_gops else 0)
        return 1e-6 * max(moved_bytes / self.copy_gbps, computing)


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
    exp_gops = None if on_gpu else _exp_gops(time_once)
    return Limits(2 * source.nbytes / copy_ms / 1e6, 2 * size**3 / product_ms / 1e6, exp_gops)


def _exp_gops(time_once: Callable[[Callable[[], object]], float]) -> float:
    """Of numbers that stay in the cache, many times over, since one pass is too short to time."""
    x, passes = torch.linspace(-4, 4, 1 << 17), 32
    y = torch.empty_like(x)

    def repeat():
        for _ in range(passes):
            torch.exp(x, out=y)

    return passes * x.numel() / _best(time_once, repeat) / 1e6


def _best(time_once: Callable[[Callable[[], object]], float], call: Callable[[], object]) -> float:
    time_once(call)
    return min(time_once(call) for _ in range(5))
