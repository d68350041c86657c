"""The CUDA kernels of the FFT ops without a GPU: tests/cuda_emulator runs their source on the CPU, thread by thread."""

import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmix.ops import fft_mixing as ops
from fastmix.testing.cases import check_case
from fastmix.testing.fft_mixing import CASES
from fastmix.testing.parity import GRADIENT_FACTOR

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
import emulator as cuda

pytestmark = pytest.mark.skipif(cuda.compiler() is None, reason="needs g++")

# Every radix, one and several passes, odd and even, Bluestein (17, 127, 197, 769).
SHAPES = [(1, 1), (1, 2), (2, 1), (1, 7), (9, 1), (2, 3), (3, 2), (5, 4), (4, 5), (16, 16), (17, 5), (5, 17), (7, 11)]
SHAPES += [
    (13, 26),
    (64, 7),
    (100, 8),
    (127, 6),
    (6, 127),
    (121, 22),
    (197, 10),
    (512, 6),
    (6, 768),
    (33, 100),
    (769, 4),
]
LONG = [(2048, 3), (3, 2048), (2039, 2), (8192, 2), (8191, 1), (2, 8190), (1, 8191)]
IMAGES = [(1, 1), (1, 4), (4, 1), (7, 7), (14, 14), (5, 6), (16, 9), (13, 11)]
SOURCE = "csrc/cuda/fft_mixing.cu"
OFF_CHIP = [(17, 3), (4, 19), (65, 64)]


@pytest.fixture(scope="module")
def library():
    return cuda.build()


@pytest.fixture(scope="module")
def emulator(library):
    return cuda.Emulator(library)


