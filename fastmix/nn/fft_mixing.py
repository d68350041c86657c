"""Modules on Fourier mixing and the global filter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmix.ops.fft_mixing import fourier_mixing, global_filter


class FourierMixing(nn.Module):
    """FNet's mixing sublayer, Re(F_S x F_H): :func:`fastmix.fourier_mixing` without parameters.

    Args:
        norm: "backward" (FNet's), "ortho" or "forward".
    """

    def __init__(self, norm: str = "backward") -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return fourier_mixing(x, norm=self.norm, lengths=lengths)

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}"


class GlobalFilter(nn.Module):
    """GFNet's mixing sublayer, :func:`fastmix.global_filter` with its learned weight.

    The parameter ``complex_weight`` [h, w // 2 + 1, dim, 2] has the layout and the initialisation (normal,
    standard deviation 0.02) of the paper's code, so that its state dicts load.

    Args:
        dim: channels.
        h: height of the image in tokens.
        w: width of the image in tokens (not of its half spectrum).
    """

    def __init__(self, dim: int, h: int = 14, w: int = 14) -> None:
        super().__init__()
        self.dim, self.h, self.w = dim, h, w
        self.complex_weight = nn.Parameter(torch.randn(h, w // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, h, w, dim], or [B, h·w, dim]; the same shape comes out."""
        image = (self.h, self.w, self.dim)
        if tuple(x.shape[1:]) not in (image, (self.h * self.w, self.dim)):
            raise ValueError(
                f"x must be [B, {self.h}, {self.w}, {self.dim}] or [B, {self.h * self.w}, {self.dim}], "
                f"got {list(x.shape)}"
            )
        return global_filter(x.reshape(-1, *image), self.complex_weight).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, h={self.h}, w={self.w}"
