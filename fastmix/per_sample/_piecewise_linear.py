"""Finds out whether a function of samples x is piecewise linear, while it runs.

If it is made of products with weights, constants that are added, ReLUs, maxima and the like, and s = 1 multiplies every
constant that is added, then it is homogeneous in (x, s): D(x) = ⟨v, x⟩ + v_s with its gradients v by x and v_s by s,
which depend on x by its pieces alone. Any derivative of D(x) can then be taken through v and v_s.

Functions are intercepted where PyTorch calls them. A known one has a handler, which multiplies its constants by s.
Derivatives, of every order, are always PyTorch's: a function that is not known only ends the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastmix.per_sample._batch import is_in_place, map_tensors, tensors_in
from fastmix.per_sample._double_backward import Conv, LeakyReLU, MaxPool2d, ReLU, Scale


class PiecewiseLinear(TorchFunctionMode):
    """Follows what is computed from x [B, …]. After it, `homogeneous(output)` tells, and `scale` has s [B]."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.batch = len(x)
        self.scale = Scale(x)
        self._holds = self.batch > 0
        # Tensors that are homogeneous in (x, s), with their versions: whoever else writes to one makes it something
        # else. And those that were computed from neither.
        self._signals: WeakIdKeyDictionary = WeakIdKeyDictionary({x: x._version})
        self._constants: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def homogeneous(self, output: Tensor) -> bool:
        return self._holds and self.is_signal(output)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            _refuse_training(*args, **kwargs)
        if func in _DATA and self.is_signal(args[0]):
            self._holds = False
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if _saved_tensors_are_hooked():
            # A checkpoint counts what functions save, and repeats them where nobody intercepts them.
            self._holds = False
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if all(self.is_constant(tensor) for tensor in tensors):
            result = func(*args, **kwargs)
            self._constants.update((output, True) for output in tensors_in(result))
            return result
        if not all(self.is_constant(tensor) or self.is_signal(tensor) for tensor in tensors):
            self._holds = False  # a tensor that came from somewhere else, such as an autograd function
        if is_in_place(func) and all(map(self.is_constant, args[:1])):
            self._holds = False
            self._constants.clear()  # of which it may be a view
        handler = HANDLERS.get(func) if self._holds or func in ALWAYS else None
        result = handler(self, func, *args, **kwargs) if handler and "out" not in kwargs else NotImplemented
        known = result is not NotImplemented
        if not known:
            result = func(*args, **kwargs)
        # A result without gradient (a shape, a mask) is a constant to derivatives.
        outputs = [output for output in tensors_in(result) if output.requires_grad]
        if outputs and not (known and all(output.shape[:1] == (self.batch,) for output in outputs)):
            self._holds = False
        if self._holds:
            self._signals.update((output, output._version) for output in outputs)
        return result

    def is_signal(self, value: object) -> bool:
        return isinstance(value, Tensor) and self._signals.get(value) == value._version

    def is_constant(self, value: object) -> bool:
        """Whether derivatives by x and s see a constant in it."""
        if not isinstance(value, Tensor) or not value.requires_grad or value in self._constants:
            return True
        return value.is_leaf and value is not self.scale.tensor and value not in self._signals

    def scaled(self, constant: Tensor | float, like: Tensor) -> Tensor:
        """s times a constant that is to be added to `like`."""
        scale = self.scale.tensor.to(torch.result_type(like, constant))
        return scale.view(-1, *[1] * (like.ndim - 1)) * constant

    def addend(self, value: Tensor | float, signal: Tensor) -> Tensor | None:
        """What is added to a signal, of its rank, if that leaves samples apart."""
        if not self.is_signal(value):
            if isinstance(value, Tensor):
                if value.ndim > signal.ndim:
                    return None
                value = value if value.requires_grad else value.clone()  # a buffer may be updated before the backward
            return self.scaled(value, signal)
        return value if value.ndim == signal.ndim else None


def _saved_tensors_are_hooked() -> bool:
    """Whether somebody packs what functions save for the backward: a checkpoint that is not reentrant, save_on_cpu."""
    try:
        with disable_saved_tensors_hooks("asked"):
            return False
    except RuntimeError:
        return True


# Writes to it are seen by nobody.
_DATA = {Tensor.data.__get__, Tensor.data.__set__}


def _refuse_training(input, running_mean, running_var, weight=None, bias=None, training=False, *args, **kwargs) -> None:
    if training:
        raise ValueError(
            "discriminator must treat samples apart, got BatchNorm in training, which couples them: call eval(), or "
            "use spectral_norm or another normalisation of weights"
        )


# Handlers: the result, or NotImplemented if the function as it is called is not known to be homogeneous. One argument
# at least is a signal; the others are signals or constants.


def _alone(pieces: PiecewiseLinear, func: Callable, /, *args, **kwargs):
    """Handles each sample, or each channel of it, alone, whatever the rank, and leaves the samples in front."""
    return func(*args, **kwargs)


