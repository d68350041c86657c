"""The body of `fastmix doctor`: what is installed, and which implementation answers each op on each device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

import torch
from tabulate import tabulate

import fastmix
from fastmix import _library
from fastmix.ops import _route


@dataclass(frozen=True)
class Range:
    """Versions major.minor: tested ones with where they were tested, and the first and last that are meant to work."""

    tested: dict[str, str]
    first: str
    last: str


TESTED_VERSIONS = {
    "torch": Range(tested={"2.13": "on CPU"}, first="2.10", last="2.13"),
    "triton": Range(tested={"3.9": "in its interpreter"}, first="3.6", last="3.9"),
}


def main() -> int:
    print(report())
    return 0


def report() -> str:
    """All of it as text."""
    sections = [
        tabulate(_versions(), tablefmt="plain"),
        tabulate(answers(), headers=("op", "device", "answered by", "why"), tablefmt="simple"),
        *(f"warning: {text}" for text in warnings()),
    ]
    return "\n\n".join(sections)


def answers() -> list[tuple[str, str, str, str]]:
    """Rows (op, device type, what answers, why it is the reference or "")."""
    return [(op, device, *_answer(op, device)) for op in _route.kernels for device in ("cpu", "cuda")]


def warnings() -> list[str]:
    """What is installed in versions that nobody tried fastmix with."""
    found = []
    for name, versions in TESTED_VERSIONS.items():
        installed = _installed(name)
        if installed is None:
            continue
        version = _major_minor(installed)
        if version is None or not _major_minor(versions.first) <= version <= _major_minor(versions.last):
            found.append(
                f"{name} {installed} is outside {versions.first} to {versions.last}, the versions that fastmix is "
                "meant for; it may work, nobody tried"
            )
    return found


def _answer(op: str, device: str) -> tuple[str, str]:
    if device in _route.kernels[op]:
        return (f"C++ {_library.cpu_level}" if device == "cpu" else "CUDA"), ""
    if device == "cpu":
        return "reference", _library.missing_reason or "no CPU kernel of this op"
    return "reference", _why_no_cuda()


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not _library.cuda_loaded:
        return "CUDA kernels were not built (no nvcc at installation?)"
    return "no CUDA kernel of this op"


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("fastmix", fastmix.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("PyTorch", f"{torch.__version__}{_tested('torch')}"),
        ("Triton", f"{_installed('triton') or 'not installed'}{_tested('triton')}"),
        ("CUDA", torch.version.cuda or "PyTorch is built without CUDA"),
        ("GPU", _gpu()),
        ("compiled kernels", _build()),
        ("CPU capability", f"{torch.backends.cpu.get_cpu_capability()} (PyTorch's ATEN_CPU_CAPABILITY)"),
        ("CPU level", f"{_library.cpu_level or 'none'} chosen, {' '.join(_levels()) or 'none'} built"),
    ]
    if _library.missing_reason:
        rows.append(("no CPU kernels", _library.missing_reason))
    return rows


def _levels() -> list[str]:
    return sorted(path.stem.removeprefix("_cpu_") for path in _library._FOLDER.glob("_cpu_*.so"))


def _build() -> str:
    if importlib.util.find_spec("fastmix._C") is None:
        return "none"
    try:
        from fastmix import _C
    except ImportError as error:
        return f"can't be loaded: {error}"
    cuda = f"CUDA for {_C.cuda_archs}" if _C.cuda_archs else "no CUDA"
    compiler = f"GCC {_C.compiler}" if _C.compiler[0].isdigit() else _C.compiler  # only GCC leaves its name out
    return f"{compiler}, against PyTorch {_C.torch_version}, {cuda}"


def _gpu() -> str:
    """Asked of nvidia-smi, since asking PyTorch would initialise CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    lines = [line.split(", ") for line in result.stdout.splitlines() if line.count(", ") == 2]
    if result.returncode != 0 or not lines:
        return "nvidia-smi finds none"
    return "; ".join(f"{name}, compute capability {capability}, driver {driver}" for name, capability, driver in lines)


def _installed(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _tested(name: str) -> str:
    version, versions = _major_minor(_installed(name) or ""), TESTED_VERSIONS[name]
    if version is None:
        return ""
    for tested, where in versions.tested.items():
        if version == _major_minor(tested):
            return f" (tested {where})"
    inside = _major_minor(versions.first) <= version <= _major_minor(versions.last)
    return " (meant to work, not tested)" if inside else " (not tested)"


def _major_minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None
