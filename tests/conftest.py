"""What every test runs under, and what several test files share."""

from __future__ import annotations

import os
import tempfile

# Read by OpenMP as PyTorch is imported: on a loaded machine spinning threads stall in steps of 16 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor's cache does not know this variable: it would run code of another instruction level, with wrong results.
if level := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{level}"))

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmix import _library
from fastmix.benchmarks.torchvision_ops import define_torchvision_ops
from fastmix.ops import _route

EXAMPLES = Path(__file__).parents[1] / "examples"


def pytest_configure(config):
    # Uninitialised memory becomes NaN, also what C++ allocates: an element that nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    define_torchvision_ops()


def pytest_report_header(config):
    kernels = f"kernels: CPU {_library.cpu_level or 'none'}, CUDA {'yes' if _library.cuda_loaded else 'no'}"
    return f"fastmix: torch {torch.__version__}, {kernels} {_library.missing_reason or ''}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack trace where there is no GPU: 2 ms
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def ordinary_memory():
    """Without the filling, which costs as much as the work: for what is large or is measured."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastmix":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded():
    """`with recorded() as ops:` lists the fastmix ops that are called inside, by name."""

    @contextlib.contextmanager
    def record():
        with _Recorder() as recorder:
            yield recorder.names

    return record


@pytest.fixture
def assert_kernel():
    """assert_kernel(ops, "op", dtype): the kernel was called if the dtype has one, and not otherwise."""

    def check(ops: list[str], op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        if device == "cpu" and _library.missing_reason is not None:
            assert ops == []
            return
        assert device in _route.kernels[op], f"fastmix::{op} has no {device} kernel in this build"
        assert (op in ops) == (dtype in _route.KERNEL_DTYPES)

    return check


@pytest.fixture
def needs_kernels():
    if _library.missing_reason is not None:
        pytest.skip(f"no compiled kernels: {_library.missing_reason}")


@pytest.fixture
def needs_cuda_kernels():
    if not _library.cuda_loaded:
        assert os.environ.get("FASTMIX_CUDA") != "1", "the CUDA kernels were asked for and are not there"
        pytest.skip("built without CUDA kernels")


@pytest.fixture(scope="session")
def example():
    """`with example("name", "package", …) as module:` an example as a module; the packages are what it needs."""

    @contextlib.contextmanager
    def load(name: str, *needed: str) -> Iterator[ModuleType]:
        if not EXAMPLES.is_dir():
            pytest.skip("the examples are not installed, only cloned")
        for package in needed:
            pytest.importorskip(package)
        sys.path.append(str(EXAMPLES))  # as where a script is run, for what two of them share
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.path.pop()
        yield module
        del sys.modules[name]

    return load


@pytest.fixture
def threads_kept():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def global_flags(monkeypatch):
    """opacus sets one of PyTorch's, which `opcheck`, in another test of this process, has forbidden for good."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
