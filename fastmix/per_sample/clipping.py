"""Sums of clipped per-sample gradients, and inner products of per-sample gradients, in one backward."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from fastmix.ops._check import check_choice, check_float
from fastmix.per_sample._autograd import nodes_below, run_backward, run_grad
from fastmix.per_sample._contributions import Contribution, combine, real
from fastmix.per_sample._distributed import Processes, check_kind, check_seen, past_sink, tell_sink
from fastmix.per_sample._observer import recorder_of
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

    On several processes, of which each has samples of its own, a model in `DistributedDataParallel` or of `fully_shard`
    gets the sum over all processes' samples divided by the number of processes, as PyTorch divides gradients. There
    the noise is that of the first process, and is in the sum once. All processes must call the function together, those
    with an empty batch too.

    Args:
        per_sample_losses: [B], sample i's loss in place i.
        model: whose parameters that require a gradient are followed; `DistributedDataParallel` itself, not the module
            in it: there, every process would add noise.
        max_norm: C > 0.
        mode: "global": the norm is that of all parameters together; "per_layer": each module that holds parameters has
            its own norm, and its own gradient clipped to C.
        sample_weight: [B] factors of the clipped gradients.
        noise_multiplier: Gaussian noise of standard deviation noise_multiplier·max_norm is added to every coordinate.
        generator: of the noise.

    Returns:
        The norms of this process's samples, unclipped.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the losses or sample_weight are not [B], max_norm is not positive (and finite if there is noise),
            noise_multiplier is negative, mode is unknown, or the model has no trainable parameter; it is sharded, and
            its forward was outside a `grad_norms` block.

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
    gradients = _PerSampleGradients(per_sample_losses, model, keep=True)
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
        grads = gradients.zeros(grads.keys()) | grads
        late = _add_noise(grads, gradients, noise_multiplier * max_norm, generator) if noise_multiplier else {}
        gradients.deliver(grads)
        if noise_multiplier:
            gradients.processes.add_late(late, gradients.parameters)
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


def _add_noise(
    grads: dict[str, Tensor], gradients: _PerSampleGradients, std: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Adds Gaussian noise to grads; returns that of parameters which must not be delivered here."""
    late = {}
    processes = gradients.processes
    for name, parameter in gradients.parameters.items():
        is_reduced = name in processes.reduced
        if is_reduced and not processes.is_first:
            continue
        grad = grads.get(name)
        like = real(parameter.detach() if grad is None else grad)
        noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype).mul_(std)
        noise = torch.view_as_complex(noise) if parameter.is_complex() else noise
        if grad is None and is_reduced:
            late[name] = noise
        else:
            grads[name] = noise if grad is None else grad + noise
    return late


class _PerSampleGradients:
    """Every sample's gradient of each parameter, as contributions, or by a backward each after an ordinary forward."""

    def __init__(self, losses: Tensor, model: nn.Module, *, keep: bool = False):
        """keep: for norms and sums, not for a Gram matrix."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_kind(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        self.recorder = recorder_of(losses, self.parameters) if isinstance(losses, Tensor) else None
        if self.recorder is not None:
            self.parameters = self.recorder.parameters  # the sharded ones
        check_losses(losses, self.recorder.batch.size if self.recorder else None)
        self.processes = Processes.of(model, self.parameters)
        if self.recorder is None and self.processes.sharded:
            raise ValueError(
                "per_sample_losses of a model of fully_shard must come from a forward inside a grad_norms block, got "
                "an ordinary one"
            )
        self.losses = losses
        self.sink: Node | None = None
        self.uses: dict[str, Contribution] = {}
        if self.recorder is not None:
            with self.at_rest():
                outputs, grads, self.sink = past_sink(losses, torch.ones_like(losses))
            check_seen(self.recorder, outputs)
            found = self.recorder.collect(outputs, grads, keep=keep)
            self.uses = {name: combine(uses) for name, uses in found.items()}

    def at_rest(self) -> contextlib.AbstractContextManager:
        """For the following."""
        return contextlib.nullcontext() if self.recorder is None else self.recorder.at_rest()

    def norm_sq(self) -> dict[str, Tensor]:
        """Name → [B], of the parameters that the losses use."""
        if self.recorder is not None:
            return {name: use.norm_sq() for name, use in self.uses.items()}
        found: dict[str, list[Tensor]] = defaultdict(list)
        b, parameters = len(self.losses), list(self.parameters.values())
        no_samples = self.losses.detach()
        for weight in torch.eye(b).to(self.losses).unbind() or [no_samples]:
            for name, grad in zip(self.parameters, self._grad(parameters, weight), strict=True):
                if grad is not None:
                    dtype = torch.promote_types(grad.dtype, torch.float32)
                    found[name].append(real(grad.to(dtype)).square().sum())
        return {name: torch.stack(values)[:b] for name, values in found.items()}

    def total(self, names: list[str], weight: Tensor) -> dict[str, Tensor]:
        """Σ_b weight_b ∇_b for these parameters."""
        parameters = [self.parameters[name] for name in names]
        if self.recorder is not None:
            grads = [self.uses[name].total(weight).view(p.shape) for name, p in zip(names, parameters, strict=True)]
        else:
            grads = self._grad(parameters, weight.to(self.losses.dtype))
        return {name: grad.to(p.dtype) for name, p, grad in zip(names, parameters, grads, strict=True)}

    def _grad(self, parameters: list[Tensor], weight: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of Σ_b weight_b L_b by a backward."""
        outputs, grads, self.sink = past_sink(self.losses, weight)
        return run_grad(outputs, parameters, grads, retain_graph=True, allow_unused=True)

    def zeros(self, but: Collection[str]) -> dict[str, Tensor]:
        """Zeros for the other parameters that the losses lead to, or that are sharded, which other processes await."""
        names = [name for name in self.parameters if name not in but]
        nodes = set(nodes_below([self.losses])) if names else set()
        zeros = {}
        for name in names:
            parameter, is_sharded = self.parameters[name], name in self.processes.sharded
            if is_sharded or get_gradient_edge(self._leaf(name)).node in nodes:
                device = self.losses.device if is_sharded else parameter.device
                zeros[name] = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
        return zeros

    def _leaf(self, name: str) -> Tensor:
        return self.parameters[name] if self.recorder is None else self.recorder.leaves[name]

    def deliver(self, grads: dict[str, Tensor]) -> None:
        """Moves gradients to `.grad`, summed over the processes and divided by their number."""
        processes, parameters = self.processes, self.parameters
        names = [name for name in parameters if name in grads]  # in one order on all processes
        for name in names:
            if name in processes.sharded:
                grads[name] = processes.average(grads[name], parameters[name])
        if names:
            # Nothing else holds them any more, so that autograd takes them as they are.
            with torch.enable_grad():
                moved = [grads.pop(name) for name in names]
                end = _Deliver.apply(moved, self.sink, *[parameters[name] for name in names])
                del moved
            run_backward(end)

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


class _Deliver(torch.autograd.Function):
    """Its backward hands gradients to autograd, which adds them to `.grad`, without a copy, and runs hooks."""

    @staticmethod
    def forward(ctx, grads: list[Tensor], sink: Node | None, *parameters: Tensor) -> Tensor:
        ctx.grads, ctx.sink = grads, sink
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, _: Tensor):
        if ctx.sink is not None:
            tell_sink(ctx.sink)
        grads, ctx.grads = ctx.grads, None
        return None, None, *grads
