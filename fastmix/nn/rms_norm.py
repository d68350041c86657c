"""RMSNorm, also where its weight has another dtype than its input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, fused also under autocast: x/√(mean(x²) + eps) ⊙ γ, no centring and no β.

    Constructor, state dict and results are PyTorch's. Where x is bfloat16 or float16 and γ is float32, as autocast and
    T5 have it, PyTorch warns and computes in several passes; here γ is rounded to x's dtype first. The root mean square
    is taken in float32. Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467).

    Args:
        normalized_shape: the last dimensions, over which the mean is taken; one number for the last alone.
        eps: added to the mean square; None for the epsilon of the dtype that is computed in. T5's is 1e-6.
        elementwise_affine: whether γ is there, [*normalized_shape], 1 at first.
        device: of γ.
        dtype: of γ.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., *normalized_shape]; the same shape and dtype come out."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
