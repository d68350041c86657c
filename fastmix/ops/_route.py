"""The one decision of the package: does a registered kernel answer a call, or the PyTorch reference?

Everything that uses a private PyTorch API is here; tests/test_route.py tries it on every supported version.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastmix import _library

KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# Op → the device types for which a kernel is registered.
kernels: dict[str, frozenset[str]] = {}


# Op → whether its kernels reach the sizes of an input.
_reaches: dict[str, Callable[[Tensor], bool]] = {}


def note_kernels(op: str, reaches: Callable[[Tensor], bool] = lambda x: True) -> None:
    """Records for which devices `fastmix::op` has a kernel. Called once, after all registrations of the op.

    reaches(x) says whether the kernels serve a tensor of x's device and sizes.
    """
    _reaches[op] = reaches
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels[op] = frozenset(key.lower() for key in ("CPU", "CUDA") if has(f"fastmix::{op}", key))


def kernel_answers(op: str, x: Tensor) -> bool:
    """True if `torch.ops.fastmix.<op>` has a kernel for x's device, dtype and sizes and may be called here.

    Under functorch transforms (vmap, jvp, grad, …) and inside a forward-mode AD level the reference answers:
    those see through PyTorch functions, not through an op.
    """
    if x.device.type not in kernels[op]:
        if _library.missing_reason and not torch.compiler.is_compiling():
            _warn_once()
        return False
    return (
        x.dtype in KERNEL_DTYPES
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no public function tells
        and _reaches[op](x)
    )


def needs_gradient(*arguments: object) -> bool:
    """Whether autograd has to know of an op with these arguments."""
    if torch.compiler.is_compiling():  # the quick way can't be traced
        return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments)
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def call(op: torch._ops.OpOverload, *args):
    """op(*args), below autograd where nothing needs a gradient: its Python layer is more than half of a call's cost."""
    if torch.compiler.is_compiling() or needs_gradient(*args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of the first one's device, where autocast is on: for ops that it casts."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)


def data_is_visible(x: Tensor) -> bool:
    """True if x's values may be read: not while compiling or tracing, inside a functorch transform, or capturing a CUDA
    graph, and not of a tensor that has none."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        or x.is_meta
        or isinstance(x, FakeTensor)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"fastmix has no compiled kernels here ({_library.missing_reason}); the PyTorch reference answers, "
        "correct but slower. `fastmix doctor` tells more.",
        stacklevel=4,
    )


def differentiate_backward(op_bwd: str, reference: Callable[..., Tensor], num_inputs: int) -> None:
    """Gives the backward op `fastmix::op_bwd(grad_output, *inputs, …)` its own gradient, from the reference.

    The backward of `reference(*inputs, *options)` is its vector-Jacobian product; differentiating that, as often as
    asked, is double backward. Slower than a kernel, and the same code for every op. The first num_inputs inputs are
    tensors or None, and the op returns a gradient for each (of any size where the input is None or needs none); of what
    follows, tensors are the forward's to keep, and the rest are the reference's options.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: num_inputs + 1])
        ctx.options = [value for value in inputs[num_inputs + 1 :] if not isinstance(value, Tensor)]
        ctx.num_others = len(inputs) - num_inputs - 1
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        grad_output, *inputs = ctx.saved_tensors
        given = [i for i, value in enumerate(inputs) if value is not None]

        def of_given(*values: Tensor) -> Tensor:
            arguments = dict(zip(given, values, strict=True))
            return reference(*map(arguments.get, range(num_inputs)), *ctx.options)

        def reference_bwd(grad_output: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(of_given, *values)[1](grad_output)

        values = [inputs[i] for i in given]
        asked = [grads[i] for i in given]
        cotangents = tuple(
            torch.zeros_like(value) if grad is None or grad.shape != value.shape else grad
            for value, grad in zip(values, asked, strict=True)
        )
        grad_grad_output, *found = torch.func.vjp(reference_bwd, grad_output, *values)[1](cotangents)
        result = dict(zip(given, found, strict=True))
        return grad_grad_output, *map(result.get, range(num_inputs)), *[None] * ctx.num_others

    torch.library.register_autograd(f"fastmix::{op_bwd}", backward, setup_context=setup_context)
