"""The microbatch loop, a sample's gradient at a time: the oracle of `fastmix.per_sample`, and checks against it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmix import per_sample
from fastmix.testing.grad_norm import RELATIVE_ERROR
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

Inputs = tuple[Tensor, ...]
Grads = dict[str, Tensor]  # name of a parameter → [B, *shape]


@dataclass(frozen=True)
class ModelCase:
    """A model and inputs of it, drawn anew by each call, with the samples along their first dimension.

    `vanishing` names parameters whose gradient is 0 but for rounding, such as the bias of attention's keys: a relative
    error of their norms says nothing. `take` gives the inputs of one sample.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    vanishing: tuple[str, ...] = ()
    take: Callable[[Inputs, int], Inputs] = lambda inputs, b: tuple(tensor[b : b + 1] for tensor in inputs)

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
        """The model and its inputs, with parameters away from an initialisation that would hide a mistake."""
        generator = torch.Generator().manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return model.to(dtype), _to(self.inputs(), dtype)


class SmallModel(nn.Module):
    """[B, T, 4] to [B, T, 2] through products, a normalisation, a convolution and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.LayerNorm(6))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(self.inner(x).mT).mT * self.scale)


def weighted_losses(model: nn.Module, *inputs: Tensor) -> Tensor:
    """[B]: Σ y·(c + y/2) for the model's output y, with constants c that are the same for all samples."""
    output = model(*inputs)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    constants = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(1)).to(output)
    return (output * (constants + output / 2)).flatten(1).sum(1)


def per_sample_grads(
    model: nn.Module,
    inputs: Inputs,
    losses: Callable[..., Tensor] = weighted_losses,
    take: Callable[[Inputs, int], Inputs] = ModelCase.take,
) -> Grads:
    """Every sample's gradient by a forward and a backward of its own, 0 for parameters that it does not use."""
    model = copy.deepcopy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in parameters}
    for b in range(batch_of(inputs, take)):
        model.zero_grad()
        losses(model, *take(inputs, b)).sum().backward()
        for name, parameter in parameters.items():
            rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def batch_of(inputs: Inputs, take: Callable[[Inputs, int], Inputs] = ModelCase.take) -> int:
    """The number of samples: of the last input where samples are ranges of rows, as a bag's offsets say."""
    return len(inputs[0] if take is ModelCase.take else inputs[-1])


