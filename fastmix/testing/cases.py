"""What an op is tried on: cases that the tests, the benchmarks' parity check and `fastmix parity` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, Margin, check_parity


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    make draws the arguments in float64 on the CPU; floating-point tensors are then rounded to the tested dtype
    (complex ones to complex64), integer tensors stay, and what else has a device (a Trie) moves there. `independent`
    counts the leading dimensions of the output (of each, if there are several) that are slices of their own, and
    `gradients` names the arguments that get a gradient with the same count for each.
    """

    op: str
    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[torch.Generator], dict[str, Any]]
    independent: int = 0
    gradients: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        arguments = self.make(torch.Generator().manual_seed(seed))
        return {name: _place(value, dtype, device) for name, value in arguments.items()}


def check_case(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    function: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> dict[str, Margin]:
    """Values and gradients of `function` (default: the case's own) under the tolerance rule; raises AssertionError."""
    inputs = case.inputs(dtype, device)
    exact = {name: _to_float64(value) for name, value in inputs.items()}
    oracles, oracle_grads = _run(case.reference, exact, case.gradients)
    expected, expected_grads = _run(case.reference, inputs, case.gradients)
    actual, actual_grads = _run(function or case.function, inputs, case.gradients)
    names = ["output", *(f"output {i}" for i in range(1, len(oracles)))]
    margins = {
        name: check_parity(f"{case.name}, {name}", *outputs, independent=case.independent, factor=FORWARD_FACTOR)
        for name, *outputs in zip(names, actual, expected, oracles, strict=True)
    }
    for name, independent in case.gradients.items():
        margins[name] = check_parity(
            f"{case.name}, gradient of {name}",
            actual_grads[name],
            expected_grads[name],
            oracle_grads[name],
            independent=independent,
            factor=GRADIENT_FACTOR,
        )
    return margins


def _run(function, inputs: dict[str, Any], gradients: dict[str, int]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    inputs = {name: _leaf(value) if name in gradients else value for name, value in inputs.items()}
    outputs = function(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not gradients:
        return outputs, {}
    # The same gradients of the outputs for every implementation: drawn in float64, rounded to the narrowest dtype.
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    grad_outputs = [draw.to(torch.bfloat16).to(output) for draw, output in zip(draws, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, [inputs[name] for name in gradients], grad_outputs)
    return tuple(output.detach() for output in outputs), dict(zip(gradients, grads, strict=True))


def _leaf(value: Tensor) -> Tensor:
    """A leaf that requires grad with the value's strides."""
    return value.detach().requires_grad_()


def _place(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value.to(device) if hasattr(value, "to") else value
    if value.is_complex():
        value = value.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    elif value.is_floating_point():
        value = value.to(dtype)
    return value.to(device)


def _to_float64(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128)
    return value.to(torch.float64) if value.is_floating_point() else value
