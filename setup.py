"""Builds the compiled parts: one CPU library per instruction level, the CUDA library, and the pybind11 module.

Environment: FASTMIX_NO_EXT=1 (pure Python), FASTMIX_CUDA=0/1 (override the detection), TORCH_CUDA_ARCH_LIST, MAX_JOBS,
CXXFLAGS (an -O or -g there replaces -O3, -g0), FASTMIX_CPU_LEVELS="default avx2" (only these instruction levels).
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

if os.environ.get("FASTMIX_NO_EXT") != "1":
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "fastmix is compiled against the PyTorch that is installed, and this build environment has none.\n"
            "Build beside the installed one:       pip install --no-build-isolation fastmix\n"
            "  (with torch, setuptools, wheel, pybind11 and ninja installed)\n"
            "or install without compiled kernels:  FASTMIX_NO_EXT=1 pip install fastmix"
        )

ENVIRONMENT_FLAGS = os.environ.get("CXXFLAGS", "").split()
OPTIMIZE = [flag for flag in ("-O3", "-g0") if not any(other.startswith(flag[:2]) for other in ENVIRONMENT_FLAGS)]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # PyTorch 2.10 and later
CXX_FLAGS = [
    "-std=c++17",
    *OPTIMIZE,
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    *STABLE_ABI,
]
# Level → flags. PyTorch's own capability decides at run time which one is loaded.
CPU_LEVELS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_LEVELS["avx512"] = ["-march=x86-64-v4"]
if "FASTMIX_CPU_LEVELS" in os.environ:
    CPU_LEVELS = {level: CPU_LEVELS[level] for level in os.environ["FASTMIX_CPU_LEVELS"].split()}


def say(text: str) -> None:
    print(f"fastmix: {text}", file=sys.stderr)


def sources(folder: str, suffix: str) -> list[str]:
    """The largest first: the one that takes longest to compile must not be the last to start."""
    paths = sorted(Path("csrc", folder).glob(f"*{suffix}"), key=lambda path: path.stat().st_size, reverse=True)
    return [str(path) for path in paths]


def headers() -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh"))


def with_cuda() -> bool:
    """CUDA is built beside a CUDA PyTorch with a CUDA compiler; whether a GPU is visible does not matter."""
    if "FASTMIX_CUDA" in os.environ:
        return os.environ["FASTMIX_CUDA"] == "1"
    return torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None


def extensions() -> list:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        say(f"no C++ compiler ({compiler}): installing pure Python; the reference will answer every op")
        return []
    from pybind11.setup_helpers import Pybind11Extension

    built = []
    for level, flags in CPU_LEVELS.items():
        say(f"CPU kernels, level {level}: {' '.join(flags) or 'baseline'}")
        built.append(
            cpp_extension.CppExtension(
                f"fastmix._cpu_{level}",
                sources("cpu", ".cpp"),
                include_dirs=[os.path.abspath("csrc")],
                depends=headers(),
                extra_compile_args=[*CXX_FLAGS, *flags],
            )
        )
    if with_cuda():
        # 12.8 is the first toolkit that knows sm_100.
        newest = tuple(int(part) for part in torch.version.cuda.split(".")) >= (12, 8)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if newest else "8.0;9.0+PTX")
        say(f"CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}")
        built.append(
            cpp_extension.CUDAExtension(
                "fastmix._cuda",
                sources("cuda", ".cu"),
                include_dirs=[os.path.abspath("csrc")],
                depends=headers(),
                extra_compile_args={
                    "cxx": CXX_FLAGS,
                    "nvcc": ["-std=c++17", "-O3", "-DUSE_CUDA", *STABLE_ABI],
                },
            )
        )
    else:
        say("no CUDA kernels (they need a CUDA build of PyTorch and nvcc; FASTMIX_CUDA=1 insists)")
    version = {}
    exec(Path("fastmix/_version.py").read_text(), version)
    built.append(
        Pybind11Extension(
            "fastmix._C",
            ["csrc/module.cpp", *sources("trie", ".cpp")],
            include_dirs=[os.path.abspath("csrc")],
            depends=headers(),
            cxx_std=17,
            extra_compile_args=[*OPTIMIZE, "-pthread"],
            extra_link_args=["-pthread"],
            define_macros=[
                ("FASTMIX_TORCH_VERSION", f'"{torch.__version__}"'),
                ("FASTMIX_CPU_LEVELS", '"{}"'.format(" ".join(CPU_LEVELS))),
                ("FASTMIX_CUDA_ARCHS", '"{}"'.format(os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda() else "")),
            ],
        )
    )
    return built


def commands() -> dict:
    class BuildExtension(cpp_extension.BuildExtension):
        """One object folder per extension: the same sources are built once per instruction level.

        It is the same for an editable installation, whose own is a temporary one, and for a wheel, so that each
        compiles only what has changed.
        """

        def build_extension(self, ext):
            build = self.get_finalized_command("build")
            self.build_temp = os.path.join(build.build_base, "objects", ext.name)
            super().build_extension(ext)

        def get_ext_filename(self, ext_name):
            # The op libraries are no Python modules: torch loads them by path.
            if ext_name.rpartition(".")[2].startswith(("_cpu", "_cuda")):
                return os.path.join(*ext_name.split(".")) + ".so"
            return super().get_ext_filename(ext_name)

    return {"build_ext": BuildExtension}


if os.environ.get("FASTMIX_NO_EXT") == "1":
    say("FASTMIX_NO_EXT=1: pure Python; the reference will answer every op")
    setup()
else:
    setup(ext_modules=extensions(), cmdclass=commands())
