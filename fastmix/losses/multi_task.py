"""Weights of the losses of several tasks that share a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmix.losses import _loss_weights as rules
from fastmix.ops._check import check_choice, check_float, check_same_device, shape_text

KINDS = ("initial", "prior", "realtime", "generalized_mean", "gradient_norm")


class MultiTaskLoss(nn.Module):
    """Σ_i α_i·L_i of n tasks' losses, with weights α that gradients do not flow into.

    =================  ==============================================================================================
    kind               α_i
    =================  ==============================================================================================
    initial            1/L_i(0), of the mean of the first warmup_steps losses (while these last, of those so far)
    prior              1/prior_i, the loss of the best constant predictor: the entropy of the labels' frequencies
                       (log C for C equally frequent classes), the variance of a regression's targets
    realtime           1/L_i: the gradient of n·log of the losses' geometric mean
    generalized_mean   (L_i/L)^(γ−1)/n, the gradient of L = (mean_i L_i^γ)^(1/γ), whose value the result has; γ = 1 is
                       the mean, γ = 0 the geometric mean; a larger γ looks at the larger losses
    gradient_norm      1/‖∇L_i‖ by the shared parameters; 0 for a loss whose gradient is 0
    =================  ==============================================================================================

    Multiplying a loss by a constant changes no gradient under "initial", "realtime" and "gradient_norm" (nor under
    "prior", if its prior is multiplied too), and only the size of the whole under "generalized_mean" with γ = 0; adding
    one changes none under "gradient_norm".

    In training mode a call computes the weights and leaves them in ``weights``; in evaluation mode the ones of the last
    training step are used again, so that validation losses compare. Where torch.distributed is initialised, training
    weights are those of the default group's mean losses (for "gradient_norm" the norms of its mean gradients), so they
    are equal on all ranks, each of which must then call it. Values are read to be checked, which waits for a GPU.
    The state dict holds the weights and what "initial" has gathered.

    Args:
        num_tasks: n ≥ 1.
        kind: one of the above.
        gamma: γ of "generalized_mean".
        prior: n positive numbers, for "prior".
        warmup_steps: training steps whose losses "initial" averages.
        shared_parameters: of "gradient_norm": the parameters, or one, that all tasks use; all of a shared encoder or,
            cheaper, its last layer. Each step takes a backward pass for each task up to these.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: kind is unknown, an argument is out of range, or is given for or missing in a kind.

    Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks
    (arXiv:1711.02257), is the learned relative of "gradient_norm".
    """

    def __init__(
        self,
        num_tasks: int,
        kind: str = "initial",
        *,
        gamma: float = 0.0,
        prior: Sequence[float] | Tensor | None = None,
        warmup_steps: int = 1,
        shared_parameters: Tensor | Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_positive_int("num_tasks", num_tasks)
        _check_positive_int("warmup_steps", warmup_steps)
        check_choice("kind", kind, KINDS)
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
            raise TypeError(f"gamma must be a float, got {type(gamma).__name__}")
        if not math.isfinite(gamma):
            raise ValueError(f"gamma must be finite, got {gamma}")
        for name, given, owner in (
            ("gamma", gamma != 0, "generalized_mean"),
            ("prior", prior is not None, "prior"),
            ("warmup_steps", warmup_steps != 1, "initial"),
            ("shared_parameters", shared_parameters is not None, "gradient_norm"),
        ):
            if given and kind != owner:
                raise ValueError(f"{name} must be left out unless kind is {owner!r}, got kind {kind!r}")
        self.num_tasks, self.kind, self.gamma, self.warmup_steps = num_tasks, kind, float(gamma), warmup_steps
        # A tuple, so that they are no parameters of this module: the model's state dict has them.
        self._shared = _shared(shared_parameters) if kind == "gradient_norm" else ()
        self.register_buffer("weights", torch.ones(num_tasks))
        if kind == "prior":
            self.weights = _prior(prior, num_tasks).reciprocal()
        if kind == "initial":
            self.register_buffer("loss_sums", torch.zeros(num_tasks))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted sum, to call ``.backward()`` on.

        Args:
            losses: [n], or n scalars, of a floating-point dtype. Positive under "initial", "realtime" and
                "generalized_mean".

        Returns:
            A scalar of the losses' dtype, float32 for bfloat16 and float16.

        Raises:
            TypeError: losses are no floating-point tensors, nor a sequence of such.
            ValueError: their number or shape does not fit, they are not finite or not positive where they must be, or
                under "gradient_norm" one of a sequence does not depend on the shared parameters.
        """
        # One by one if they came so: the gradient of one by the shared parameters then passes the others by.
        terms, losses = losses, self._as_vector(losses)
        weights = self._new_weights(losses, terms) if self.training else self.weights
        self.weights = weights.to(self.weights)
        return (weights.to(losses) * losses).sum()

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, kind={self.kind!r}"

    def _as_vector(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        if not isinstance(losses, (Tensor, Sequence)):
            raise TypeError(f"losses must be a Tensor or a sequence of them, got {type(losses).__name__}")
        if not isinstance(losses, Tensor):
            if len(losses) != self.num_tasks:
                raise ValueError(f"losses must be {self.num_tasks}, one a task, got {len(losses)}")
            for i, loss in enumerate(losses):
                check_float(f"losses[{i}]", loss)
                check_same_device(f"losses[{i}]", loss, "losses[0]", losses[0])
                if loss.ndim != 0:
                    raise ValueError(f"losses[{i}] must be a scalar, got {shape_text(loss)}")
            losses = torch.stack([_at_least_float32(loss) for loss in losses])
        check_float("losses", losses)
        if losses.shape != (self.num_tasks,):
            raise ValueError(f"losses must be [n] = [{self.num_tasks}], got {shape_text(losses)}")
        return _at_least_float32(losses)

    def _new_weights(self, losses: Tensor, terms: Tensor | Sequence[Tensor]) -> Tensor:
        if self.kind == "prior":
            return self.weights
        mean = rules.group_mean(losses.detach())
        positive = self.kind != "gradient_norm"
        if not bool((mean.isfinite() & ((mean > 0) | (not positive))).all()):
            kind = "finite and positive" if positive else "finite"
            raise ValueError(f"losses must be {kind} for kind {self.kind!r}, got {mean.tolist()}")
        if self.kind == "initial":
            return self._initial(mean).reciprocal()
        if self.kind == "realtime":
            return mean.reciprocal()
        if self.kind == "generalized_mean":
            return rules.generalized_mean_weights(mean, self.gamma)
        return rules.gradient_norm_weights(terms, self._shared)

    def _initial(self, losses: Tensor) -> Tensor:
        """The mean of the first losses, to which these may still belong."""
        if self.steps < self.warmup_steps:
            self.loss_sums = self.loss_sums + losses.to(self.loss_sums)
            self.steps = self.steps + 1
        return self.loss_sums / self.steps


def _at_least_float32(losses: Tensor) -> Tensor:
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _prior(prior: Sequence[float] | Tensor | None, num_tasks: int) -> Tensor:
    if prior is None:
        raise ValueError("prior must be given for kind 'prior', got None")
    values = torch.as_tensor(prior, dtype=torch.float32).detach().clone()
    if values.shape != (num_tasks,):
        raise ValueError(f"prior must be {num_tasks} numbers, one a task, got {shape_text(values)}")
    if not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError(f"prior must be finite and positive, got {values.tolist()}")
    return values


def _shared(parameters: Tensor | Iterable[Tensor] | None) -> tuple[Tensor, ...]:
    if parameters is None:
        raise ValueError("shared_parameters must be given for kind 'gradient_norm', got None")
    parameters = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    if not parameters:
        raise ValueError("shared_parameters must be one or more parameters, got none")
    for i, parameter in enumerate(parameters):
        check_float(f"shared_parameters[{i}]", parameter)
        if not parameter.requires_grad:
            raise ValueError(f"shared_parameters[{i}] must require gradients, got one that does not")
    return parameters