def _expand(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, *args, **kwargs):
    result = func(input, *args, **kwargs)
    return result if result.ndim == input.ndim else NotImplemented


def _dims(pieces: PiecewiseLinear, func: Callable, /, *args, **kwargs):
    """A function of dimensions: tried on tensors without data, with a number of samples that no other size has."""
    mark = 1 + pieces.batch + max(size for tensor in tensors_in((args, kwargs)) for size in (0, *tensor.shape))

    def marked(tensor: Tensor) -> Tensor:
        shape = (mark, *tensor.shape[1:]) if tensor.requires_grad else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    try:
        results = list(tensors_in(func(*map_tensors(marked, args), **map_tensors(marked, kwargs))))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it names a size of the first dimension
        return NotImplemented
    if any(result.shape[:1] != (mark,) for result in results):
        return NotImplemented
    return func(*args, **kwargs)


def _cat(pieces: PiecewiseLinear, func: Callable, /, tensors: Sequence[Tensor], *args, **kwargs):
    """Constants of the batch's size, such as labels, are multiplied by s."""
    signal = next(tensor for tensor in tensors if pieces.is_signal(tensor))
    if any(tensor.ndim != signal.ndim or len(tensor) != pieces.batch for tensor in tensors):
        return NotImplemented
    return _dims(pieces, func, [pieces.addend(tensor, signal) for tensor in tensors], *args, **kwargs)


def _relu(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, inplace: bool = False):
    inplace = inplace or is_in_place(func)
    # A view can't be changed in place by a function of our own.
    return F.relu(input, inplace) if inplace and input._base is not None else ReLU.apply(input, inplace)


def _leaky_relu(
    pieces: PiecewiseLinear, func: Callable, /, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
):
    inplace = inplace or is_in_place(func)
    # Of a slope that is not positive, the result does not tell the pieces.
    if inplace and (negative_slope <= 0 or input._base is not None):
        return F.leaky_relu(input, negative_slope, inplace)
    return LeakyReLU.apply(input, negative_slope, inplace)


def _prelu(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, weight: Tensor):
    if pieces.is_signal(weight):
        return NotImplemented
    weight = weight.view(-1, *[1] * (input.ndim - 2)) if input.ndim > 1 else weight
    return (input * torch.where(input.detach() > 0, torch.ones_like(weight), weight)).to(input.dtype)


def _hardtanh(
    pieces: PiecewiseLinear, func: Callable, /, input: Tensor, min_val=-1.0, max_val=1.0, inplace: bool = False
):
    if inplace or is_in_place(func):
        return NotImplemented
    inside = (input > min_val) & (input < max_val)
    return torch.where(inside, input, pieces.scaled(F.hardtanh(input.detach(), min_val, max_val), input))


def _relu6(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, inplace: bool = False):
    return _hardtanh(pieces, func, input, 0.0, 6.0, inplace)


def _clamp(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, min=None, max=None):
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return NotImplemented
    clamped = input.detach().clamp(min, max)
    return torch.where(clamped == input, input, pieces.scaled(clamped, input))


