"""Every Triton kernel compiles for the supported architectures, within their limits; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_compile.py")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
WITHOUT_PRODUCTS = {"fourier_mixing_fold_kernel"} | {
    f"token_conv_{part}_kernel" for part in ("shared", "shared_dkernel", "shared_sum", "dynamic", "dynamic_dkernel")
}
WITHOUT_PRODUCTS |= {f"token_{part}_kernel" for part in ("statistics", "norm", "norm_bwd", "pack", "factor_bwd")}
WITHOUT_PRODUCTS |= {"affine_grad_sample_kernel", "linear_grad_norm_choose_kernel", "linear_grad_norm_row_kernel"}
WITHOUT_PRODUCTS |= {f"gradient_ratio_{part}kernel" for part in ("norm_", "", "bwd_")}
WITHOUT_PRODUCTS |= {f"importance_weight_{part}kernel" for part in ("", "merge_", "bwd_")}


@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_compile(target):
    # In a process of its own: the interpreter, once chosen, takes the place of the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, SCRIPT, "--json", "--target", str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(report["main"] for report in reports)
    for report in reports:
        assert report["shared"] <= SHARED_BYTES[target], report
        if report["main"]:
            assert report["spill_bytes"] == 0, report
            assert report["kernel"] in WITHOUT_PRODUCTS or MATRIX[target] in report["matrix"], report


def test_a_kernel_without_a_case_is_reported():
    code = "import triton_compile as t; print(*t.undeclared([]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, env=environment, capture_output=True, text=True, check=True
    )
    names = {name.rpartition(".")[2] for name in done.stdout.split()}
    declared = {f"fourier_mixing_{part}_kernel" for part in ("fold", "columns", "rows")}
    assert declared <= names
