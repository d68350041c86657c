"""The gradient of a function of samples by its input, and the checks of such functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmix.ops._check import check_tensor, dtype_name

# Their outputs for a sample depend on the batch in training mode, or always if they keep no running statistics.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH_NORMS += (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


def value_and_gradient(name: str, fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """fn's values [B] and their gradients by x [B, …], differentiable if gradients are enabled.

    Args:
        name: what errors call fn.
        fn: x → [B] or [B, 1].
        x: [B, …].
    """
    check_samples("x", x)
    check_function(name, fn)
    if torch.compiler.is_compiling():  # what is compiled has no double backward: this part runs eagerly
        return torch.compiler.disable(_value_and_gradient)(name, fn, x)
    return _value_and_gradient(name, fn, x)


def _value_and_gradient(name: str, fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    differentiable = torch.is_grad_enabled()  # asked first: the end of an inference mode enables gradients
    with torch.inference_mode(False), torch.enable_grad():
        x = as_input(x, keep_graph=differentiable)
        value = check_value(name, fn(x), len(x))
        gradient = gradient_of(name, value, x, create_graph=differentiable)
    return value if differentiable else value.detach(), gradient


def as_input(x: Tensor, *, keep_graph: bool) -> Tensor:
    """x itself if it requires a gradient that is to flow on, else a leaf of its own with x's values."""
    if keep_graph and x.requires_grad:
        return x
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def gradient_of(name: str, value: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}'s output must depend on x through differentiable functions, got one that does not")
    return gradient


def check_samples(name: str, value: object) -> None:
    check_tensor(name, value)
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be a floating-point or complex tensor, got {dtype_name(value.dtype)}")
    if value.ndim == 0:
        raise ValueError(f"{name} must be [B, ...], the samples along the first dimension, got a scalar")


def check_value(name: str, value: object, batch: int) -> Tensor:
    """[B]"""
    check_tensor(f"{name}'s output", value)
    if value.shape not in ((batch,), (batch, 1)):
        shapes = f"[B] or [B, 1], one value a sample of the B = {batch}"
        raise ValueError(f"{name}'s output must be {shapes}, got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}'s output must be a real floating-point tensor, got {dtype_name(value.dtype)}")
    return value if value.ndim == 1 else value.squeeze(1)


def check_function(name: str, fn: Callable) -> None:
    """That no layer couples samples. fn may be a module or a method of one; what another function calls is unknown."""
    if not callable(fn):
        raise TypeError(f"{name} must be callable, got {type(fn).__name__}")
    module = getattr(fn, "__self__", fn)
    for path, layer in module.named_modules() if isinstance(module, nn.Module) else ():
        if isinstance(layer, _BATCH_NORMS) and (layer.training or layer.running_mean is None):
            mode = "is in training mode" if layer.training else "keeps no running statistics"
            raise ValueError(
                f"{name} has the layer {path or type(layer).__name__!r}, a {type(layer).__name__} that {mode}, where a "
                "sample's output depends on the rest of the batch: there are no per-sample gradients; use its eval "
                "mode with running statistics, or GroupNorm or LayerNorm"
            )
