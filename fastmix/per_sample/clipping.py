"""Sums of clipped per-sample gradients, and inner products of per-sample gradients, in one backward."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import torch
from torch import Tensor, nn

from fastmix.ops._check import check_choice, check_float
from fastmix.per_sample._autograd import nodes_below, run_backward, run_grad
from fastmix.per_sample._contributions import Contribution, combine, real
from fastmix.per_sample._recorder import Recorder
from fastmix.per_sample.norms import GradNorms, check_losses


def clipped_backward(
    per_sample_losses: Tensor,
    model: nn.Module,
    max_norm: float,
    *,
    mode: str = "global",
    sample_weight: Tensor | None = None,
    noise_multiplier: float = 0.0,
    generator: torch.Generator | None = None,
) -> GradNorms:
    """The backward of differentially private training: adds Σ_i min(1, C/‖∇L_i‖)·∇L_i to the gradients in `.grad`.

    One backward finds what the norms ‖∇L_i‖ and then the clipped sum are computed from, and no weight's gradient is
    computed unclipped. That takes losses from a forward inside a `grad_norms` block; those of an ordinary forward are
    served too, exactly but slowly, by a backward for each sample. The sum is one over the samples: divide it, or the
    learning rate, by the (expected) batch size.

    Args:
        per_sample_losses: [B], sample i's loss in place i.
        model: whose parameters that require a gradient are followed.
        max_norm: C > 0.
        mode: "global": the norm is that of all parameters together; "per_layer": each module that holds parameters has
            its own norm, and its own gradient clipped to C.
        sample_weight: [B] factors of the clipped gradients.
        noise_multiplier: Gaussian noise of standard deviation noise_multiplier·max_norm is added to every coordinate.
        generator: of the noise.

    Returns:
        The norms, unclipped.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the losses or sample_weight are not [B], max_norm is not positive (and finite if there is noise),
            noise_multiplier is negative, mode is unknown, or the model has no trainable parameter.

    Abadi et al., Deep Learning with Differential Privacy (arXiv:1607.00133); Bu et al., Differentially Private
    Optimization on Large Model at Small Cost (arXiv:2210.00038).
    """
    check_choice("mode", mode, ("global", "per_layer"))
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if not 0 <= noise_multiplier < float("inf"):
        raise ValueError(f"noise_multiplier must be finite and at least 0, got {noise_multiplier}")
    if noise_multiplier > 0 and max_norm == float("inf"):
        raise ValueError("max_norm must be finite if there is noise, got inf")
    gradients = _PerSampleGradients(per_sample_losses, model)
    losses = per_sample_losses
    if sample_weight is not None:
        check_float("sample_weight", sample_weight)
        if sample_weight.shape != losses.shape:
            raise ValueError(f"sample_weight must be [B] = [{len(losses)}], got {list(sample_weight.shape)}")
    with gradients.at_rest():
        norm_sq = gradients.norm_sq()
        if not norm_sq and len(losses):
            raise ValueError("per_sample_losses must depend on a parameter of model that requires a gradient")
        groups: dict[str, list[str]] = defaultdict(list)
        for name in norm_sq:
            groups["" if mode == "global" else name.rpartition(".")[0]].append(name)
        grads: dict[str, Tensor] = {}
        for names in groups.values():
            norm = torch.stack([norm_sq[name] for name in names]).sum(0).sqrt()
            factors = (max_norm / norm).clamp(max=1.0)
            factors = factors if sample_weight is None else factors * sample_weight.detach().to(factors)
            grads |= gradients.total(names, factors)
        for name, parameter in gradients.parameters.items() if noise_multiplier else ():
            like = real(parameter.detach())
            noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
            noise *= noise_multiplier * max_norm
            noise = torch.view_as_complex(noise) if parameter.is_complex() else noise
            grads[name] = grads[name] + noise if name in grads else noise
    if grads:
        run_backward(_Deliver.apply(grads, *[gradients.parameters[name] for name in grads]))
    norms = GradNorms(list(gradients.parameters))
    norms._add(len(losses), norm_sq, gradients.methods())
    return norms


def gram(model: nn.Module, per_sample_losses: Tensor) -> Tensor:
    """Inner products ⟨∇L_i, ∇L_j⟩ of the samples' gradients, without a tensor of B gradients.

    Its diagonal holds the squared norms. `.grad` stays as it is.

    Args:
        model: whose parameters that require a gradient are followed.
        per_sample_losses: [B], sample i's loss in place i, from a forward inside a `grad_norms` block.

    Returns:
        [B, B], float32 (float64 for float64 models).

    Raises:
        TypeError: per_sample_losses is no Tensor.
        ValueError: it is not [B], its forward was outside a `grad_norms` block, or the model has no trainable
            parameter.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    gradients = _PerSampleGradients(per_sample_losses, model)
    with gradients.at_rest():
        return gradients.gram()


