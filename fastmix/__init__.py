"""Fused token-mixing kernels for PyTorch, and the methods that stand on them."""

from fastmix import generation, nn
from fastmix._version import __version__
from fastmix.generation import Trie
from fastmix.ops.beam_search import trie_beam_step
from fastmix.ops.fft_mixing import fourier_mixing, global_filter

__all__ = ["Trie", "__version__", "fourier_mixing", "generation", "global_filter", "nn", "trie_beam_step"]
