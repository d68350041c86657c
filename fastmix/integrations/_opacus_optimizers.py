"""Opacus' optimizers whose clipped gradients come from a recorded backward.

Imports opacus: `fastmix.integrations.opacus` does so when asked.
"""

from __future__ import annotations

import torch
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DistributedDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
    SimpleDistributedPerLayerOptimizer,
)
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import DistributedDPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from fastmix.integrations._opacus_forward import GradSample, no_gradient


class _Clipping(DPOptimizer):
    """One norm a sample, over all parameters."""

    def _get_flat_grad_sample(self, p: nn.Parameter) -> GradSample:
        grad_sample = getattr(p, "grad_sample", None)
        if grad_sample is not None and not isinstance(grad_sample, GradSample):
            raise RuntimeError(
                "the model has Opacus' own hooks again: call fastmix.integrations.opacus.restore(optimizer), and "
                "accelerate(optimizer) after it"
            )
        if grad_sample is None:
            raise no_gradient(f"a parameter {list(p.shape)} of the optimizer")
        return grad_sample

    def clip_and_accumulate(self) -> None:
        samples = self.grad_samples
        _check_processed_flag([batch for sample in samples for batch in sample])
        factors = self._clip_factors([sample.norms() for sample in samples])
        for parameter, sample, factor in zip(self.params, samples, factors, strict=True):
            clipped = sample.total(factor)
            _mark_as_processed(sample)
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad.add_(clipped)

    def _clip_factors(self, norms: list[Tensor]) -> list[Tensor]:
        """The samples' factors [B] for each parameter, of the norms [B] of each."""
        norm = torch.stack([each.to(norms[0].device) for each in norms]).norm(dim=0)
        return [_clip_factor(norm, self.max_grad_norm)] * len(norms)


class _AdaptiveClipping(_Clipping):
    """It also counts the samples that were not clipped."""

    def _clip_factors(self, norms: list[Tensor]) -> list[Tensor]:
        factors = super()._clip_factors(norms)
        self.sample_size += len(factors[0])
        self.unclipped_num += (factors[0] >= 1).sum()
        return factors

    def update_max_grad_norm(self) -> None:
        if self.sample_size:  # else noise / 0 would take the bound, and with it the next step's noise, to its limits
            super().update_max_grad_norm()


class _PerLayerClipping(_Clipping):
    """A norm for each parameter."""

    def _clip_factors(self, norms: list[Tensor]) -> list[Tensor]:
        return [_clip_factor(*pair) for pair in zip(norms, self.max_grad_norms, strict=True)]


def _clip_factor(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class AcceleratedDPOptimizer(_Clipping, DPOptimizer):
    pass


class AcceleratedAdaClipDPOptimizer(_AdaptiveClipping, AdaClipDPOptimizer):
    pass


class AcceleratedDPPerLayerOptimizer(_PerLayerClipping, DPPerLayerOptimizer):
    pass


class AcceleratedDistributedDPOptimizer(_Clipping, DistributedDPOptimizer):
    pass


class AcceleratedDistributedPerLayerOptimizer(_PerLayerClipping, SimpleDistributedPerLayerOptimizer):
    pass


class _GhostClipping(DPOptimizerFastGradientClipping):
    """The clipped gradients are in `.grad`."""

    def accumulate(self) -> None:
        for parameter in self.params:
            if parameter.grad is None:
                raise no_gradient(f"a parameter {list(parameter.shape)} of the optimizer")
            if parameter.summed_grad is None:  # Opacus copies it
                parameter.summed_grad, parameter.grad = parameter.grad, None
            else:
                parameter.summed_grad.add_(parameter.grad)


class AcceleratedGhostDPOptimizer(_GhostClipping, DPOptimizerFastGradientClipping):
    pass


class AcceleratedDistributedGhostDPOptimizer(_GhostClipping, DistributedDPOptimizerFastGradientClipping):
    pass


ACCELERATED: dict[type[DPOptimizer], type[DPOptimizer]] = {
    DPOptimizer: AcceleratedDPOptimizer,
    AdaClipDPOptimizer: AcceleratedAdaClipDPOptimizer,
    DPPerLayerOptimizer: AcceleratedDPPerLayerOptimizer,
    DistributedDPOptimizer: AcceleratedDistributedDPOptimizer,
    SimpleDistributedPerLayerOptimizer: AcceleratedDistributedPerLayerOptimizer,
    DPOptimizerFastGradientClipping: AcceleratedGhostDPOptimizer,
    DistributedDPOptimizerFastGradientClipping: AcceleratedDistributedGhostDPOptimizer,
}
