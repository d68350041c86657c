"""Fused token-mixing kernels for PyTorch, and the methods that stand on them."""

from fastmix import generation, nn
from fastmix._version import __version__
from fastmix.generation import Trie
from fastmix.ops._attention import RelativeBias, Rotary
from fastmix.ops.beam_search import trie_beam_step
from fastmix.ops.external_attention import external_attention
from fastmix.ops.fft_mixing import fourier_mixing, global_filter
from fastmix.ops.scaled_attention import scaled_attention
from fastmix.ops.token_conv import token_conv
from fastmix.ops.token_mixing import token_linear, token_mixing_mlp

__all__ = [
    "RelativeBias",
    "Rotary",
    "Trie",
    "__version__",
    "external_attention",
    "fourier_mixing",
    "generation",
    "global_filter",
    "nn",
    "scaled_attention",
    "token_conv",
    "token_linear",
    "token_mixing_mlp",
    "trie_beam_step",
]
