"""The linear layer in NTK parametrisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NTKLinear(nn.Module):
    """A linear layer in NTK parametrisation: y = b + x·Wᵀ/√in_features, with W ~ N(0, 1) and b = 0 at first.

    The function of ``torch.nn.Linear`` with the weight W/√in_features, which an optimiser's step moves less the wider
    the layer is: all widths share one learning rate. No subclass of ``torch.nn.Linear``, since what reads a Linear's
    weight (quantisation, adapters) would miss the factor. x is scaled, not W: 1/out_features of the product's work.
    Jacot et al., Neural Tangent Kernel: Convergence and Generalization in Neural Networks (arXiv:1806.07572).

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, features, least in (("in_features", in_features, 1), ("out_features", out_features, 0)):
            if features < least:
                raise ValueError(f"{name} must be at least {least}, got {features}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W ~ N(0, 1), b = 0."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; [..., out_features] comes out."""
        return F.linear(x * self.in_features**-0.5, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
