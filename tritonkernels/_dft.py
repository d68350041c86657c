"""How a real DFT of one axis folds: an even part for the cosines, an odd part for the sines, and their tables.

x folds into x[j] ± x[n−j]. Where 4 divides n each part folds once more, j with n/2−j, into one class for the even
and one for the odd frequencies: k = classes·i + class. Input n/2 (n/4 if folded twice) and output n/2 of the even
cosines have coefficients (−1)^i: they are the `extra` entry, which the kernels add as sums and no table holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SLOT_PAD, OUT_PAD = 64, 128  # tables are zero-padded to these, so that no tile of a table needs a mask


@dataclass(frozen=True)
class Axis:
    """One axis of length n: `classes` of `slots` entries each, and one extra entry where n is even."""

    n: int

    @property
    def split(self) -> bool:
        return self.n % 4 == 0

    @property
    def classes(self) -> int:
        return 2 if self.split else 1

    @property
    def extra(self) -> bool:
        return self.n % 2 == 0

    @property
    def slots(self) -> int:
        return self.n // 4 if self.split else (self.n + 1) // 2

    @property
    def entries(self) -> int:
        return self.classes * self.slots + self.extra


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@functools.lru_cache(maxsize=64)
def dft_tables(n: int, slots_last: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[parity × class, slots, outputs], or with the last two exchanged, padded with zeros.

    Kept for good, so that a captured graph may hold its address; the first call copies from the host.
    """
    axis = Axis(n)
    slots = outputs = axis.slots
    table = torch.zeros(2 * axis.classes, round_up(slots, SLOT_PAD), round_up(outputs, OUT_PAD), dtype=torch.float64)
    j = torch.arange(slots)[:, None]  # [slots, 1]
    i = torch.arange(outputs)[None, :]  # [1, outputs]
    for parity, function in enumerate((torch.cos, torch.sin)):
        for residue in range(axis.classes):
            # The odd sines have no use for j = 0 but one for j = n/4, which takes its slot.
            used = torch.where(j == 0, slots, j) if parity and residue else j
            angle = (used * (axis.classes * i + residue) % n).double() * (2 * torch.pi / n)
            table[parity * axis.classes + residue, :slots, :outputs] = function(angle)
    if slots_last:
        table = table.transpose(1, 2)
    return table.to(dtype).contiguous().to(device)
