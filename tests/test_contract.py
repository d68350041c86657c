"""The house rules that a machine can check: who imports whom, names, docstrings, files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastmix

ROOT = Path(__file__).parent.parent
OPS = {"scaled_attention", "token_mixing", "external_attention", "token_conv", "fft_mixing", "beam_search"}
OPS |= {"grad_norm", "conv_grad_norm", "affine_grad_norm", "embedding_grad_norm", "gradient_ratio"}
OPS |= {"importance_weighted_log_prob"}
METHODS = ("nn", "per_sample", "generation", "losses")  # the folders that stand on the public ops
SOURCES = ("csrc", "fastmix", "tritonkernels", "benchmarks", "tests", "examples")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not run in a clone")


def _files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    return [path for path in found if "__pycache__" not in path.parts]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, inside a function) of everything that a file imports, `from a import b` as a.b."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{_name(path)}: relative import"
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return walk(ast.parse(path.read_text()), False)


def _is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _foreign(path: Path, *allowed: str, also_inside: tuple[str, ...] = ()) -> list[str]:
    """What a file imports beyond the standard library and `allowed`."""
    return [
        f"{_name(path)}: {name}"
        for name, inside in _imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not _is_in(name, *allowed)
        and not (inside and _is_in(name, *also_inside))
    ]


def _all(check, paths) -> list[str]:
    return [found for path in paths for found in check(path)]


# Who may import whom


def test_rule_1_the_reference_imports_torch_only():
    assert _all(lambda path: _foreign(path, "torch", "fastmix.reference"), _files("fastmix/reference")) == []


def test_rule_2_triton_kernels_never_import_fastmix():
    assert _all(lambda path: _foreign(path, "torch", "triton", "tritonkernels"), _files("tritonkernels")) == []


def test_rule_3_ops_import_the_reference_and_triton_kernels_inside_functions():
    allowed = ("torch", "fastmix.ops", "fastmix.reference", "fastmix._library")
    paths = _files("fastmix/ops")
    assert paths
    assert _all(lambda path: _foreign(path, *allowed, also_inside=("tritonkernels",)), paths) == []


def test_rule_4_methods_import_public_ops():
    def check(path: Path) -> list[str]:
        own = f"fastmix.{path.relative_to(ROOT / 'fastmix').parts[0]}"
        public = [f"fastmix.{name}" for name in fastmix.__all__]
        index = ("fastmix.reference._trie", "fastmix._C")  # the reader and the builder of the trie's bytes
        weights = "fastmix.reference.scaled_attention"  # attention weights, which no kernel forms
        found = _foreign(path, "torch", "numpy", "tqdm", "fastmix.ops", own, *public, *index, weights)
        private = [name for name, _ in _imports(path) if _is_in(name, "fastmix.ops") and "._" in name]
        return found + [f"{_name(path)}: {name}" for name in private if not _is_in(name, "fastmix.ops._check")]

    assert _all(check, _files(*(f"fastmix/{folder}" for folder in METHODS))) == []


def test_rule_4_integrations_stand_on_the_rest():
    def check(path: Path) -> list[str]:
        allowed = ("ops", "integrations", *METHODS, *fastmix.__all__)
        names = [name for name, _ in _imports(path) if _is_in(name, "fastmix")]
        return [
            f"{_name(path)}: {name}"
            for name in names
            if not _is_in(name, *(f"fastmix.{part}" for part in allowed)) or _is_in(name, "fastmix.ops._route")
        ]

    assert _all(check, _files("fastmix/integrations")) == []


def test_rule_4_nothing_imports_integrations_but_the_cli():
    def check(path: Path) -> list[str]:
        return [f"{_name(path)}: {name}" for name, _ in _imports(path) if _is_in(name, "fastmix.integrations")]

    inside = ROOT / "fastmix" / "integrations"
    others = [
        path for path in _files("fastmix", "tritonkernels") if inside not in path.parents and path.name != "cli.py"
    ]
    assert _all(check, others) == []


def test_rule_5_csrc_includes_common_and_the_stable_abi():
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    wrong = []
    for path in _files("csrc", suffixes=(".cpp", ".cu", ".h", ".cuh")):
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for bracket, header in re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            if bracket == '"':
                fine = header.split("/")[0] in ("common", "trie" if folder == "module.cpp" else folder)
            else:
                of_torch = header.startswith(("torch/", "ATen/", "c10/", "caffe2/"))
                fine = not of_torch or (header.startswith(stable) and folder in ("cpu", "cuda", "common"))
                fine = fine and (not header.startswith("pybind11/") or folder in ("trie", "module.cpp"))
            if not fine:
                wrong.append(f"{_name(path)}: {header}")
    assert wrong == []


def test_rule_6_nothing_imports_tests_and_only_the_cli_imports_benchmarks():
    def check(path: Path) -> list[str]:
        return [
            f"{_name(path)}: {name}"
            for name, inside in _imports(path)
            if _is_in(name, "tests")
            or (_is_in(name, "benchmarks", "fastmix.benchmarks") and not (path.name == "cli.py" and inside))
        ]

    assert _all(check, _files("fastmix", "tritonkernels")) == []
    of_tests = [f"{_name(p)}: {name}" for p in _files("benchmarks") for name, _ in _imports(p) if _is_in(name, "tests")]
    assert of_tests == []


# Names and places


def test_an_op_has_one_name_in_every_folder():
    def stems(folder: str, suffix: str, prefix: str = "") -> set[str]:
        paths = (ROOT / folder).glob(f"{prefix}*{suffix}")
        return {path.stem.removeprefix(prefix) for path in paths if not path.stem.startswith("_")}

    ops = stems("fastmix/ops", ".py")
    assert ops
    assert ops <= OPS
    assert stems("fastmix/reference", ".py") == ops
    assert ops <= stems("fastmix/testing", ".py")
    for kernels in (stems("csrc/cpu", ".cpp"), stems("csrc/cuda", ".cu"), stems("tritonkernels", ".py")):
        assert kernels <= ops
    assert stems("benchmarks", ".py", "bench_") <= ops
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert ops <= tests


def test_the_package_lists_its_folders_and_no_other_top_level_name():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} == {"fastmix", "tritonkernels"}
    folders = {_name(path.parent).replace("/", ".") for path in _files("fastmix", "tritonkernels")}
    assert set(packages) == folders | {"fastmix.benchmarks", "tritonkernels"}


# What is written


def _public() -> dict[str, object]:
    """Dotted name → object, of every `__all__` that users import from."""
    integrations = [path for path in _files("fastmix/integrations") if not path.stem.startswith("_")]
    packages = ["fastmix", "fastmix.init", *(f"fastmix.integrations.{path.stem}" for path in integrations)]
    packages += [f"fastmix.{folder}" for folder in METHODS if (ROOT / "fastmix" / folder).is_dir()]
    modules = {package: importlib.import_module(package) for package in packages}
    found = {
        f"{package}.{name}": getattr(module, name) for package, module in modules.items() for name in module.__all__
    }
    return {name: value for name, value in found.items() if callable(value)}


@pytest.mark.parametrize("name", sorted(_public()))
def test_public_names_are_documented(name):
    value = _public()[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    first = text.split("\n\n")[0]
    assert first.endswith((".", ":")), f"{name}: the docstring does not begin with a sentence"
    if inspect.isfunction(value):
        for section in ("Args:", "Returns:", "Raises:"):
            assert re.search(rf"^{section}$", text, re.MULTILINE), f"{name}: the docstring has no {section}"
        for argument in inspect.signature(value).parameters:
            assert re.search(rf"^    {argument}: ", text, re.MULTILINE), f"{name}: {argument} is not described"


def test_no_file_is_longer_than_400_lines():
    paths = _files(*SOURCES, suffixes=(".py", ".cpp", ".cu", ".cuh", ".h"))
    lengths = {_name(path): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_forbidden_text():
    forbidden = ("torch/extension.h", "march=native", "use_fast_math", "library.custom_op")
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h", ".yml", ".yaml", ".sh")
    paths = [*_files(*SOURCES, suffixes=suffixes), *ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    texts = {_name(path): path.read_text() for path in paths if path.exists() and path != Path(__file__)}
    assert [f"{name}: {word}" for name, text in texts.items() for word in forbidden if word in text] == []


def test_input_is_never_checked_by_assert():
    def asserts(path: Path) -> list[str]:
        return [
            f"{_name(path)}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Assert)
        ]

    assert _all(asserts, _files("fastmix")) == []


def test_private_pytorch_is_used_in_the_route_alone():
    def private(path: Path) -> list[str]:
        found = re.findall(r"\btorch(?:\.\w+)*\._(?!_)\w+|\bforward_ad\._\w+", path.read_text())
        return [f"{_name(path)}: {name}" for name in found if name not in documented]

    # The last two are how one writes a tensor subclass that is made of other tensors.
    documented = ("torch._check", "torch.Tensor._make_wrapper_subclass", "torch._C._disabled_torch_function_impl")
    documented += ("torch._dynamo",)  # its name, to see whether it is loaded

    others = [path for path in _files("fastmix", "tritonkernels") if path.name != "_route.py"]
    assert _all(private, others) == []


# What importing does


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light_and_silent():
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import fastmix, fastmix.nn, fastmix.testing, fastmix.integrations
seconds = time.process_time() - start
heavy = {"triton", "transformers", "matplotlib", "timm", "opacus", "scipy", "tritonkernels"}
loaded = heavy & {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded, loaded
assert not torch.cuda.is_initialized()
assert seconds < 0.5, seconds
"""
    assert _fresh(code) == ""


def test_integrations_import_their_peer_when_asked():
    peers = sorted(path.stem for path in _files("fastmix/integrations") if not path.stem.startswith("_"))
    assert "transformers" in peers
    imports = "".join(f"import fastmix.integrations.{peer}\n" for peer in peers)
    assert _fresh(f"import sys\n{imports}assert not set({peers!r}) & set(sys.modules)") == ""
