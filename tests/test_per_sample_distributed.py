"""fastmix.per_sample on two processes: the checks in the folder `processes`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "processes" / "run.py"
PROCESSES = 2
TIMEOUT = 200  # seconds


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is without torch.distributed")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes(device, tmp_path):
    """One test, for starting the processes takes longer than the checks."""
    if device == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip(f"needs {PROCESSES} CUDA devices")
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(tmp_path), device]) for rank in range(PROCESSES)
    ]
    try:
        for process in processes:
            process.wait(TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    for name in outcomes[0]:
        for rank, outcome in enumerate(outcomes):
            assert outcome[name] == "", f"{name} on process {rank}:\n{outcome[name]}"
    assert len(outcomes[0]) > 40