def in_float64(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    return copy.deepcopy(model).double(), _to(inputs, torch.float64)


def norms_of(grads: Grads) -> dict[str, Tensor]:
    """name → [B] in float64."""
    return {name: grad.double().reshape(len(grad), -1).norm(dim=1) for name, grad in grads.items()}


def total_of(grads: Grads) -> Tensor:
    return _rows(grads).norm(dim=1)


def gram_of(grads: Grads) -> Tensor:
    """[B, B], the inner products of the samples' gradients."""
    return _rows(grads) @ _rows(grads).t()


def clipped_sum(
    grads: Grads, max_norm: float, group: Callable[[str], str] = lambda name: "", sample_weight: Tensor | None = None
) -> Grads:
    """Σ_b sample_weight_b·min(1, max_norm / ‖∇_b‖)·∇_b, the norm over the parameters of one group."""
    result = {}
    for name in grads:
        norm = total_of({other: grad for other, grad in grads.items() if group(other) == group(name)})
        factor = (max_norm / norm).clamp(max=1)
        if sample_weight is not None:
            factor = factor * sample_weight.double()
        result[name] = torch.tensordot(factor, grads[name].double(), 1)
    return result


def run_block(
    model: nn.Module, inputs: Inputs, losses: Callable[..., Tensor] = weighted_losses, reduction: str = "sum"
) -> per_sample.RecordedNorms:
    """Forward, loss and backward in a block."""
    with per_sample.grad_norms(model, reduction) as norms:
        loss = losses(model, *inputs)
        (loss.mean() if reduction == "mean" else loss.sum()).backward()
    return norms


def check_case(case: ModelCase, dtype: torch.dtype = torch.float32, reduction: str = "sum") -> per_sample.GradNorms:
    """Raises AssertionError unless the norms and gradients of a block are those of the loop; returns the norms."""
    model, inputs = case.draw(dtype)
    return check_norms(model, inputs, reduction=reduction, vanishing=case.vanishing, take=case.take)


def check_norms(
    model: nn.Module,
    inputs: Inputs,
    *,
    losses: Callable[..., Tensor] = weighted_losses,
    reduction: str = "sum",
    vanishing: tuple[str, ...] = (),
    take: Callable[[Inputs, int], Inputs] = ModelCase.take,
) -> per_sample.GradNorms:
    """Runs a block on the model, and compares the norms and `.grad` with the loop's in the dtype and in float64."""
    expected = Expected.of(model, inputs, losses, take)
    model.zero_grad()
    norms = run_block(model, inputs, losses, reduction)
    expected.check_norms(norms, vanishing)
    expected.check_grad(model, reduction, vanishing)
    return norms


@dataclass(frozen=True)
class Expected:
    """The loop's gradients of one batch, in the model's dtype and in float64, and the ordinary gradients of the sum.

    `dtype` is what the model computes in: its parameters' dtype, or that of autocast.
    """

    reference: Grads
    oracle: Grads
    ordinary: dict[str, Tensor | None]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        losses: Callable[..., Tensor] = weighted_losses,
        take: Callable[[Inputs, int], Inputs] = ModelCase.take,
        dtype: torch.dtype | None = None,
    ) -> Expected:
        double, double_inputs = in_float64(model, inputs)
        oracle = per_sample_grads(double, double_inputs, losses, take)
        plain = copy.deepcopy(model)
        plain.zero_grad()
        losses(plain, *inputs).sum().backward()
        ordinary = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        dtype = next(model.parameters()).dtype if dtype is None else dtype
        return cls(per_sample_grads(model, inputs, losses, take), oracle, ordinary, dtype)

    @property
    def batch(self) -> int:
        return len(next(iter(self.oracle.values())))

    def check_norms(self, norms: per_sample.GradNorms, vanishing: tuple[str, ...] = ()) -> None:
        oracle, reference = norms_of(self.oracle), norms_of(self.reference)
        if norms.per_parameter.keys() != oracle.keys() or norms.methods.keys() != oracle.keys():
            raise AssertionError(f"norms of {sorted(norms.per_parameter)}, the model trains {sorted(oracle)}")
        if not total_of(self.reference).isfinite().all():
            raise AssertionError("the loop's norms are not finite: the case says nothing")
        names = [name for name in oracle if not name.endswith(vanishing)]
        actual = {name: norms.per_parameter[name] for name in names} | {"total": norms.total}
        oracle = {name: oracle[name] for name in names} | {"total": total_of(self.oracle)}
        reference = {name: reference[name] for name in names} | {"total": total_of(self.reference)}
        torch.testing.assert_close(norms.squared, norms.total.square())
        wanted = torch.float64 if self.dtype == torch.float64 else torch.float32
        for name, norm in actual.items():
            if norm.dtype != wanted or norm.requires_grad:
                raise AssertionError(f"{name}: the norms must be detached {wanted}, got {norm}")
            if self.dtype == torch.float32:
                torch.testing.assert_close(norm.double(), oracle[name], rtol=RELATIVE_ERROR, atol=0.0, msg=_named(name))
        check_tensors("norms", actual, reference, oracle, self.dtype)

    def check_grad(
        self, model: nn.Module, reduction: str = "sum", vanishing: tuple[str, ...] = (), factor: float = 1.0
    ) -> None:
        """`.grad` is the ordinary one, times a factor."""
        factor = factor / self.batch if reduction == "mean" else factor
        actual = {}
        for name, parameter in model.named_parameters():
            if (parameter.grad is None) != (self.ordinary.get(name) is None):
                raise AssertionError(f"{name}.grad is {parameter.grad}, the ordinary one {self.ordinary.get(name)}")
            if parameter.grad is not None and not name.endswith(vanishing):
                actual[name] = parameter.grad
        reference = {name: self.ordinary[name] * factor for name in actual}
        oracle = {name: self.oracle[name].sum(0) * factor for name in actual}
        check_tensors(".grad", actual, reference, oracle, self.dtype)


def check_tensors(
    name: str, actual: dict[str, Tensor], reference: dict[str, Tensor], oracle: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The tolerance rule on all of a model's tensors as one slice: the reference's error of a few numbers may be 0."""
    if actual.keys() != oracle.keys():
        raise AssertionError(f"{name}: {sorted(actual)}, the oracle has {sorted(oracle)}")
    if dtype == torch.float64:
        torch.testing.assert_close(actual, oracle)
        return
    flat = [torch.cat([tensors[key].flatten() for key in oracle]) for tensors in (actual, reference, oracle)]
    check_parity(name, flat[0].to(dtype), flat[1].to(dtype), flat[2], factor=GRADIENT_FACTOR)


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def _rows(grads: Grads) -> Tensor:
    """[B, P] in float64."""
    return torch.cat([grad.double().reshape(len(grad), -1) for grad in grads.values()], dim=1)


def _to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)
