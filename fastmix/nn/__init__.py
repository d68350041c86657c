"""Modules and models built on the ops."""

from fastmix.nn.fft_mixing import FourierMixing, GlobalFilter

__all__ = ["FourierMixing", "GlobalFilter"]
