"""Where the samples of a batch are in a tensor.

A place is the dimension that counts the samples; or ROWS: along the first dimension, each sample's rows together
([B·T, C]); or INTERLEAVED: along it, a row of each sample in turn ([T·B, C]). A tensor whose first dimension has the
batch's size is taken to have them there unless it is known to have them elsewhere, behind a transposition for example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

ROWS, INTERLEAVED, UNKNOWN = "rows", "interleaved", "unknown"
Place = int | str

_RESHAPE = frozenset(
    {Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.flatten, Tensor.unflatten, torch.reshape, torch.flatten}
)
_MOVE = frozenset(
    {
        Tensor.movedim, Tensor.permute, Tensor.swapaxes, Tensor.swapdims, Tensor.t, Tensor.transpose, Tensor.T.__get__,
        Tensor.mT.__get__, torch.movedim, torch.permute, torch.swapaxes, torch.swapdims, torch.t, torch.transpose,
        torch.cat, torch.concat, torch.einsum, torch.stack, torch.tensordot,
    }
)  # fmt: skip
_REORDER = frozenset(
    {
        Tensor.flip, Tensor.gather, Tensor.index_select, Tensor.roll, Tensor.sort, Tensor.take_along_dim,
        torch.flip, torch.gather, torch.index_select, torch.roll, torch.sort, torch.take_along_dim,
    }
)  # fmt: skip
_BASIC_INDEX = (int, slice, type(None), type(Ellipsis))  # which keep the order


class Batch:
    """The number of samples, None until it is seen, and the places of tensors that do not have them in front."""

    def __init__(self):
        self.size: int | None = None
        self.places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.inside_attention = False  # in multi_head_attention_forward, where the second dimension counts the samples

    def place(self, tensor: Tensor) -> Place | None:
        """None if it is not known."""
        if tensor.ndim == 0:
            return None
        if self.inside_attention:
            if tensor.ndim == 3 and tensor.shape[1] == self.size:
                return 1
            return INTERLEAVED if tensor.ndim == 2 else None
        if tensor in self.places:
            place = self.places[tensor]
            return None if place == UNKNOWN else place
        if self.size is None:
            self.size = tensor.shape[0]
        if tensor.shape[0] == self.size:
            return 0
        return ROWS if self.size == 1 else None

    def by_sample(self, tensor: Tensor, place: Place) -> Tensor:
        """A view with the samples as the first dimension."""
        if isinstance(place, int):
            return tensor.movedim(place, 0)
        each = tensor.shape[0] // max(self.size, 1)
        if place == ROWS:
            return tensor.unflatten(0, (self.size, each))
        return tensor.unflatten(0, (each, self.size)).transpose(0, 1)

    def put(self, tensor: Tensor, place: Place | None) -> None:
        if place != 0 and self.size != 1 and not self.inside_attention:
            self.places[tensor] = UNKNOWN if place is None else place

    def note(self, func: Callable, args: tuple, kwargs: dict, sources: list[Tensor], outputs: list[Tensor]) -> None:
        """Notes the places of outputs = func(*args, **kwargs), of which `sources` are the arguments with samples."""
        if not self.size or self.size == 1 or self.inside_attention:
            return
        source = next((tensor for tensor in sources if tensor in self.places), sources[0])
        place = self.places.get(source, 0 if source.shape[:1] == (self.size,) else None)
        if place is None:
            return
        if place == UNKNOWN or self._reorders(place, func, args, kwargs):
            found = [UNKNOWN] * len(outputs)
        elif func in _RESHAPE:
            found = [self._reshaped(place, source, output) for output in outputs]
        elif place in (0, ROWS, INTERLEAVED) and func not in _MOVE:
            found = [place if output.shape[:1] == source.shape[:1] else None for output in outputs]
        else:
            found = self._moved(place, func, args, kwargs, source, outputs)
        for output, each in zip(outputs, found, strict=True):
            if each is None and place != 0 and output.shape[:1] == source.shape[:1] == (self.size,):
                each = UNKNOWN  # the first dimension has the batch's size, and is another
            if each and output.ndim:
                self.places[output] = each

    def _reshaped(self, place: Place, source: Tensor, output: Tensor) -> Place | None:
        if output.numel() == 0:
            return None
        # Element e belongs to sample (e // inner) % B, before and after.
        shape = source.shape
        inner = math.prod(shape[place + 1 :]) if isinstance(place, int) else math.prod(shape[1:])
        if place == ROWS:
            inner *= shape[0] // self.size
        outer = source.numel() // (self.size * inner)
        shape = output.shape
        for dim, size in enumerate(shape):
            if size == self.size and math.prod(shape[dim + 1 :]) == inner and math.prod(shape[:dim]) == outer:
                return dim
        if outer == 1:
            return ROWS if shape[0] % self.size == 0 else None
        return INTERLEAVED if shape[0] == outer * self.size and math.prod(shape[1:]) == inner else None

    def _moved(
        self, place: Place, func: Callable, args: tuple, kwargs: dict, source: Tensor, outputs: list[Tensor]
    ) -> list[Place | None]:
        """Follows the samples' dimension through func by a size that nothing else has, in tensors without data."""
        if isinstance(place, int) and all(list(x.shape).count(self.size) == 1 for x in (source, *outputs)):
            return [list(output.shape).index(self.size) for output in outputs]  # it has one already
        mark = 7919 * self.size

        def marked(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            own = self.place(tensor)
            if tensor.ndim and own is not None:
                shape[own if isinstance(own, int) else 0] = mark
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        try:
            found = list(tensors_in(func(*map_tensors(marked, args), **map_tensors(marked, kwargs))))
        except (RuntimeError, TypeError, ValueError):
            # It reads values, or fixed sizes of the samples' dimension: a layer behind it will refuse what it is given.
            found = []
        if len(found) != len(outputs):
            return [UNKNOWN] * len(outputs)
        dims = [output.shape.index(mark) if mark in output.shape else None for output in found]
        return dims if isinstance(place, int) else [place if dim == 0 else UNKNOWN for dim in dims]

    def _reorders(self, place: Place, func: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether func changes the order of the samples."""
        dim = place if isinstance(place, int) else 0
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if len(indices) <= dim or any(index is Ellipsis for index in indices[:dim]):
                return False
            index, *others = [indices[dim], *indices[:dim], *indices[dim + 1 :]]
            return not isinstance(index, _BASIC_INDEX) and not self._counts(index, others)
        if func not in _REORDER:
            return False
        given = [*args[1:], *kwargs.values()]
        dims = [
            d for value in given for d in (value if isinstance(value, (tuple, list)) else [value]) if type(d) is int
        ]
        return not dims or dim in [d % args[0].ndim for d in dims]

    def _counts(self, index: object, others: list[object]) -> bool:
        """Whether the index is 0, 1, …, B − 1, along the first dimension of what it and the others are broadcast to."""
        index = torch.as_tensor(index)
        if index.device.type == "meta" or index.dtype == torch.bool or index.shape[:1] != (self.size,):
            return False
        others = [torch.as_tensor(other) for other in others if not isinstance(other, _BASIC_INDEX)]
        if index.numel() != self.size or any(other.ndim > index.ndim for other in others):
            return False
        return index.flatten().tolist() == [*range(self.size)]


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """The same structure with function(tensor) for every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def is_injective(view: Tensor) -> bool:
    """Whether no two elements share memory."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def is_in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE


_IN_PLACE = frozenset(f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"))
