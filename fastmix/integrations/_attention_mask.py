"""transformers' attention masks as structure: what is attended by rule, and which keys are padding.

Imports transformers: `fastmix.integrations.transformers` does so when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


class Band(NamedTuple):
    """Query at p and key at j attend where p − left ≤ j ≤ p + right; None is unlimited."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Band) -> Band:
        return Band(_smaller(self.left, other.left), _smaller(self.right, other.right))

    def __bool__(self) -> bool:
        raise TypeError("whether a query and a key attend depends on their places")

    # What transformers' and_masks asks of a tensor.
    device = None

    def to(self, device: None) -> Band:
        return self


def _smaller(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


@dataclass(frozen=True, eq=False)
class _Place:
    """key · j + query · p + constant, of which a mask function is told in place of the indices j and p.

    Comparing two gives the Band where it holds; whatever else is done to it fails, and the mask is built densely.
    """

    key: int
    query: int
    constant: int = 0

    def __add__(self, other: _Place | int) -> _Place:
        if isinstance(other, _Place):
            return _Place(self.key + other.key, self.query + other.query, self.constant + other.constant)
        return _Place(self.key, self.query, self.constant + _as_int(other))

    def __neg__(self) -> _Place:
        return _Place(-self.key, -self.query, -self.constant)

    def __sub__(self, other: _Place | int) -> _Place:
        return self + (-other if isinstance(other, _Place) else -_as_int(other))

    def __abs__(self) -> _Distance:
        return _Distance(self)

    def __ge__(self, other: _Place | int) -> Band:
        difference = self - other
        places = (difference.key, difference.query)
        if places == (1, -1):
            return Band(left=difference.constant)
        if places == (-1, 1):
            return Band(right=difference.constant)
        if places in ((1, 0), (0, 1)) and difference.constant >= 0:  # an index is never negative
            return Band()
        raise TypeError("not a comparison of a query's place with a key's")

    def __gt__(self, other: _Place | int) -> Band:
        return self - 1 >= other

    def __le__(self, other: _Place | int) -> Band:
        return -self >= (-other if isinstance(other, _Place) else -_as_int(other))

    def __lt__(self, other: _Place | int) -> Band:
        return self + 1 <= other

    def __eq__(self, other: object) -> Band:
        raise TypeError("equality is no band")

    __hash__ = None

    def new_ones(self, size: tuple[()], dtype: torch.dtype) -> Band:
        return Band()


@dataclass(frozen=True)
class _Distance:
    difference: _Place

    def __le__(self, other: int) -> Band:
        return (self.difference <= other) & (self.difference >= -_as_int(other))

    def __lt__(self, other: int) -> Band:
        return self <= _as_int(other) - 1


def _as_int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} is no constant distance")
    return value


def band_of(mask_function: Callable) -> Band | None:
    """The band that a mask function of transformers describes, or None if it is something else."""
    if mask_function is causal_mask_function:
        return Band(right=0)
    # A function that does anything but compare places fails, in one way or another; the dense mask is then made by the
    # same function on tensors, where an error of its own shows.
    try:
        band = mask_function(None, None, _Place(key=0, query=1), _Place(key=1, query=0))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    is_band = isinstance(band, Band) and min(band.left or 0, band.right or 0) >= 0
    return band if is_band else None


class StructuredMask(torch.Tensor):
    """A bool mask [B, 1, T, S] that is never built, unless somebody computes with it: then it is an ordinary mask.

    Query i stands at p_i = i, or, bottom_right, at i + n − T with n = key_lengths, or S. It attends to the keys of the
    band around p_i that are no padding.

    Attributes:
        band: what is attended around p_i.
        bottom_right: which p_i.
        key_mask: bool [B, S], False for padding; [B, 0] if there is none.
        key_start: int32 [B], the first key that is no padding, or None.
        key_lengths: int32 [B], no key from here on is attended, or None.
    """

    # Straight to __torch_dispatch__, which sees every operation that reads the mask's values.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, q_length, kv_length, band, bottom_right, key_mask, key_start=None, key_lengths=None):
        shape = (key_mask.shape[0], 1, q_length, kv_length)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=key_mask.device)

    def __init__(
        self,
        q_length: int,
        kv_length: int,
        band: Band,
        bottom_right: bool,
        key_mask: Tensor,
        key_start: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ):
        self.band, self.bottom_right = band, bottom_right
        self.key_mask, self.key_start, self.key_lengths = key_mask, key_start, key_lengths

    def __repr__(self) -> str:
        return f"StructuredMask({list(self.shape)}, {self.band}, bottom_right={self.bottom_right})"

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(_IN_PLACE)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["key_mask", "key_start", "key_lengths"]
        return [name for name in names if getattr(self, name) is not None], (self.band, self.bottom_right)

    @staticmethod
    def __tensor_unflatten__(tensors, rules, size, stride) -> StructuredMask:
        return StructuredMask(size[2], size[3], *rules, **tensors)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in _KEEP_STRUCTURE and kwargs.get("dtype") in (None, torch.bool):
            mask = args[0]
            kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
            names, rules = mask.__tensor_flatten__()
            tensors = {name: func(getattr(mask, name), *args[1:], **kwargs) for name in names}
            return cls.__tensor_unflatten__(tensors, rules, mask.shape, None)
        if func._schema.is_mutable:  # would be lost in a copy
            raise RuntimeError(_IN_PLACE)
        return func(*_without_structure(args), **{name: _without_structure(value) for name, value in kwargs.items()})

    def dense(self) -> Tensor:
        """The same mask as an ordinary tensor, bool [B, 1, T, S]."""
        t, s = self.shape[2:]
        keys = torch.arange(s, device=self.device)
        places = torch.arange(t, device=self.device)[:, None]
        if self.bottom_right:
            places = places + ((s if self.key_lengths is None else self.key_lengths[:, None, None, None]) - t)
        mask = torch.ones((), dtype=torch.bool, device=self.device)
        if self.band.left is not None:
            mask = mask & (keys >= places - self.band.left)
        if self.band.right is not None:
            mask = mask & (keys <= places + self.band.right)
        if self.key_lengths is not None:
            mask = mask & (keys < self.key_lengths[:, None, None, None])
        if self.key_mask.shape[1]:
            mask = mask & self.key_mask[:, None, None, :]
        return mask.expand(self.shape)


