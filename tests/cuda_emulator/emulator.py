"""The CUDA kernels of csrc/cuda, compiled with g++ and run on NumPy arrays; and what they must give, in float64.

Run as a program, it compares a few cases; the tests do that under the address sanitizer.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastmix.reference import fft_mixing as reference
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered", "-shared", "-fPIC"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# Shared memory of a block and of a multiprocessor, in bytes.
H200 = (232448, 233472)
A100 = (166912, 167936)
# numpy types that carry the dtypes; bf16 lies in uint16.
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


def build(sanitize: bool = False, source: str = "emulator.cpp") -> Path:
    """Compiles the library of one source file here, unless one of the same sources is there."""
    sources = sorted([*HERE.rglob("*.h"), HERE / source, *ROOT.glob("csrc/c*/*.h"), *ROOT.glob("csrc/cuda/*.cuh")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library = ROOT / "build" / "cuda_emulator" / f"{'sanitized_' if sanitize else ''}{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        flags = [*FLAGS, *(["-O0", *SANITIZE] if sanitize else ["-O1"])]
        includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run(
            [compiler(), *flags, *includes, str(HERE / source), "-o", str(partial)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the CUDA kernels do not compile with g++:\n{done.stderr[-4000:]}")
        partial.rename(library)
    return library


def compiler() -> str | None:
    return shutil.which("g++")


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values in the storage type; bf16 truncated."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(STORAGE[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def pointer(array: np.ndarray | None):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def nan_floats(size: int) -> np.ndarray:
    return np.full(size, np.nan, np.float32)


class Emulator:
    """The launchers. `order`: a block's threads run ascending (0), descending (1) or shuffled between two barriers."""

    def __init__(self, library: Path, limits: tuple[int, int] = H200):
        self.library = ctypes.CDLL(str(library))
        self.limits = limits
        for name in ("fourier_workspace", "filter_workspace_floats", "filter_bwd_workspace_floats"):
            getattr(self.library, name).restype = ctypes.c_int64

    def sizes(self, *values: int) -> list[ctypes.c_int64]:
        return [ctypes.c_int64(value) for value in values]

    def call(self, name: str, dtype: str, order: int, *arguments) -> None:
        self.library.set_order(order)
        status = getattr(self.library, name)(list(STORAGE).index(dtype), *arguments, *self.limits)
        assert status == 0, f"{name} failed"

    def fourier_mixing(self, x, dtype="float32", lengths=None, exponent=0.0, group=None, order=0):
        b, s, h = x.shape
        with_lengths = lengths is not None
        lengths = np.asarray(lengths, np.int64) if with_lengths else None
        work = nan_floats(self.library.fourier_workspace(*self.sizes(s, h), with_lengths) * (group or b))
        y = np.frombuffer(b"\xff" * x.nbytes, x.dtype).reshape(x.shape).copy()
        arguments = [*self.sizes(b, s, h), pointer(work), *self.sizes(work.size), pointer(y)]
        self.call("fourier_mixing", dtype, order, pointer(x), pointer(lengths), ctypes.c_float(exponent), *arguments)
        return y

    def global_filter(self, x, weight, dtype="float32", conjugate=False, group=None, order=0):
        b, h, w, c = x.shape
        work = nan_floats(self.library.filter_workspace_floats(*self.sizes(h, w, c, group or b)))
        y = np.frombuffer(b"\xff" * x.nbytes, x.dtype).reshape(x.shape).copy()
        arguments = [*self.sizes(b, h, w, c), pointer(work), *self.sizes(work.size), pointer(y)]
        self.call("global_filter", dtype, order, pointer(x), pointer(weight), int(conjugate), *arguments)
        return y

    def global_filter_bwd(self, dy, x, weight, dtype="float32", group=None, order=0):
        b, h, w, c = x.shape
        work = nan_floats(self.library.filter_bwd_workspace_floats(*self.sizes(b, h, w, c, group or b)))
        dx = np.frombuffer(b"\xff" * x.nbytes, x.dtype).reshape(x.shape).copy()
        dw = np.full_like(weight, np.nan)
        arguments = [*self.sizes(b, h, w, c), pointer(work), *self.sizes(work.size), pointer(dx), pointer(dw)]
        self.call("global_filter_bwd", dtype, order, pointer(dy), pointer(x), pointer(weight), *arguments)
        return dx, dw

    # The ops of csrc/cuda/fft_mixing.cu on CPU tensors.

    def fourier_mixing_out(self, x, lengths, exponent, workspace, out):
        if x.numel() == 0:
            return
        arguments = [*self.sizes(*x.shape), *workspace_of(workspace), tensor_pointer(out)]
        lengths = None if lengths is None else tensor_pointer(lengths)
        name = str(x.dtype).removeprefix("torch.")
        self.call("fourier_mixing", name, 0, tensor_pointer(x), lengths, ctypes.c_float(exponent), *arguments)

    def global_filter_out(self, x, weight, conjugate, workspace, out):
        if x.numel() == 0:
            return
        arguments = [*self.sizes(*x.shape), *workspace_of(workspace), tensor_pointer(out)]
        inputs = tensor_pointer(x), tensor_pointer(weight), int(conjugate)
        self.call("global_filter", str(x.dtype).removeprefix("torch."), 0, *inputs, *arguments)

    def global_filter_bwd_out(self, grad_output, x, weight, workspace, dx, dw):
        if x.numel() == 0:
            dw.zero_()
            return
        arguments = [*self.sizes(*x.shape), *workspace_of(workspace), tensor_pointer(dx), tensor_pointer(dw)]
        inputs = map(tensor_pointer, (grad_output, x, weight))
        self.call("global_filter_bwd", str(x.dtype).removeprefix("torch."), 0, *inputs, *arguments)


