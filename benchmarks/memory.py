"""Peak memory of one call beyond what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20


def on_gpu(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def in_child(module: str, index: int, provider: str, mode: str, threads: int) -> float | None:
    """Peak resident memory of a child process during the call, less that before it; None if it can't be measured.

    The child makes case `index` of the bench module anew. Children come from a server that has imported everything
    and computed nothing, so each starts in a fraction of a second with the same memory.
    """
    context = multiprocessing.get_context("forkserver")
    # The compiler too: importing it takes seconds, and every child of a torch.compile peer needs it.
    context.set_forkserver_preload([module, "torch._inductor.compile_fx"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, module, index, provider, mode, threads))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # the child died, of memory perhaps
        return None
    finally:
        child.join()


def _measure(sender, module: str, index: int, provider: str, mode: str, threads: int) -> None:
    from torch._inductor import config

    from fastmix.benchmarks.harness import draw_grad_output, prepare

    torch.set_num_threads(threads)
    config.compile_threads = 1  # the compiler's worker processes would each import PyTorch first
    bench = importlib.import_module(module).cases("cpu")[index]
    function = next(candidate.function for candidate in bench.providers if candidate.name == provider)
    inputs = bench.case.inputs(bench.dtype)
    call = prepare(function, bench.case, inputs, draw_grad_output(bench.case, inputs), mode)
    call()  # plans, matrices and buffers that stay for all calls are no part of the figure
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, which would else hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_mib("VmRSS")
    call()
    sender.send(_status_mib("VmHWM") - before)


def _status_mib(key: str) -> float:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1)) / 1024
