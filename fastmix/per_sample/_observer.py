"""What a recorder leaves in the graph: hooks of functions' outputs, and its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from fastmix.per_sample._autograd import nodes_below
from fastmix.per_sample._contributions import Contribution

if TYPE_CHECKING:
    from fastmix.per_sample._recorder import Recorder


class Observer:
    """A hook of a function's output: takes down what the function gives its parameters in a backward."""

    def __init__(
        self, recorder: Recorder, targets: list[Tensor], contributions: Callable[[Tensor], list[Contribution]]
    ):
        self.recorder, self.targets, self.contributions = recorder, targets, contributions

    def __call__(self, grad: Tensor | None) -> None:
        if self.recorder.pulling or grad is None:
            return  # a vector-Jacobian product of our own passes by, or nothing
        if self.recorder.is_spent:
            return
        self.recorder.check_backward()
        if self.contributions is None:
            raise RuntimeError("a second backward through the same graph needs retain_graph=True in the first one")
        for target, contribution in zip(self.targets, self.contributions(grad), strict=True):
            self.recorder.receive(target, contribution, need_total=False)
        if self.recorder.running and not self.recorder.retain:
            self.release()

    def release(self) -> None:
        self.targets = self.contributions = None


def recorder_of(losses: Tensor, parameters: Mapping[str, Tensor]) -> Recorder | None:
    """The recorder in whose block the losses' forward ran, if it follows these parameters."""
    for node in nodes_below([losses]):
        recorder = node.metadata.get("fastmix.per_sample")
        if recorder is not None and recorder.follows(parameters):
            return recorder
    return None
