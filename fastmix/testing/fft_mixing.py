"""Cases of fourier_mixing and global_filter."""

from __future__ import annotations

import torch

import fastmix
from fastmix.reference import fft_mixing as reference
from fastmix.testing.cases import Case


def fourier_mixing_case(name: str, shape: tuple[int, ...], *, transform=None, lengths=None, **options) -> Case:
    """options: further arguments of the call, if not the defaults."""

    def make(generator):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        arguments = {"x": transform(x) if transform else x, **options}
        return arguments if lengths is None else arguments | {"lengths": torch.tensor(lengths)}

    return Case(
        "fft_mixing",
        f"fourier_mixing {name}",
        fastmix.fourier_mixing,
        reference.fourier_mixing,
        make,
        independent=len(shape) - 2,
        gradients={"x": len(shape) - 2},
    )


def global_filter_case(name: str, shape: tuple[int, ...], *, real_weight=False, transform=None) -> Case:
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
        fourier_mixing_case(f"{s}x{h}", (2, s, h))
        for s, h in [
            (1, 1), (1, 16), (16, 1), (2, 3), (4, 4), (7, 5), (16, 16), (17, 31), (30, 34), (33, 64), (64, 33),
            (100, 48), (121, 26), (127, 20), (197, 12), (128, 96), (22, 254), (1009, 4), (4, 1009),
        ]
    ),
    fourier_mixing_case("without batch", (24, 40)),
    fourier_mixing_case("four dimensions", (2, 3, 12, 20)),
    fourier_mixing_case("empty batch", (0, 12, 20)),
    fourier_mixing_case("ortho", (2, 60, 36), norm="ortho"),
    fourier_mixing_case("forward", (2, 60, 36), norm="forward"),
    fourier_mixing_case("transposed", (2, 36, 60), transform=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    fourier_mixing_case("strided", (2, 36, 60), transform=lambda x: x.repeat(1, 1, 2)[:, :, ::2]),
    fourier_mixing_case("expanded", (3, 36, 60), transform=lambda x: x[:1].expand(3, 36, 60)),
    fourier_mixing_case("constant", (2, 64, 48), transform=lambda x: torch.full_like(x, 0.5)),
    fourier_mixing_case("large values", (2, 20, 24), transform=lambda x: x * 1e3),
    fourier_mixing_case("small values", (2, 20, 24), transform=lambda x: x * 1e-3),
    fourier_mixing_case("lengths", (5, 24, 20), lengths=[24, 0, 1, 17, 23]),
    fourier_mixing_case("lengths, ortho", (2, 37, 20), lengths=[37, 20], norm="ortho"),
    fourier_mixing_case("lengths, forward", (2, 3, 16, 10), lengths=[[16, 3, 4], [1, 0, 13]], norm="forward"),
    fourier_mixing_case("lengths, NaN padding", (2, 12, 10), lengths=[3, 12], transform=_with_nan_padding),
    *(
        global_filter_case(f"{h}x{w}x{c}", (3, h, w, c))
        for h, w, c in [
            (1, 1, 1), (1, 4, 3), (4, 1, 3), (2, 2, 8), (3, 5, 17), (5, 6, 16), (7, 7, 33), (14, 14, 48), (17, 3, 9),
            (8, 9, 40), (37, 6, 5),
        ]
    ),
    global_filter_case("real weight", (2, 14, 14, 20), real_weight=True),
    global_filter_case("empty batch", (0, 6, 6, 8)),
    global_filter_case("no channels", (2, 6, 6, 0)),
    global_filter_case("strided", (2, 6, 10, 8), transform=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    global_filter_case("large values", (2, 6, 6, 8), transform=lambda x: x * 1e3),
]  # fmt: skip
