"""Fused token-mixing kernels for PyTorch, and the methods that stand on them."""

from fastmix import generation, init, losses, nn, per_sample
from fastmix._version import __version__
from fastmix.generation import Trie
from fastmix.ops._attention import RelativeBias, Rotary
from fastmix.ops.affine_grad_norm import affine_grad_norm_sq, affine_grad_sample
from fastmix.ops.beam_search import trie_beam_step
from fastmix.ops.conv_grad_norm import conv_grad_norm_sq, conv_weight_grad_sample, conv_weight_grad_with_norm
from fastmix.ops.embedding_grad_norm import embedding_grad_norm_sq
from fastmix.ops.external_attention import external_attention
from fastmix.ops.fft_mixing import fourier_mixing, global_filter
from fastmix.ops.grad_norm import (
    linear_grad_gram,
    linear_grad_norm_sq,
    linear_weight_grad,
    linear_weight_grad_with_norm,
)
from fastmix.ops.gradient_ratio import gradient_ratio
from fastmix.ops.scaled_attention import scaled_attention
from fastmix.ops.token_conv import token_conv
from fastmix.ops.token_mixing import token_linear, token_mixing_mlp

__all__ = [
    "RelativeBias",
    "Rotary",
    "Trie",
    "__version__",
    "affine_grad_norm_sq",
    "affine_grad_sample",
    "conv_grad_norm_sq",
    "conv_weight_grad_sample",
    "conv_weight_grad_with_norm",
    "embedding_grad_norm_sq",
    "external_attention",
    "fourier_mixing",
    "generation",
    "global_filter",
    "gradient_ratio",
    "init",
    "linear_grad_gram",
    "linear_grad_norm_sq",
    "linear_weight_grad",
    "linear_weight_grad_with_norm",
    "losses",
    "nn",
    "per_sample",
    "scaled_attention",
    "token_conv",
    "token_linear",
    "token_mixing_mlp",
    "trie_beam_step",
]
