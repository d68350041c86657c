"""Cases of conv_weight_grad_with_norm, conv_weight_grad_sample and conv_grad_norm_sq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmix
from fastmix.reference import conv_grad_norm as reference
from fastmix.testing.cases import Case


def conv_case(
    name: str,
    shape: tuple[int, ...],
    out_channels: int,
    kernel_size: tuple[int, ...],
    *,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Case:
    """shape: of input; options: the convolution's (an int holds for all dimensions), and the function's own:
    sample_weight as a list, or bias, which makes it a case of conv_grad_norm_sq."""
    spatial = len(kernel_size)
    sizes = {key: _tuple(options.pop(key, default), spatial) for key, default in _DEFAULTS.items()}
    if "sample_weight" in options:
        options["sample_weight"] = torch.tensor(options["sample_weight"], dtype=torch.float64)
    output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(shape[2:], kernel_size, *sizes.values(), strict=True)
    ]

    def make(generator):
        input = torch.randn(shape, generator=generator, dtype=torch.float64)
        grad_output = torch.randn(shape[0], out_channels, *output, generator=generator, dtype=torch.float64)
        tensors = {"input": transform(input), "grad_output": transform(grad_output)}
        return {**tensors, "kernel_size": kernel_size, **sizes, **options}

    only_norms = "bias" in options
    function = fastmix.conv_grad_norm_sq if only_norms else fastmix.conv_weight_grad_with_norm
    # A norm is one number, whose error may be 0 by chance: the slice is the batch.
    return Case(
        "conv_grad_norm",
        f"{function.__name__} {name}",
        function,
        _reference_norm_sq if only_norms else reference.conv_weight_grad_with_norm,
        make,
    )


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def _tuple(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else value


def _reference_norm_sq(input: Tensor, grad_output: Tensor, kernel_size, *, bias: bool, **options) -> Tensor:
    _, norm_sq = reference.conv_weight_grad_with_norm(input, grad_output, kernel_size, **options)
    return norm_sq + grad_output.to(norm_sq.dtype).flatten(2).sum(2).square().sum(1) if bias else norm_sq


CASES = [
    conv_case("1d", (3, 5, 20), 7, (3,)),
    conv_case("1d, kernel 1", (3, 6, 9), 4, (1,)),
    conv_case("1d, kernel as long as the input", (3, 4, 9), 5, (9,)),
    conv_case("1d, stride and padding", (3, 4, 23), 6, (5,), stride=3, padding=2),
    conv_case("1d, depthwise", (3, 40, 30), 40, (7,), padding=3, groups=40),
    conv_case("1d, dilated, grouped", (2, 12, 40), 18, (4,), dilation=3, groups=6),
    conv_case("2d", (4, 3, 12, 12), 8, (3, 3), padding=1),
    conv_case("2d, many channels", (2, 40, 9, 9), 33, (3, 3), padding=1),
    conv_case("2d, kernel 1", (3, 17, 7, 6), 20, (1, 1)),
    conv_case("2d, kernel 1, stride", (3, 8, 9, 10), 12, (1, 1), stride=2),
    conv_case("2d, one pixel", (4, 6, 1, 1), 5, (3, 3), padding=1),
    conv_case("2d, one channel", (3, 1, 9, 8), 1, (3, 3)),
    conv_case("2d, even kernel, uneven options", (3, 4, 11, 14), 5, (2, 4), stride=(1, 2), padding=(1, 0)),
    conv_case("2d, a rest behind the last stride", (3, 4, 12, 13), 5, (3, 3), stride=(2, 4)),
    conv_case("2d, stride wider than the kernel", (3, 4, 12, 13), 5, (2, 1), stride=5),
    conv_case("2d, patches", (3, 3, 16, 16), 24, (4, 4), stride=4),
    conv_case("2d, dilated", (3, 4, 15, 14), 5, (3, 3), dilation=(2, 3), padding=(2, 3)),
    conv_case("2d, dilated, stride, a rest", (3, 4, 16, 15), 6, (3, 2), stride=3, dilation=2, padding=1),
    conv_case("2d, padding wider than the kernel", (2, 3, 5, 6), 4, (2, 2), padding=3),
    conv_case("2d, grouped", (3, 6, 9, 8), 9, (3, 3), padding=1, groups=3),
    conv_case("2d, two groups", (3, 20, 9, 8), 34, (3, 3), padding=1, stride=2, groups=2),
    conv_case("2d, depthwise", (3, 19, 9, 8), 19, (3, 3), padding=1, groups=19),
    conv_case("2d, depthwise with a multiplier", (3, 6, 9, 8), 18, (5, 5), padding=2, stride=2, groups=6),
    conv_case("3d", (3, 3, 5, 6, 7), 4, (2, 3, 3), padding=(0, 1, 1)),
    conv_case("3d, stride, dilated, grouped", (2, 4, 9, 8, 7), 6, (3, 2, 2), stride=(2, 1, 3), dilation=(1, 2, 1),
              padding=1, groups=2),
    conv_case("3d, kernel 1", (3, 5, 3, 4, 2), 6, (1, 1, 1)),
    conv_case("sample weights", (4, 4, 9, 8), 6, (3, 3), padding=1, sample_weight=[0.5, 0, -1, 3]),
    conv_case("sample weights, grouped", (3, 4, 30), 6, (3,), groups=2, sample_weight=[2, 1, 0.25]),
    conv_case("one sample", (1, 3, 12, 12), 8, (3, 3), padding=1),
    conv_case("empty batch", (0, 3, 6, 6), 4, (3, 3)),
    conv_case("channels last", (3, 6, 9, 8), 10, (3, 3), padding=1,
              transform=lambda x: x.contiguous(memory_format=torch.channels_last)),
    conv_case("channels last, one pixel", (3, 24, 1, 1), 72, (3, 3), padding=1,
              transform=lambda x: x.contiguous(memory_format=torch.channels_last)),
    conv_case("large values", (3, 6, 9, 8), 10, (3, 3), transform=lambda x: 1e3 * x),
    conv_case("small values", (3, 6, 9, 8), 10, (3, 3), transform=lambda x: 1e-3 * x),
    *(
        conv_case(f"{len(kernel)}d{'' if bias else ' without bias'}", shape, 6, kernel, bias=bias, padding=1, **options)
        for shape, kernel, bias, options in [
            ((3, 4, 15), (3,), True, {}), ((3, 4, 15), (3,), False, {"groups": 2}),
            ((3, 4, 9, 8), (3, 2), True, {"stride": 2}), ((3, 4, 9, 8), (3, 3), False, {"dilation": 2}),
            ((2, 3, 5, 4, 6), (2, 2, 3), True, {"groups": 3}),
        ]
    ),
]  # fmt: skip