def tensor_pointer(tensor: torch.Tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def workspace_of(tensor: torch.Tensor) -> list:
    assert tensor.dtype == torch.float32
    assert tensor.ndim == 1
    return [tensor_pointer(tensor), ctypes.c_int64(tensor.numel())]


class Expected(NamedTuple):
    """What the kernels must give: the reference in float64, the oracle, and in float32."""

    oracle: np.ndarray
    reference: np.ndarray

    def part(self, index) -> "Expected":
        return Expected(self.oracle[index], self.reference[index])


def _expected(function, *arrays: np.ndarray) -> Expected:
    tensors = [torch.from_numpy(array) for array in arrays]
    return Expected(*(function(*(t.to(kind) for t in tensors)).numpy() for kind in (torch.float64, torch.float32)))


def expected_fourier(x: np.ndarray, lengths=None, exponent=0.0) -> Expected:
    norm = {0.0: "backward", 0.5: "ortho", 1.0: "forward"}[exponent]
    lengths = None if lengths is None else torch.tensor(lengths)
    return _expected(lambda x: reference.fourier_mixing(x, norm=norm, lengths=lengths), x)


def expected_filter(x: np.ndarray, weight: np.ndarray) -> Expected:
    """weight [h, w/2 + 1, C, 2]."""
    return _expected(reference.global_filter, x, weight)


def expected_filter_bwd(dy: np.ndarray, x: np.ndarray, weight: np.ndarray) -> list[Expected]:
    """Of x and of weight."""

    def gradient(index):
        return lambda dy, x, weight: torch.func.vjp(reference.global_filter, x, weight)[1](dy)[index]

    return [_expected(gradient(index), dy, x, weight) for index in range(2)]


def assert_close(actual: np.ndarray, expected: Expected, dtype: str = "float32", factor: int = FORWARD_FACTOR) -> None:
    """The package's tolerance rule."""
    rounded = getattr(torch, dtype)
    arrays = (actual, expected.reference, expected.oracle)
    actual, plain, oracle = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    check_parity("emulated", actual.to(rounded), plain.to(rounded), oracle, factor=factor)


def main() -> None:
    emulator = Emulator(build(sanitize=True))
    generator = np.random.default_rng(0)
    for s, h in [(1, 1), (5, 6), (17, 4), (48, 35), (6, 97)]:
        x = generator.normal(size=(2, s, h)).astype(np.float32)
        lengths = [s, s // 2]
        assert_close(emulator.fourier_mixing(x), expected_fourier(x))
        assert_close(emulator.fourier_mixing(x, lengths=lengths, order=5), expected_fourier(x, lengths))
    for h, w, c in [(1, 1, 1), (14, 14, 3), (17, 3, 5), (5, 6, 33)]:
        x, dy = generator.normal(size=(2, 3, h, w, c)).astype(np.float32)
        weight = generator.normal(size=(h, w // 2 + 1, c, 2)).astype(np.float32)
        assert_close(emulator.global_filter(x, weight), expected_filter(x, weight))
        dx, dw = emulator.global_filter_bwd(dy, x, weight, group=2)
        expected_dx, expected_dw = expected_filter_bwd(dy, x, weight)
        assert_close(dx, expected_dx, factor=GRADIENT_FACTOR)
        assert_close(dw, expected_dw, factor=GRADIENT_FACTOR)
    print("sanitized: ok")


if __name__ == "__main__":
    sys.exit(main())
