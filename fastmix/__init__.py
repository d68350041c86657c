"""Fused token-mixing kernels for PyTorch, and the methods that stand on them."""

from fastmix import nn
from fastmix._version import __version__
from fastmix.ops.fft_mixing import fourier_mixing, global_filter

__all__ = ["__version__", "fourier_mixing", "global_filter", "nn"]
