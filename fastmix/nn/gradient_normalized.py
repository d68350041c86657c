"""A discriminator with gradient normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from fastmix.ops.gradient_ratio import resolve_eps
from fastmix.per_sample.gradient_normalize import gradient_normalize


class GradientNormalized(nn.Module):
    """A discriminator whose output is normalised by the norm of its gradient by its input.

    :func:`fastmix.per_sample.gradient_normalize` of the module, for the discriminator's and the generator's step alike.
    Parameters are the discriminator's own, under ``discriminator.``; ``module.discriminator.state_dict()`` has its keys
    as they were.

    Args:
        discriminator: a module of x [B, …] that gives [B] or [B, 1] and treats samples apart.
        mode: "gn" or "gran".
        eps: at least 0; None: 0 for "gn" and 0.1 for "gran".

    Wu et al., Gradient Normalization for Generative Adversarial Networks (arXiv:2109.02235); Bhaskara et al., GraN-GAN:
    Piecewise Gradient Normalization for Generative Adversarial Networks (arXiv:2111.03162).
    """

    def __init__(self, discriminator: nn.Module, mode: str = "gn", eps: float | None = None) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise TypeError(f"discriminator must be a torch.nn.Module, got {type(discriminator).__name__}")
        self.eps = resolve_eps(mode, eps)
        self.mode = mode
        self.discriminator = discriminator

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, …]; [B] comes out."""
        return gradient_normalize(self.discriminator, x, mode=self.mode, eps=self.eps)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, eps={self.eps}"