_IN_PLACE = 'attention_mask must not be changed in place with attn_implementation="fastmix": clone() it before'
_KEEP_STRUCTURE = ("aten::alias", "aten::detach", "aten::_to_copy")


def _without_structure(argument: Any) -> Any:
    if isinstance(argument, StructuredMask):
        return argument.dense()
    return [_without_structure(item) for item in argument] if isinstance(argument, (list, tuple)) else argument


def attention_options(mask: StructuredMask) -> dict[str, Any]:
    """The same as arguments of `fastmix.scaled_attention`. No method: torch.compile would not trace into it."""
    left, right = mask.band
    limited = left is not None or right not in (None, 0)
    return {
        "attn_mask": mask.key_mask[:, None, None, :] if mask.key_mask.shape[1] else None,
        "is_causal": right == 0,
        "causal_alignment": "bottom_right" if mask.bottom_right else "top_left",
        "window_size": (-1 if left is None else left, right or -1) if limited else None,
        "key_start": mask.key_start,
        "key_lengths": mask.key_lengths,
    }


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """transformers' mask function: a StructuredMask for bands with padding, a dense bool mask for everything else.

    Nothing is read on the host, so it does not wait for a GPU.
    """
    band = None if use_vmap or _may_read_tables(q_length, **kwargs) else band_of(mask_function)
    # Place of the first query among the keys at hand; where everything is attended it does not matter.
    offset = 0 if band == Band() else q_offset - kv_offset
    is_known = not isinstance(offset, Tensor)
    if band is None or not _is_expressible(band, offset, q_length, kv_length):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap}
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)

    key_start = key_lengths = None
    key_mask = torch.empty((batch_size, 0), dtype=torch.bool, device=device)
    if attention_mask is not None:
        key_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        missing = kv_length - key_mask.shape[1]
        if missing > 0:  # slots of a static cache that no token has reached
            key_mask = F.pad(key_mask, (0, missing))
        key_start, key_lengths = _ends_of_padding(key_mask)
    bottom_right = not is_known or offset != 0
    if bottom_right:  # by this the last query stands at the last key
        key_lengths = None
        if not is_known or offset + q_length != kv_length:
            key_lengths = torch.full((batch_size,), q_length, dtype=torch.int32, device=device)
            key_lengths = (key_lengths + offset).to(torch.int32)
    if is_known:
        band = _what_limits(band, offset, q_length, kv_length)
    return StructuredMask(q_length, kv_length, band, bottom_right, key_mask, key_start, key_lengths)


def _may_read_tables(q_length: int, **kwargs) -> bool:
    """Packed sequences and blocks are told by tables, which can't be indexed by a `_Place` under torch.compile.

    There their only sign is that the causal mask must not be skipped.
    """
    is_causal = "allow_is_bidirectional_skip" not in kwargs
    return torch.compiler.is_compiling() and is_causal and q_length > 1 and not kwargs["allow_is_causal_skip"]


def _is_expressible(band: Band, offset: int | Tensor, q_length: int, kv_length: int) -> bool:
    """Where the last query does not stand at the last key, key_lengths says where, and cuts off the keys behind."""
    if isinstance(offset, Tensor):
        return band.right == 0
    last = offset + q_length
    return offset == 0 or last == kv_length or (band.right == 0 and 0 <= last <= kv_length)


def _what_limits(band: Band, offset: int, q_length: int, kv_length: int) -> Band:
    """Without the sides on which all keys are within reach: a single query's causal mask, a window that is not full."""
    left, right = band
    if left is not None and left >= offset + q_length - 1:
        left = None
    if right is not None and offset + right >= kv_length - 1:
        right = None
    return Band(left, right)


def _ends_of_padding(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """key_start and key_lengths, int32 [B], from bool [B, S]; padding between is left to key_mask."""
    s = key_mask.shape[1]
    counted = torch.arange(1, s + 1, dtype=torch.int32, device=key_mask.device)
    return s - (key_mask * counted.flip(0)).amax(1), (key_mask * counted).amax(1)
