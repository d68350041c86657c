"""Chooses Triton's interpreter, which has to be before any kernel is decorated: run tests/triton in its own process."""

import os

os.environ["TRITON_INTERPRET"] = "1"
