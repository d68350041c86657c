"""Cases of a linear layer's per-sample norms, weighted gradient and Gram matrix; and what every norm may err."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmix
from fastmix.reference import grad_norm as reference
from fastmix.testing.cases import Case

# What a sample's norm may err in float32, relative to itself.
RELATIVE_ERROR = 1e-5

Pair = tuple[Tensor, Tensor]  # input [B, T, I], grad_output [B, T, O]


def check_norms(name: str, norm_sq: Tensor, oracle: Tensor) -> None:
    """Raises AssertionError unless every sample's norm is the oracle's, whatever the other samples' sizes."""
    norm, expected = norm_sq.double().sqrt(), oracle.double().sqrt()
    if not ((norm - expected).abs() <= RELATIVE_ERROR * expected).all():  # a NaN is wrong too
        raise AssertionError(f"{name}: norms {norm.tolist()} instead of {expected.tolist()}")


def linear_case(
    function: str,
    name: str,
    sizes: tuple[int, int, int, int],
    *,
    transform: Callable[[Tensor, Tensor], Pair] = lambda input, grad_output: (input, grad_output),
    **options,
) -> Case:
    """sizes: B, T, I, O; options: the function's own, sample_weight as a list."""
    b, t, i, o = sizes
    if "sample_weight" in options:
        options["sample_weight"] = torch.tensor(options["sample_weight"], dtype=torch.float64)

    def make(generator):
        input, grad_output = (torch.randn(b, t, size, generator=generator, dtype=torch.float64) for size in (i, o))
        input, grad_output = transform(input, grad_output)
        return {"input": input, "grad_output": grad_output, **options}

    # A norm is one number, whose error may be 0 by chance: the slice is the batch, and check_norms looks at each.
    return Case(
        "grad_norm",
        f"{function} {name}",
        getattr(fastmix, function),
        getattr(reference, function),
        make,
        gradients={"input": 1, "grad_output": 1} if function == "linear_grad_norm_sq" else {},
    )


def centred(x: Tensor, groups: int = 1) -> Tensor:
    """With a mean of 0 over the positions, in each of `groups` groups of them, which take turns."""
    for start in range(groups):
        x[:, start::groups] -= x[:, start::groups].mean(1, keepdim=True)
    return x


def nearly_constant(x: Tensor, groups: int = 1) -> Tensor:
    """Positions that differ by 1 % in each of `groups` groups of them, which take turns."""
    constant = x[:, :groups].clone()
    return constant[:, torch.arange(x.shape[1]) % groups] + 0.01 * x


# Σ_t g_t = 0 while all a_t are nearly one vector, and the like: the terms (a_t·a_u)(g_t·g_u) are 10⁴ times their sum,
# of which float32 keeps three digits if they are added as they stand. With two groups no one mean helps.
CANCELLATION: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "nearly constant inputs": lambda a, g: (nearly_constant(a), centred(g)),
    "nearly constant gradients": lambda a, g: (centred(a), nearly_constant(g)),
    "two nearly constant groups": lambda a, g: (nearly_constant(a, 2), centred(g, 2)),
}

FUNCTIONS = ("linear_grad_norm_sq", "linear_weight_grad", "linear_weight_grad_with_norm", "linear_grad_gram")
# Short sequences, for the Gram form, and long ones, for the direct form.
_SIZES = [
    (4, 1, 1, 1), (3, 1, 70, 33), (4, 2, 7, 5), (3, 7, 12, 30), (2, 16, 32, 48), (2, 33, 130, 66), (9, 5, 8, 17),
    (2, 70, 100, 200), (3, 9, 6, 1), (3, 9, 1, 6), (4, 100, 20, 12), (2, 130, 33, 9),
]  # fmt: skip

CASES = [
    *(
        linear_case(function, "x".join(map(str, sizes)), sizes)
        for function in FUNCTIONS
        for sizes in _SIZES
    ),
    *(
        linear_case(function, name, sizes, transform=transform)
        for function in FUNCTIONS
        for name, sizes, transform in [
            ("empty batch", (0, 7, 6, 5), lambda a, g: (a, g)),
            ("no position", (3, 0, 6, 5), lambda a, g: (a, g)),
            ("transposed", (3, 20, 12, 8), lambda a, g: (a.mT.contiguous().mT,
                                                         g.transpose(0, 1).contiguous().transpose(0, 1))),
            ("large values", (4, 20, 12, 30), lambda a, g: (1e3 * a, 1e3 * g)),
            ("small values", (4, 20, 12, 30), lambda a, g: (1e-3 * a, 1e-3 * g)),
            ("large inputs, small gradients", (4, 20, 12, 30), lambda a, g: (1e3 * a, 1e-3 * g)),
            ("a sample of zeros", (3, 20, 12, 30), lambda a, g: (a * torch.tensor([1, 0, 1])[:, None, None], g)),
            *((name, (3, 24, 64, 48), transform) for name, transform in CANCELLATION.items()),
        ]
    ),
    *(
        linear_case("linear_grad_norm_sq", f"without bias, {'x'.join(map(str, sizes))}", sizes, bias=False)
        for sizes in [(4, 1, 9, 5), (3, 7, 12, 30), (2, 33, 130, 66), (4, 100, 20, 12)]
    ),
    *(
        linear_case("linear_grad_norm_sq", f"lengths, {'x'.join(map(str, sizes))}", sizes, bias=bias,
                    lengths=torch.tensor(lengths))
        for sizes, bias, lengths in [
            ((5, 7, 12, 30), True, [7, 1, 0, 3, 6]), ((3, 70, 50, 100), False, [69, 17, 70]),
            ((4, 100, 20, 12), True, [0, 100, 1, 65]), ((3, 5, 6, 4), True, [-2, 9, 3]),
        ]
    ),
    *(
        linear_case(function, f"sample weights, {'x'.join(map(str, sizes))}", sizes, sample_weight=weights)
        for function in ("linear_weight_grad", "linear_weight_grad_with_norm")
        for sizes, weights in [((4, 1, 9, 5), [0.5, 2, 0, 1]), ((3, 40, 33, 17), [0.25, -1, 3]),
                               ((2, 100, 8, 9), [0, 0])]
    ),
    linear_case("linear_grad_gram", "without bias", (5, 6, 9, 7), bias=False),
    linear_case("linear_grad_gram", "many samples", (70, 3, 9, 7)),
    linear_case("linear_grad_gram", "one sample", (1, 20, 9, 7)),
]  # fmt: skip
