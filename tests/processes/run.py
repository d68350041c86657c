"""One of the processes of test_per_sample_distributed.py: python run.py rank folder device."""

import sys
from pathlib import Path

import replicated  # noqa: F401
import sharded  # noqa: F401
from common import run_checks

run_checks(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
