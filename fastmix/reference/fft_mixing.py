"""Fourier mixing (FNet) and global filter (GFNet) in plain PyTorch: the specification and the tests' oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def fourier_mixing(x: Tensor, *, norm: str = "backward", lengths: Tensor | None = None) -> Tensor:
    """Re(F_S X F_H) over the last two dimensions; `lengths` transforms each sample's first lengths[b] tokens only."""
    if x.numel() == 0:
        return x.clone()  # torch.fft refuses an empty batch
    real = x.to(compute_dtype(x))
    if lengths is None:
        return torch.fft.fft2(real, norm=norm).real.to(x.dtype)
    inside = torch.arange(x.shape[-2], device=x.device) < lengths[..., None]  # [..., S]
    real = torch.where(inside[..., None], real, 0)
    mixed = _fft_of_length(torch.fft.fft(real, norm=norm), lengths, norm).real
    return torch.where(inside[..., None], mixed, 0).to(x.dtype)


def _fft_of_length(x: Tensor, lengths: Tensor, norm: str) -> Tensor:
    """DFT along dim −2 whose length differs from sample to sample: Bluestein's, so no loop over samples.

    With jk = (j² + k² − (k − j)²)/2 a DFT of any length n is a convolution with exp(πi·j²/n), which a
    power-of-two FFT of length ≥ 2S − 1 computes for all samples at once. x: zero from row lengths[b] on.
    """
    size = x.shape[-2]
    padded = 1 << max(2 * size - 2, 0).bit_length()
    n = lengths.clamp(min=1)[..., None]  # [..., 1]
    j = torch.arange(size, device=x.device)
    angle = (j * j % (2 * n)).to(x.real.dtype) / n * math.pi  # [..., S], j² reduced exactly
    chirp = torch.polar(torch.ones_like(angle), -angle)[..., None]  # [..., S, 1]
    kernel = torch.cat([chirp.conj(), chirp.new_zeros(*chirp.shape[:-2], padded - 2 * size + 1, 1)], dim=-2)
    kernel = torch.cat([kernel, chirp.conj()[..., 1:, :].flip(-2)], dim=-2)  # [..., padded, 1]
    spectrum = torch.fft.fft(x * chirp, n=padded, dim=-2) * torch.fft.fft(kernel, dim=-2)
    mixed = torch.fft.ifft(spectrum, dim=-2)[..., :size, :] * chirp
    exponent = {"backward": 0.0, "ortho": -0.5, "forward": -1.0}[norm]
    return mixed * (n.to(angle.dtype) ** exponent)[..., None]


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """irfft2(rfft2(x)·weight) over dims 1 and 2 of x [B, h, w, C], orthonormal, in x's dtype."""
    real = x.to(compute_dtype(x))
    if not weight.is_complex():
        weight = torch.view_as_complex(weight.to(real.dtype).contiguous())
    weight = weight.to(torch.complex128 if real.dtype == torch.float64 else torch.complex64)
    if x.numel() == 0:
        return x + 0 * weight.real.sum().to(x.dtype)  # torch.fft refuses an empty batch
    spectrum = torch.fft.rfft2(real, dim=(1, 2), norm="ortho") * weight
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)
