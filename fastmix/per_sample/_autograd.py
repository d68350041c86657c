"""PyTorch's graph, and its ways to run a backward, as a recorder uses them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def without_interception(func: types.FunctionType) -> types.FunctionType:
    """The function's body alone: called with a mode active, the function would only offer itself to the mode."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


run_backward = without_interception(torch.autograd.backward)
run_grad = without_interception(torch.autograd.grad)


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """For results of our own: without a graph, and in the tensors' own dtypes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def nodes_below(
    outputs: Sequence[Tensor | GradientEdge], stop: Callable[[Node], bool] = lambda node: False
) -> Iterator[Node]:
    """The nodes of the outputs' graph, once each, without those at which it stops and what is only below them."""
    pending = [output.grad_fn if isinstance(output, Tensor) else output.node for output in outputs]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen and not stop(node):
            seen.add(node)
            yield node
            pending.extend(parent for parent, _ in node.next_functions)