@pytest.fixture
def generator(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.mark.parametrize(("s", "h"), SHAPES + LONG)
def test_fourier_mixing(emulator, generator, s, h):
    x = generator.normal(size=(2, s, h)).astype(np.float32)
    first = emulator.fourier_mixing(x)
    cuda.assert_close(first, cuda.expected_fourier(x))
    # Threads between barriers in another order: the same bits, or a barrier is missing.
    for order in (1, 7):
        np.testing.assert_array_equal(emulator.fourier_mixing(x, order=order), first)


@pytest.mark.parametrize("limits", [cuda.H200, cuda.A100])
@pytest.mark.parametrize("n", [4096, 5005, 8161, 8190, 8192])
def test_fourier_mixing_fits_the_smallest_shared_memory(library, generator, limits, n):
    emulator = cuda.Emulator(library, limits)
    for shape in [(1, n, 5), (1, 5, n)]:
        x = generator.normal(size=shape).astype(np.float32)
        cuda.assert_close(emulator.fourier_mixing(x), cuda.expected_fourier(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("s", "h"), [(1, 5), (16, 8), (17, 6), (6, 15), (40, 34)])
def test_fourier_mixing_half_precision(emulator, generator, dtype, s, h):
    x = cuda.encode(generator.normal(size=(2, s, h)), dtype)
    y = emulator.fourier_mixing(x, dtype, exponent=0.5)
    cuda.assert_close(cuda.decode(y, dtype), cuda.expected_fourier(cuda.decode(x, dtype), exponent=0.5), dtype)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("s", "h"), [(1, 3), (16, 4), (40, 6), (131, 3)])
def test_fourier_mixing_lengths(emulator, generator, exponent, s, h):
    lengths = [s, 0, 1, s // 2, max(s - 1, 0), min(s, 17), min(s, 37), min(s, 127)]
    x = generator.normal(size=(len(lengths), s, h)).astype(np.float32)
    for sample, n in zip(x, lengths, strict=True):
        sample[n:] = np.nan
    y = emulator.fourier_mixing(x, lengths=lengths, exponent=exponent, group=3)
    expected = cuda.expected_fourier(x, lengths, exponent)
    for i, n in enumerate(lengths):
        assert (y[i, n:] == 0).all()
        if n > 0:
            cuda.assert_close(y[i, :n], expected.part((i, slice(n))))
    for order in (1, 7):
        np.testing.assert_array_equal(
            emulator.fourier_mixing(x, lengths=lengths, exponent=exponent, group=3, order=order), y
        )


@pytest.mark.parametrize("length", [-1, 5])
def test_fourier_mixing_asserts_on_lengths_out_of_range(length):
    call = f"cuda.Emulator(cuda.build()).fourier_mixing(np.zeros((1, 4, 2), np.float32), lengths=[{length}])"
    program = [sys.executable, "-c", f"import emulator as cuda; import numpy as np; {call}"]
    done = subprocess.run(program, cwd=Path(cuda.__file__).parent, capture_output=True)
    assert done.returncode == -signal.SIGABRT


def test_fourier_mixing_samples_stay_apart(emulator, generator):
    x = generator.normal(size=(3, 12, 8)).astype(np.float32)
    x[1, 5, 5] = np.nan
    y = emulator.fourier_mixing(x, group=2)
    assert np.isnan(y[1]).all()
    cuda.assert_close(y[[0, 2]], cuda.expected_fourier(x[[0, 2]]))


@pytest.mark.parametrize("channels", [1, 3, 33])
@pytest.mark.parametrize(("h", "w"), IMAGES + OFF_CHIP)
def test_global_filter(emulator, generator, h, w, channels):
    if h * w > 1000:
        channels = min(channels, 3)
    x, dy = generator.normal(size=(2, 3, h, w, channels)).astype(np.float32)
    # Nothing Hermitian about the edge columns.
    weight = generator.normal(size=(h, w // 2 + 1, channels, 2)).astype(np.float32)
    expected_dx, expected_dw = cuda.expected_filter_bwd(dy, x, weight)
    results = []
    for order in (0, 1, 7):
        y = emulator.global_filter(x, weight, group=2, order=order)
        dx, dw = emulator.global_filter_bwd(dy, x, weight, group=2, order=order)
        cuda.assert_close(y, cuda.expected_filter(x, weight))
        cuda.assert_close(dx, expected_dx, factor=GRADIENT_FACTOR)
        cuda.assert_close(dw, expected_dw, factor=GRADIENT_FACTOR)
        results.append((y, dx, dw))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("h", "w"), [(5, 6), (17, 3)])
def test_global_filter_half_precision(emulator, generator, dtype, h, w):
    x, dy = (cuda.encode(generator.normal(size=(2, h, w, 5)), dtype) for _ in range(2))
    weight = generator.normal(size=(h, w // 2 + 1, 5, 2)).astype(np.float32)
    y = emulator.global_filter(x, weight, dtype)
    dx, dw = emulator.global_filter_bwd(dy, x, weight, dtype)
    x, dy = cuda.decode(x, dtype), cuda.decode(dy, dtype)
    expected_dx, expected_dw = cuda.expected_filter_bwd(dy, x, weight)
    cuda.assert_close(cuda.decode(y, dtype), cuda.expected_filter(x, weight), dtype)
    cuda.assert_close(cuda.decode(dx, dtype), expected_dx, dtype, factor=GRADIENT_FACTOR)
    cuda.assert_close(dw, expected_dw, factor=GRADIENT_FACTOR)


def test_a_batch_in_parts_sums_every_image(emulator, generator):
    # 512 channels make 32 blocks, so at most 16 parts; 19 images do not divide evenly.
    x, dy = generator.normal(size=(2, 19, 2, 3, 512)).astype(np.float32)
    weight = generator.normal(size=(2, 2, 512, 2)).astype(np.float32)
    _, dw = emulator.global_filter_bwd(dy, x, weight)
    _, expected = cuda.expected_filter_bwd(dy, x, weight)
    cuda.assert_close(dw, expected, factor=GRADIENT_FACTOR)


# What Python does around the kernels: workspaces, dtypes, strides. The `_out` ops are registered for the CPU here.


@pytest.fixture(scope="module")
def emulated_ops(library):
    emulator = cuda.Emulator(library)
    schemas = re.findall(r'"(\w+_out\(.*?-> \(\))"', re.sub(r'"\s*"', "", cuda.ROOT.joinpath(SOURCE).read_text()))
    registration = torch.library.Library("fastmix", "FRAGMENT")
    for schema in schemas:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.fastmix, name):
            registration.define(schema)
        registration.impl(name, getattr(emulator, name), "CPU")
    yield {"fourier_mixing": _EmulatedFourierMixing.apply, "global_filter": _EmulatedGlobalFilter.apply}
    registration._destroy()


class _EmulatedFourierMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, lengths):
        ctx.others = lengths, ops._EXPONENTS[norm]
        return ops._fourier_mixing_cuda(x, *ctx.others)

    @staticmethod
    def backward(ctx, grad_output):
        return ops._fourier_mixing_cuda(grad_output, *ctx.others), None, None


class _EmulatedGlobalFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return ops._global_filter_cuda(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        return ops._global_filter_bwd_cuda(grad_output, *ctx.saved_tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, emulated_ops, monkeypatch):
    monkeypatch.setattr(ops, "choose", lambda *shape: "cuda")
    function = emulated_ops[case.function.__name__]

    def call(x, norm="backward", lengths=None, weight=None):
        if weight is None:
            return function(x, norm, lengths)
        return function(x, (torch.view_as_real(weight) if weight.is_complex() else weight).float())

    check_case(case, dtype, function=call)


def test_no_access_out_of_bounds():
    """The same source under the address and undefined-behaviour sanitizers."""
    cuda.build(sanitize=True)
    names = ["libasan.so", "libubsan.so"]
    paths = [
        subprocess.check_output([cuda.compiler(), f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    environment = {**os.environ, "LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    program = [sys.executable, str(Path(cuda.__file__))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sanitized: ok" in done.stdout
