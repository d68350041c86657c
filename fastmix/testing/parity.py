"""The one tolerance rule: a kernel may err as the reference errs in the same dtype, and by the dtype's rounding.

    err(actual, oracle) ≤ c · (err(reference in the dtype, oracle) + eps(dtype) · size(oracle))

for the maximum and for the root mean square, in every slice that the op declares independent (a sample, a row of
norms), with c = 2 for values and 3 for gradients. The oracle is the reference in float64 on the same rounded inputs.
There are no other tolerances in this package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3


@dataclass(frozen=True)
class Margin:
    """How much of the allowed error was used in the worst slice: at most 1 is within tolerance."""

    maximum: float
    root_mean_square: float

    @property
    def worst(self) -> float:
        return max(self.maximum, self.root_mean_square)


def check_parity(
    name: str,
    actual: Tensor,
    reference: Tensor,
    oracle: Tensor,
    *,
    independent: int = 0,
    factor: float = FORWARD_FACTOR,
) -> Margin:
    """Raises AssertionError unless `actual` keeps the tolerance rule.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        reference: the reference's result in the same dtype.
        oracle: the reference's result in float64 (complex128).
        independent: the number of leading dimensions whose elements are slices of their own.
        factor: c of the rule.

    Returns:
        The share of the allowed error that was used.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, the reference has {list(oracle.shape)}")
    if actual.dtype != reference.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, the reference has {reference.dtype}")
    eps = torch.finfo(actual.dtype).eps
    actual, reference, oracle = (_real_rows(t, independent) for t in (actual, reference, oracle))
    if oracle.numel() == 0:
        return Margin(0.0, 0.0)
    # A finite float64 value may be infinite in the dtype: then the reference decides where infinities belong.
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(kind(actual), kind(reference)):
            raise AssertionError(f"{name}: {kind.__name__} at other places than the reference")
    finite = reference.isfinite()
    actual, reference, oracle = (torch.where(finite, t, 0) for t in (actual, reference, oracle))

    shares = []
    for measure in (_maximum, _root_mean_square):
        reference_error, size = measure(reference - oracle), measure(oracle)
        bound = factor * (reference_error + eps * size)
        error = measure(actual - oracle)
        if not bound.isfinite().all():
            raise AssertionError(f"{name}: the bound is not finite")
        # Where nothing is allowed (the oracle is all zeros), nothing may differ.
        share = torch.where(error == 0, 0.0, error / bound)
        row = int(share.argmax())
        if error[row] > bound[row]:
            raise AssertionError(
                f"{name}: {measure.__name__.strip('_').replace('_', ' ')} error {error[row]:.3e} in slice {row} "
                f"exceeds the bound {bound[row]:.3e} = {factor} · (reference's error {reference_error[row]:.3e} + "
                f"eps {eps:.1e} · size {size[row]:.3e})"
            )
        shares.append(float(share[row]))
    return Margin(*shares)


def _real_rows(tensor: Tensor, independent: int) -> Tensor:
    """[slices, elements] in float64, complex numbers as pairs."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    slices = 1
    for size in tensor.shape[:independent]:
        slices *= size
    return tensor.to(torch.float64).reshape(slices, -1) if tensor.numel() else tensor.new_empty(0, 0)


def _maximum(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1)


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=1).sqrt()
