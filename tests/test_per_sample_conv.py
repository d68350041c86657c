"""per_sample.grad_norms of convolutions, against the microbatch loop."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix.testing.per_sample import ModelCase, check_case

B, IN, OUT = 3, 4, 6
SPATIAL = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "kernel of 1": {"kernel_size": 1},
    "padding": {"padding": 1},
    "stride that leaves a rest": {"stride": 2},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 3},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": IN, "out_channels": IN},
    "depthwise, two filters": {"groups": IN, "out_channels": 2 * IN, "padding": 1},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "same, dilated": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "valid": {"padding": "valid"},
    "everything": {"kernel_size": 2, "stride": 2, "padding": 2, "dilation": 2, "groups": 2},
}
MODES = ("reflect", "replicate", "circular")


def _case(name, kind, dims, options):
    options = {"kernel_size": 3, "out_channels": OUT} | options
    return ModelCase(
        f"{kind[dims].__name__}, {name}",
        lambda: kind[dims](IN, **options),
        lambda: (torch.randn(B, IN, *SPATIAL[dims]),),
    )


CASES = [
    *(_case(name, CONV, dims, options) for dims, (name, options) in itertools.product(CONV, OPTIONS.items())),
    *(
        _case(f"{mode}, padding {padding}", CONV, dims, {"padding": padding, "padding_mode": mode})
        for dims, mode, padding in itertools.product(CONV, MODES, (1, "same"))
    ),
    _case(
        "strided circular in groups",
        CONV,
        2,
        {"padding": (2, 1), "stride": (2, 1), "padding_mode": "circular", "groups": 2},
    ),
    _case("uneven", CONV, 2, {"kernel_size": (1, 3), "stride": (3, 2), "padding": (0, 2), "dilation": (1, 2)}),
]
CASES += [
    _case(name, TRANSPOSED, dims, options)
    for dims in TRANSPOSED
    for name, options in {
        "plain": {},
        "without bias": {"bias": False},
        "stride": {"stride": 2, "padding": 1},
        "output padding": {"stride": 2, "output_padding": 1},
        "output padding by dilation": {"stride": 1, "dilation": 2, "output_padding": 1},
        "groups": {"groups": 2, "stride": 2},
        "depthwise": {"groups": IN, "out_channels": IN},
        "everything": {"kernel_size": 2, "stride": 3, "padding": 1, "output_padding": 2, "groups": 2, "dilation": 2},
    }.items()
]

SMALL = ModelCase(
    "a small network",
    lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 5),
    ),
    lambda: (torch.randn(B, 1, 8, 8),),
)


@pytest.mark.parametrize("case", [*CASES, SMALL], ids=str)
def test_convolution(case):
    norms = check_case(case)
    assert "generic" not in norms.methods.values()


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.float32, "mean"), (torch.float64, "sum"), (torch.bfloat16, "mean")],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("case", [*CASES[15:30], *CASES[-8:], SMALL], ids=str)
def test_convolution_of_other_types(case, dtype, reduction):
    check_case(case, dtype, reduction)


# By hand


class ByHand(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.function(x, self.weight)


FUNCTIONS = {
    "F.conv2d": (F.conv2d, (OUT, IN, 3, 3)),
    "F.conv2d by name": (lambda x, w: F.conv2d(weight=w, input=x, padding=1), (OUT, IN, 3, 3)),
    "torch.conv2d": (lambda x, w: torch.conv2d(x, w, stride=(2, 1)), (OUT, IN, 3, 3)),
    "torch.convolution": (
        lambda x, w: torch.convolution(x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 2),
        (OUT, IN // 2, 3, 3),
    ),
    "F.conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1), (IN, OUT, 3, 3)),
    "normalised weight": (lambda x, w: F.conv2d(x, w / w.norm()), (OUT, IN, 3, 3)),
    "unfold": (lambda x, w: w.flatten(1) @ F.unfold(x, 3), (OUT, IN, 3, 3)),
    "batch as groups": (
        # A hyper-network's form: every sample has filters of its own, made from one parameter.
        lambda x, w: F.conv2d(
            x.flatten(0, 1)[None], (w * x.mean((2, 3))[:, None, :, None, None]).flatten(0, 1), groups=len(x)
        ).unflatten(1, (len(x), -1))[0],
        (OUT, IN, 3, 3),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_convolution_by_hand(name):
    function, shape = FUNCTIONS[name]
    inputs = (torch.randn(B, IN, 6, 7),)
    check_case(ModelCase(name, lambda: ByHand(function, *shape), lambda: inputs))
