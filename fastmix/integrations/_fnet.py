"""transformers' FNet on fastmix. Imports transformers: `fastmix.integrations.transformers` does so when asked."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.fnet import modeling_fnet

from fastmix.integrations._replace import Replacement
from fastmix.ops.fft_mixing import fourier_mixing


class FNetFourierMixing(modeling_fnet.FNetBasicFourierTransform):
    """FNet's Re(fft2), for any length and in bfloat16 and float16 too.

    Where the configuration asks for matrix products in place of the FFT (use_tpu_fourier_optimizations), the
    matrices stay, as the state dict has them, and are not used.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (fourier_mixing(hidden_states),)


def _other_transform(module: nn.Module) -> str | None:
    """The transform is an attribute that a user may have exchanged; only transformers' own three are Re(fft2)."""
    transform = module.fourier_transform
    function, keywords = (transform.func, transform.keywords) if isinstance(transform, partial) else (transform, {})
    if function in (modeling_fnet.two_dim_matmul, modeling_fnet.fftn):
        return None
    if function is torch.fft.fftn and keywords == {"dim": (1, 2)}:
        return None
    return "its fourier_transform was exchanged"


REPLACEMENTS = (
    Replacement(modeling_fnet.FNetBasicFourierTransform, FNetFourierMixing, "fastmix.fourier_mixing", _other_transform),
)
