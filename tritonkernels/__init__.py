"""Triton kernels and their launchers, one module an op; each lists what to compile in `compile_cases()`."""
