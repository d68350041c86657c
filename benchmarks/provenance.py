"""Where a figure comes from: versions, device, git revision and a digest of the kernel's source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fastmix
from fastmix import _library

_PACKAGE = Path(fastmix.__file__).resolve().parent
_ROOT = _PACKAGE.parent
_PEERS = ("numpy", "triton", "transformers", "ducc0", "marisa-trie", "opacus", "backpack-for-pytorch", "torchjd")


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Name → version of everything a figure may depend on."""
    found = {"fastmix": fastmix.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {name: version for name in _PEERS if (version := version_of(name))}


def device_name(device: str) -> str:
    """ "cuda: NVIDIA H200", "cpu: AMD EPYC, 2 cores, avx512": the kind, then the model."""
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1)
    except (OSError, AttributeError):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}, {cores()} cores, {torch.backends.cpu.get_cpu_capability().lower()}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def revision() -> str:
    """The clone's git revision, with "+dirty" if tracked files are changed; "" outside a clone."""
    top = _git("rev-parse", "--show-toplevel")
    # A virtual environment inside some other project's clone is no clone of fastmix.
    if top is None or Path(top).resolve() != _ROOT:
        return ""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return (_git("rev-parse", "HEAD") or "") + ("+dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def source_digest(op: str, device: str) -> str:
    """sha256 over the op's sources that serve the device: "source:…" in a clone, else "library:…" of what was compiled.

    Sources are fastmix/ops/<op>.py, csrc/<device>/<op>* with all that these include, and tritonkernels/<op>.py for
    CUDA. Digests of different kinds can't be compared.
    """
    files = {_PACKAGE / "ops" / f"{op}.py"}
    if device == "cuda":
        files.add(_ROOT / "tritonkernels" / f"{op}.py")
    kernels = _ROOT / "csrc"
    if kernels.is_dir():
        kind = "source"
        for path in kernels.glob(f"{device}/{op}*"):
            files |= _with_includes(path, kernels)
    else:
        kind = "library"
        files.add(_PACKAGE / ("_cuda.so" if device == "cuda" else f"_cpu_{_library.cpu_level}.so"))
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{kind}:{digest.hexdigest()}"


def _with_includes(path: Path, root: Path) -> set[Path]:
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        found.add(path)
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, root):
                included = (folder / name).resolve()
                if included.is_file() and included not in found:
                    todo.append(included)
                    break
    return found
