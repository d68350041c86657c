"""The command line, as users call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastmix import _library, cli, doctor
from fastmix.testing import fft_mixing, run


def call(*arguments, code=None, **environment):
    command = [sys.executable, *(["-c", code] if code else ["-m", "fastmix"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["bench", "fft_mixin"], "unknown op 'fft_mixin'; the ops are fft_mixing"),
        (["parity", "nothing"], "unknown op 'nothing'; the ops are fft_mixing"),
        (["bench", "--threads", "0"], "must be a positive number, got '0'"),
        (["parity", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastmix", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device():
    result = call("parity", "--device", "cuda")
    assert result.returncode == 2
    assert "PyTorch sees no CUDA device here" in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_are_imported_when_called():
    lazy = "{'fastmix.benchmarks', 'fastmix.doctor', 'fastmix.testing.cases', 'matplotlib', 'transformers'}"
    result = call(code=f"import sys, fastmix.cli; print({lazy} & set(sys.modules))")
    assert result.stdout.strip() == "set()"


# Replaces the op's cases by one, also in the process that `bench` starts anew.
SMALL_BENCH = """
import sys
from fastmix import cli
from fastmix.benchmarks import bench_fft_mixing as bench, run
bench.cases = lambda device: [bench._fourier_mixing((2, 16, 12), bench.torch.float32, 'cpu')]
bench.models = lambda device, full: []
run.QUICK_BUDGET_S = 0.001
sys.exit(cli.main())
"""


def test_bench(tmp_path):
    file, folder = tmp_path / "records.json", tmp_path / "report"
    arguments = ["bench", "fft_mixing", "--device", "cpu", "--threads", "1", "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, "-c", SMALL_BENCH, *arguments, "--report", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "fourier_mixing 2x16x12" in result.stdout
    document = json.loads(file.read_text())
    assert document["wait_policy"] == "PASSIVE"
    assert {record["threads"] for record in document["records"]} == {1}
    assert (folder / "report.md").read_text().startswith("# fastmix benchmarks")


def test_parity(monkeypatch, capsys):
    cases = [case for case in fft_mixing.CASES if case.name in ("fourier_mixing 7x5", "global_filter 3x5x17")]
    monkeypatch.setattr(run, "load_cases", lambda op: cases)
    assert run.main(["fft_mixing"], "cpu") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:4] for line in lines[2:]] == [
        [function, dtype, "1"]
        for dtype in ("float32", "bfloat16", "float16", "float64")
        for function in ("fourier_mixing", "global_filter")
    ]
    assert all(line[-1] == "ok" for line in lines[2:])


def test_parity_failure(monkeypatch, capsys):
    case = fft_mixing.fourier_mixing_case("7x5", (2, 7, 5))
    object.__setattr__(case, "function", lambda **inputs: 1.001 * case.reference(**inputs))
    monkeypatch.setattr(run, "load_cases", lambda op: [case])
    assert run.main(["fft_mixing"], "cpu") == 1
    captured = capsys.readouterr()
    assert "1 FAILED" in captured.out
    assert "FAILED: fft_mixing, float32: AssertionError: fourier_mixing 7x5, output" in captured.err


def test_doctor():
    result = call("doctor")
    assert result.returncode == 0
    assert f"{torch.__version__}" in result.stdout
    rows = {
        tuple(line.split()[:2]): line for line in result.stdout.splitlines() if line.split()[1:2] in (["cpu"], ["cuda"])
    }
    expected = "reference" if _library.missing_reason else f"C++ {_library.cpu_level}"
    assert expected in rows["fourier_mixing", "cpu"]
    if torch.version.cuda is None:
        assert "PyTorch is built without CUDA" in rows["fourier_mixing", "cuda"]


def test_doctor_says_why_the_reference_answers(monkeypatch):
    monkeypatch.setattr(doctor._route, "kernels", {"op": frozenset()})
    monkeypatch.setattr(doctor._library, "missing_reason", "no compiler")
    monkeypatch.setattr(doctor._library, "cuda_loaded", False)
    assert ("op", "cpu", "reference", "no compiler") in doctor.answers()
    for version, available, reason in [
        (None, False, "PyTorch is built without CUDA"),
        ("13.0", False, "no CUDA device"),
        ("13.0", True, "CUDA kernels were not built (no nvcc at installation?)"),
    ]:
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert ("op", "cuda", "reference", reason) in doctor.answers()
    monkeypatch.setattr(doctor._library, "cuda_loaded", True)
    assert ("op", "cuda", "reference", "no CUDA kernel of this op") in doctor.answers()


@pytest.mark.parametrize(
    ("version", "text", "warned"),
    [
        ("2.13.1+cpu", " (tested on CPU)", False),
        ("2.11.0", " (meant to work, not tested)", False),
        ("2.9.1", " (not tested)", True),
        ("3.0.0a0", " (not tested)", True),
    ],
)
def test_doctor_warns_beyond_the_tested_versions(monkeypatch, version, text, warned):
    monkeypatch.setattr(doctor, "_installed", lambda name: version if name == "torch" else None)
    assert doctor._tested("torch") == text
    assert doctor._tested("triton") == ""
    assert len(doctor.warnings()) == warned
    doctor.report()


@pytest.mark.parametrize("gone", ["nvidia-smi", "fastmix._C"])
def test_doctor_on_an_odd_machine(monkeypatch, gone):
    """nvidia-smi that talks nonsense; no compiled module."""
    if gone == "nvidia-smi":
        monkeypatch.setattr(doctor.shutil, "which", lambda name: sys.executable)
        assert doctor._gpu() == "nvidia-smi finds none"
    else:
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
        assert ("compiled kernels", "none") in doctor._versions()
    assert "fourier_mixing" in doctor.report()
