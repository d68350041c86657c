"""Packages that the benchmarks compare with: imported if they can be, and named if not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fastmix.benchmarks import peers
from fastmix.benchmarks.torchvision_ops import define_torchvision_ops


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_packages_beside_another_torchvision(package):
    """Both import torchvision, whose library may be of a PyTorch with CUDA."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    code = f"""
from fastmix.benchmarks.peers import missing
assert missing({package!r}) is None, missing({package!r})
if {package!r} == "transformers":
    from transformers import FNetForMaskedLM
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_torchvision_that_loads_defines_its_operators_itself(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    assert define_torchvision_ops.__wrapped__() is None


def test_no_torchvision(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert define_torchvision_ops.__wrapped__() is None


def test_reasons(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("import absent_part")
    (tmp_path / "failing_peer.py").write_text("raise RuntimeError('of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.missing("torch") is None
    assert peers.missing("absent_peer") == "absent_peer is not installed"
    assert peers.missing("broken_peer") == "broken_peer can't be imported: No module named 'absent_part'"
    assert peers.missing("failing_peer") == "failing_peer can't be imported: of another version"


def test_every_case_is_compiled(monkeypatch):
    """Dynamo gives up after some graphs of one function, and a peer of that name would run uncompiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def double(x):
        return 2 * x

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for rows in range(2, 14):
        peers.compiled("double", double).function(x=torch.ones(rows, 3))
    assert len(graphs) == 12


@pytest.mark.skipif(not Path(sys.prefix).is_relative_to(Path(__file__).parents[1]), reason="not the clone's own .venv")
@pytest.mark.parametrize(
    "package",
    ["ducc0", "g_mlp_pytorch", "marisa_trie", "mlp_mixer_pytorch", "sklearn", "timm", "transformers", "triton"],
)
def test_the_pinned_packages_are_there(package):
    """Where constraints.txt was installed, no test of a peer may be skipped for want of it."""
    assert peers.missing(package) is None
