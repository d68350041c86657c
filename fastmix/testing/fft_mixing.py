"""Cases of fourier_mixing and global_filter."""

from __future__ import annotations

import torch

import fastmix
from fastmix.reference import fft_mixing as reference
from fastmix.testing.cases import Case


def _fourier_mixing(name: str, shape: tuple[int, ...], *, lengths=None, norm="backward", transform=None) -> Case:
    def make(generator):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = transform(x) if transform else x
        lengths_tensor = None if lengths is None else torch.tensor(lengths)
        return {"x": x, "norm": norm, "lengths": lengths_tensor}

    return Case(
        "fft_mixing",
        f"fourier_mixing {name}",
        fastmix.fourier_mixing,
        reference.fourier_mixing,
        make,
        independent=len(shape) - 2,
        gradients={"x": len(shape) - 2},
    )


def _global_filter(name: str, shape: tuple[int, ...], *, real_weight=False, transform=None) -> Case:
    def make(generator):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = transform(x) if transform else x
        weight = torch.randn(shape[1], shape[2] // 2 + 1, shape[3], 2, generator=generator, dtype=torch.float64)
        return {"x": x, "weight": weight if real_weight else torch.view_as_complex(weight)}

    return Case(
        "fft_mixing",
        f"global_filter {name}",
        fastmix.global_filter,
        reference.global_filter,
        make,
        independent=1,
        gradients={"x": 1, "weight": 0},
    )


def _with_nan_padding(x: torch.Tensor) -> torch.Tensor:
    x[0, 3:] = float("nan")
    return x


CASES = [
    *(
        _fourier_mixing(f"{s}x{h}", (2, s, h))
        for s, h in [
            (1, 1), (1, 16), (16, 1), (2, 3), (4, 4), (7, 5), (16, 16), (17, 31), (30, 34), (33, 64), (64, 33),
            (100, 48), (121, 26), (127, 20), (197, 12), (128, 96), (22, 254), (1009, 4), (4, 1009),
        ]
    ),
    _fourier_mixing("without batch", (24, 40)),
    _fourier_mixing("four dimensions", (2, 3, 12, 20)),
    _fourier_mixing("empty batch", (0, 12, 20)),
    _fourier_mixing("ortho", (2, 60, 36), norm="ortho"),
    _fourier_mixing("forward", (2, 60, 36), norm="forward"),
    _fourier_mixing("transposed", (2, 36, 60), transform=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    _fourier_mixing("strided", (2, 36, 60), transform=lambda x: x.repeat(1, 1, 2)[:, :, ::2]),
    _fourier_mixing("expanded", (3, 36, 60), transform=lambda x: x[:1].expand(3, 36, 60)),
    _fourier_mixing("constant", (2, 64, 48), transform=lambda x: torch.full_like(x, 0.5)),
    _fourier_mixing("large values", (2, 20, 24), transform=lambda x: x * 1e3),
    _fourier_mixing("small values", (2, 20, 24), transform=lambda x: x * 1e-3),
    _fourier_mixing("lengths", (5, 24, 20), lengths=[24, 0, 1, 17, 23]),
    _fourier_mixing("lengths, ortho", (2, 37, 20), lengths=[37, 20], norm="ortho"),
    _fourier_mixing("lengths, forward", (2, 3, 16, 10), lengths=[[16, 3, 4], [1, 0, 13]], norm="forward"),
    _fourier_mixing("lengths, NaN padding", (2, 12, 10), lengths=[3, 12], transform=_with_nan_padding),
    *(
        _global_filter(f"{h}x{w}x{c}", (3, h, w, c))
        for h, w, c in [
            (1, 1, 1), (1, 4, 3), (4, 1, 3), (2, 2, 8), (3, 5, 17), (5, 6, 16), (7, 7, 33), (14, 14, 48), (17, 3, 9),
            (8, 9, 40), (37, 6, 5),
        ]
    ),
    _global_filter("real weight", (2, 14, 14, 20), real_weight=True),
    _global_filter("empty batch", (0, 6, 6, 8)),
    _global_filter("no channels", (2, 6, 6, 0)),
    _global_filter("strided", (2, 6, 10, 8), transform=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    _global_filter("large values", (2, 6, 6, 8), transform=lambda x: x * 1e3),
]  # fmt: skip