def _max_pool2d(
    pieces: PiecewiseLinear,
    func: Callable,
    /,
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    return_indices: bool = False,
):
    if input.ndim != 4 or return_indices:
        return func(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    sizes = [_sizes(size, 2) for size in (kernel_size, stride or kernel_size, padding, dilation)]
    return MaxPool2d.apply(input, *sizes, ceil_mode)


def _conv(
    pieces: PiecewiseLinear, func: Callable, /, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
):
    return _convolution(pieces, input, weight, bias, stride, padding, dilation, None, groups)


def _conv_transpose(
    pieces: PiecewiseLinear,
    func: Callable,
    /,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
):
    return _convolution(pieces, input, weight, bias, stride, padding, dilation, output_padding, groups)


def _convolution(
    pieces: PiecewiseLinear, input: Tensor, weight: Tensor, bias, stride, padding, dilation, output_padding, groups: int
):
    """output_padding: None if it is not transposed."""
    if not (pieces.is_constant(weight) and pieces.is_constant(bias)) or input.ndim != weight.ndim:
        return NotImplemented
    if not (input.is_floating_point() and weight.is_floating_point()):
        return NotImplemented
    spatial = weight.ndim - 2
    stride, dilation = _sizes(stride, spatial), _sizes(dilation, spatial)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        input = F.pad(input, [size for both in reversed(total) for size in (0, both % 2)])
        padding = [both // 2 for both in total]
    transposed = output_padding is not None
    sizes = (stride, _sizes(padding, spatial), dilation, transposed, _sizes(output_padding or 0, spatial), groups)
    tensors = [tensor if tensor is None else _autocast(tensor) for tensor in (input, weight, bias)]
    return Conv.apply(pieces.scale, pieces.scale.tensor, *tensors, *sizes)


def _sizes(value: int | Sequence[int], spatial: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if on and tensor.dtype != torch.float64 else tensor


def _linear(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, weight: Tensor, bias: Tensor | None = None):
    if pieces.is_signal(weight) or pieces.is_signal(bias) or input.ndim < 2:
        return NotImplemented
    output = func(input, weight)
    return output if bias is None else output + pieces.scaled(bias, output).to(output.dtype)


def _matmul(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, other: Tensor, **kwargs):
    constant = other if pieces.is_signal(input) else input
    signal = input if pieces.is_signal(input) else other
    fits = signal.ndim >= (2 if signal is input else 3)
    if kwargs or pieces.is_signal(constant) or constant.ndim > 2 or not fits:
        return NotImplemented
    return func(input, other)


def _add(pieces: PiecewiseLinear, func: Callable, /, input, other, **kwargs):
    """Sums and differences."""
    signal = input if pieces.is_signal(input) else other
    addends = [pieces.addend(value, signal) for value in (input, other)]
    return NotImplemented if any(value is None for value in addends) else func(*addends, **kwargs)


def _mul(pieces: PiecewiseLinear, func: Callable, /, input, other):
    signal, factor = (input, other) if pieces.is_signal(input) else (other, input)
    if pieces.is_signal(factor) or (isinstance(factor, Tensor) and factor.ndim > signal.ndim):
        return NotImplemented
    return func(input, other)


def _div(pieces: PiecewiseLinear, func: Callable, /, input, other, *, rounding_mode: str | None = None):
    return _mul(pieces, func, input, other) if pieces.is_signal(input) and rounding_mode is None else NotImplemented


def _where(pieces: PiecewiseLinear, func: Callable, /, condition, input=None, other=None):
    if func is Tensor.where:
        condition, input = input, condition
    signal = input if pieces.is_signal(input) else other
    if not pieces.is_signal(signal) or input is None or other is None or condition.ndim > signal.ndim:
        return NotImplemented
    values = [pieces.addend(value, signal) for value in (input, other)]
    return NotImplemented if any(value is None for value in values) else torch.where(condition, *values)


def _pad(pieces: PiecewiseLinear, func: Callable, /, input: Tensor, pad, mode: str = "constant", value=None):
    return func(input, pad, mode, value) if len(pad) < 2 * input.ndim and not value else NotImplemented


def _batch_norm(
    pieces: PiecewiseLinear,
    func: Callable,
    /,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
):
    """In evaluation, x·factor + offset."""
    factor = (running_var + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    offset = -running_mean * factor if bias is None else bias - running_mean * factor
    shape = (-1, *[1] * (input.ndim - 2))
    return (input * factor.view(shape) + pieces.scaled(offset.view(shape), input)).to(input.dtype)


def _functions(*names: str) -> set[Callable]:
    """What PyTorch has of these names: functions and methods."""
    return {getattr(place, name) for place in (F, torch, Tensor) for name in names if hasattr(place, name)}


_BY_NAME: dict[Callable, tuple[str, ...]] = {
    _alone: (
        "neg", "positive", "__neg__", "__pos__", "abs", "absolute", "__abs__", "clone", "contiguous",
        "to", "float", "double", "half", "bfloat16", "type_as", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
        "max_pool1d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "interpolate", "pixel_shuffle", "pixel_unshuffle",
    ),
    _expand: ("expand", "expand_as"),
    _dims: (
        "sum", "mean", "amax", "amin", "permute", "transpose", "movedim", "swapaxes", "swapdims", "squeeze",
        "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "repeat", "tile", "__getitem__",
    ),
    _cat: ("cat", "concat", "concatenate", "stack"),
    _relu: ("relu", "relu_"),
    _leaky_relu: ("leaky_relu", "leaky_relu_"),
    _prelu: ("prelu",),
    _hardtanh: ("hardtanh", "hardtanh_"),
    _relu6: ("relu6",),
    _clamp: ("clamp", "clip"),
    _max_pool2d: ("max_pool2d",),
    _conv: ("conv1d", "conv2d", "conv3d"),
    _conv_transpose: ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    _linear: ("linear",),
    _matmul: ("matmul", "mm", "__matmul__", "__rmatmul__"),
    _add: ("add", "add_", "sub", "sub_", "rsub", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__"),
    _mul: ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"),
    _div: ("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"),
    _where: ("where",),
    _pad: ("pad",),
    _batch_norm: ("batch_norm",),
}  # fmt: skip
HANDLERS = {func: handler for handler, names in _BY_NAME.items() for func in _functions(*names)}
# Those that are right, and cheaper, for whatever calls them.
ALWAYS = {func for func, handler in HANDLERS.items() if handler in (_conv, _conv_transpose, _relu, _leaky_relu)}
