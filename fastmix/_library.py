"""Loads the compiled kernels: the CPU library of this machine's instruction level, and the CUDA library if built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent

# PyTorch's name of a capability → the levels that run on it, best first.
_LEVELS = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


def _load() -> tuple[str | None, bool, str | None]:
    """(instruction level of the CPU library or None, CUDA library loaded, why there is no CPU library)."""
    if importlib.util.find_spec("fastmix._C") is None:
        return None, False, "installed without compiled kernels (FASTMIX_NO_EXT=1, or no compiler at installation)"
    capability = torch.backends.cpu.get_cpu_capability()
    levels = _LEVELS.get(capability, ("default",))
    level = next((name for name in levels if (_FOLDER / f"_cpu_{name}.so").exists()), None)
    try:
        if level is not None:
            torch.ops.load_library(_FOLDER / f"_cpu_{level}.so")
        cuda = torch.version.cuda is not None and (_FOLDER / "_cuda.so").exists()
        if cuda:
            torch.ops.load_library(_FOLDER / "_cuda.so")
    except OSError as error:  # another PyTorch, or a broken installation: say so and let the reference answer
        return None, False, f"the compiled kernels could not be loaded: {error}"
    return level, cuda, None if level else f"no library for CPU capability {capability}"


cpu_level, cuda_loaded, missing_reason = _load()
has_triton = importlib.util.find_spec("triton") is not None  # imported when a kernel of it is called
triton_serves = has_triton and torch.version.cuda is not None
