"""Compiles every kernel of tritonkernels without a GPU and reports what it uses, a line for a case and target.

Modules list their kernels' launches in `compile_cases(target)`. --json is what tests/test_triton_compile.py reads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("TRITON_INTERPRET is set: nothing would be compiled")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tritonkernels

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def modules() -> list:
    found = pkgutil.iter_modules(tritonkernels.__path__)
    return [importlib.import_module(f"tritonkernels.{module.name}") for module in found]


def undeclared(cases: list[dict]) -> list[str]:
    """Kernels of the package that no case compiles."""
    kernels = {
        f"{value.__module__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    return sorted(kernels - {f"{case['kernel'].__module__}.{case['kernel'].__name__}" for case in cases})


def source(case: dict) -> ASTSource:
    """What the launcher would compile: 1 becomes a constant, multiples of 16 and pointers are known to be aligned."""
    kernel = case["kernel"]
    signature, constants, attributes = {}, dict(case["constants"]), {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = case["integers"].get(name)
        if value == 1 and not parameter.do_not_specialize:
            constants[name] = value
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case["types"].get(name, "i32")
        if name.endswith("_ptr") or (value is not None and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def report(case: dict, target: int) -> dict:
    compiled = triton.compile(source(case), target=GPUTarget("cuda", target, 32), options=case["options"])
    used = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "kernel": case["kernel"].__name__,
        "label": case["label"],
        "main": case["main"],
        "target": target,
        "threads": 32 * compiled.metadata.num_warps,
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "matrix": [name for name in MATRIX_INSTRUCTIONS if name in ptx],
        "async_copies": ptx.count("cp.async.c"),
        "blocks": {k: v for k, v in case["constants"].items() if k.startswith("BLOCK")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS)
    parser.add_argument("--main", action="store_true", help="only the measured shape")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    declaring = [module for module in modules() if hasattr(module, "compile_cases")]
    for target in options.target or TARGETS:
        cases = [case for module in declaring for case in module.compile_cases(target)]
        if missing := undeclared(cases):
            sys.exit(f"no compile_cases() entry for {', '.join(missing)}")
        for case in cases:
            if case["main"] or not options.main:
                line = report(case, target)
                print(json.dumps(line) if options.json else "  ".join(f"{v}" for v in line.values()), flush=True)


if __name__ == "__main__":
    main()