class _PerSampleGradients:
    """Every sample's gradient of each parameter, as contributions, or by a backward each after an ordinary forward."""

    def __init__(self, losses: Tensor, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        self.recorder = _recorder_of(losses, self.parameters) if isinstance(losses, Tensor) else None
        check_losses(losses, self.recorder.batch.size if self.recorder else None)
        self.losses = losses
        self.uses: dict[str, Contribution] = {}
        if self.recorder is not None:
            self.uses = {name: combine(uses) for name, uses in self.recorder.collect(losses).items()}

    def at_rest(self) -> contextlib.AbstractContextManager:
        """For the following."""
        return contextlib.nullcontext() if self.recorder is None else self.recorder.at_rest()

    def norm_sq(self) -> dict[str, Tensor]:
        """Name → [B], of the parameters that the losses use."""
        if self.recorder is not None:
            return {name: use.norm_sq() for name, use in self.uses.items()}
        found: dict[str, list[Tensor]] = defaultdict(list)
        for loss in self.losses.unbind():
            parameters = list(self.parameters.values())
            grads = run_grad([loss], parameters, retain_graph=True, allow_unused=True)
            for name, grad in zip(self.parameters, grads, strict=True):
                if grad is not None:
                    dtype = torch.promote_types(grad.dtype, torch.float32)
                    found[name].append(real(grad.to(dtype)).square().sum())
        return {name: torch.stack(values) for name, values in found.items()}

    def total(self, names: list[str], weight: Tensor) -> dict[str, Tensor]:
        """Σ_b weight_b ∇_b for these parameters."""
        parameters = [self.parameters[name] for name in names]
        if self.recorder is not None:
            grads = [self.uses[name].total(weight).view_as(p) for name, p in zip(names, parameters, strict=True)]
        else:
            grads = run_grad([self.losses], parameters, [weight.to(self.losses.dtype)], retain_graph=True)
        return {name: grad.to(p.dtype) for name, p, grad in zip(names, parameters, grads, strict=True)}

    def gram(self) -> Tensor:
        """[B, B]."""
        if self.recorder is None:
            raise ValueError(
                "per_sample_losses must come from a forward inside a grad_norms block, got an ordinary one"
            )
        b = len(self.losses)
        return sum((use.gram() for use in self.uses.values()), start=self.losses.new_zeros(b, b))

    def methods(self) -> dict[str, str]:
        if self.recorder is None:
            return dict.fromkeys(self.parameters, "a backward for each sample")
        return {name: use.alone for name, use in self.uses.items()}


def _recorder_of(losses: Tensor, parameters: dict[str, nn.Parameter]) -> Recorder | None:
    """The recorder in whose block the losses' forward ran, if it follows these parameters."""
    for node in nodes_below([losses]):
        recorder = node.metadata.get("fastmix.per_sample")
        if recorder is not None and recorder.follows(parameters):
            return recorder
    return None


class _Deliver(torch.autograd.Function):
    """Its backward hands gradients to autograd, which adds them to `.grad`, without a copy, and runs hooks."""

    @staticmethod
    def forward(ctx, grads: dict[str, Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor):
        grads = list(ctx.grads.values())
        ctx.grads.clear()
        return None, *grads
