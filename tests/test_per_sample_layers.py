"""per_sample.grad_norms of products, tables, normalisations and bare parameters, against the microbatch loop."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix import per_sample
from fastmix.testing.per_sample import Expected, ModelCase, check_case, check_norms, weighted_losses

B, T, C, N, V = 3, 5, 4, 7, 11  # samples, positions, channels in and out, vocabulary


class Function(nn.Module):
    """function(x, *parameters of the given shapes), under the names p0, p1, …"""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.names = [f"p{i}" for i in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(x, *(getattr(self, name) for name in self.names))


def floats(*shape):
    return lambda: (torch.randn(shape),)


def ids(*shape, high=V):
    return lambda: (torch.randint(0, high, shape),)


def function(name, function, *shapes, inputs=None):
    return ModelCase(name, lambda: Function(function, *shapes), inputs or floats(B, T, C))


def module(name, make, inputs=None):
    return ModelCase(name, make, inputs or floats(B, T, C))


LINEAR = [
    module("linear [B, C]", lambda: nn.Linear(C, N), floats(B, C)),
    module("linear [B, T, C]", lambda: nn.Linear(C, N)),
    module("linear [B, H, W, C]", lambda: nn.Linear(C, N), floats(B, 2, 3, C)),
    module("linear, T = 1", lambda: nn.Linear(C, N), floats(B, 1, C)),
    module("linear, B = 1", lambda: nn.Linear(C, N), floats(1, T, C)),
    module("linear, B = T = C", lambda: nn.Linear(4, 4), floats(4, 4, 4)),
    module("linear, T = 2 B", lambda: nn.Linear(C, N), floats(B, 2 * B, C)),
    module("linear without bias", lambda: nn.Linear(C, N, bias=False)),
    module("linear to 1", lambda: nn.Linear(C, 1)),
    module("linear of 1", lambda: nn.Linear(1, N), floats(B, T, 1)),
    module("wide linear, direct form", lambda: nn.Linear(3, 2), floats(B, 40, 3)),
    module("two linears", lambda: nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, N))),
    module("bilinear", lambda: Function(lambda x, w, b: F.bilinear(x, x.sin(), w, b), (N, C, C), (N,))),
    module("bilinear module", lambda: nn.Bilinear(C, 6, N), lambda: (torch.randn(B, T, C), torch.randn(B, T, 6))),
]

PRODUCTS = [
    function("x @ w", lambda x, w: x @ w, (C, N)),
    function("x @ w.t()", lambda x, w: x @ w.t(), (N, C)),
    function("x @ w + b", lambda x, w, b: x @ w + b, (C, N), (N,)),
    function("matmul", lambda x, w: torch.matmul(x, w), (C, N)),
    function("Tensor.matmul", lambda x, w: x.matmul(w), (C, N)),
    function("x @ vector", lambda x, w: x @ w, (C,)),
    function("w @ x.mT", lambda x, w: w @ x.mT, (N, C)),
    function("x @ w[B, C, N] of an expanded w", lambda x, w: x @ w.expand(len(x), -1, -1), (C, N)),
    function("mm", lambda x, w: torch.mm(x, w), (C, N), inputs=floats(B, C)),
    function("addmm", lambda x, b, w: torch.addmm(b, x, w), (N,), (C, N), inputs=floats(B, C)),
    function("addmm beta", lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2), (N,), (C, N), inputs=floats(B, C)),
    function("addmm of [1, N]", lambda x, b, w: torch.addmm(b, x, w), (1, N), (C, N), inputs=floats(B, C)),
    function("baddbmm", lambda x, w: torch.baddbmm(x, x, w.expand(len(x), -1, -1)), (C, C)),
    function("einsum", lambda x, w: torch.einsum("btc,oc->bto", x, w), (N, C)),
    function("einsum over positions", lambda x, w: torch.einsum("btc,ts->bsc", x, w), (T, 6)),
    function("F.linear", lambda x, w, b: F.linear(x, w, b), (N, C), (N,)),
    function("F.linear by name", lambda x, w, b: F.linear(input=x, weight=w, bias=b), (N, C), (N,)),
    function("F.linear of a slice", lambda x, w, b: F.linear(x, w[1:4], b[1:4]), (N, C), (N,)),
    function("F.linear of a chunk", lambda x, w: F.linear(x, w.chunk(2)[1]), (6, C)),
    function("F.linear of a scaled weight", lambda x, w, s: F.linear(x, w * s), (N, C), (N, 1)),
    function("F.linear, frozen bias", lambda x, w, b: F.linear(x, w, b.detach()), (N, C), (N,)),
    function("F.linear of the input's own making", lambda x, w: F.linear(x @ w, w), (C, C)),
    function("tensordot", lambda x, w: torch.tensordot(x, w, dims=([2], [0])), (C, N)),
]

ELEMENTWISE = [
    function("x * scale", lambda x, s: x * s, (C,)),
    function("scale * x + shift", lambda x, s, b: s * x + b, (C,), (C,)),
    function("x * scalar", lambda x, s: x * s, ()),
    function("x / scale", lambda x, s: x / s.exp(), (C,)),
    function("learned positions", lambda x, p: x + p, (1, T, C)),
    function("positions, as many as samples", lambda x, p: x + p[: x.shape[1]], (B, C), inputs=floats(B, B, C)),
    function("learned positions [T, C]", lambda x, p: x + p, (T, C)),
    function("class token", lambda x, c: torch.cat([c.expand(len(x), -1, -1), x], dim=1), (1, 1, C)),
    function("class token repeated", lambda x, c: torch.cat([c.repeat(len(x), 1, 1), x], 1).sin(), (1, 1, C)),
    function("addcmul", lambda x, a, b: torch.addcmul(a, x, b), (C,), (C,)),
    function("where", lambda x, s: torch.where(x > 0, x, s), (C,)),
    function("lerp", lambda x, s: torch.lerp(x, s, 0.3), (C,)),
    function("softplus(s) * tanh(x * s)", lambda x, s: F.softplus(s) * torch.tanh(x * s), (C,)),
    function("p0 * p1 * x", lambda x, p, q: (p * q) * x, (C,), (C,)),
    function("x += p, in place", lambda x, p: x.clone().add_(p), (C,)),
    function("x *= p, in place", lambda x, p: x.sin().mul_(p), (C,)),
    module("PReLU", lambda: nn.PReLU()),
    module("PReLU of channels", lambda: nn.PReLU(C), floats(B, C, T)),
]


def _plain(norm):
    return lambda: nn.Sequential(nn.Linear(C, 6), norm(6, elementwise_affine=False))


NORMS = [
    module("layer norm", lambda: nn.LayerNorm(C)),
    module("layer norm [B, C]", lambda: nn.LayerNorm(C), floats(B, C)),
    module("layer norm, B = T = C", lambda: nn.LayerNorm(4), floats(4, 4, 4)),
    module("layer norm of two dimensions", lambda: nn.LayerNorm((T, C))),
    module("layer norm of two of four", lambda: nn.LayerNorm((3, C)), floats(B, 2, 3, C)),
    module("layer norm without bias", lambda: nn.LayerNorm(C, bias=False)),
    module("layer norm without affine", _plain(nn.LayerNorm)),
    module("RMS norm", lambda: nn.RMSNorm(C)),
    module("RMS norm, eps", lambda: nn.RMSNorm((T, C), eps=0.1)),
    module("RMS norm without affine", _plain(nn.RMSNorm)),
    module("group norm", lambda: nn.GroupNorm(2, 6), floats(B, 6, T)),
    module("group norm of images", lambda: nn.GroupNorm(3, 6), floats(B, 6, 4, 5)),
    module("group norm [B, C]", lambda: nn.GroupNorm(2, 6), floats(B, 6)),
    # Behind a layer, since PyTorch's own backward of channels-last values crashes without a gradient to pass on.
    module(
        "group norm, channels last",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.GroupNorm(3, 6)),
        lambda: (torch.randn(B, 4, 5, 6).to(memory_format=torch.channels_last),),
    ),
    module("instance norm 1d", lambda: nn.InstanceNorm1d(C, affine=True), floats(B, C, T)),
    module("instance norm 2d", lambda: nn.InstanceNorm2d(C, affine=True), floats(B, C, 4, 5)),
    module("instance norm 3d", lambda: nn.InstanceNorm3d(C, affine=True), floats(B, C, 2, 3, 2)),
    module(
        "instance norm with running statistics",
        lambda: nn.InstanceNorm1d(C, affine=True, track_running_stats=True).eval(),
        floats(B, C, T),
    ),
    module("batch norm 1d in eval", lambda: nn.BatchNorm1d(C).eval(), floats(B, C)),
    module("batch norm 2d in eval", lambda: nn.BatchNorm2d(C).eval(), floats(B, C, 4, 5)),
]


class Positions(nn.Module):
    """Tokens and position ids that the model makes: [1, T] or [T], by arange or from a buffer."""

    def __init__(self, shape, buffer):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(6, C)
        self.shape = shape
        self.register_buffer("position_ids", torch.arange(6).view(shape) if buffer else None)

    def forward(self, ids):
        if self.position_ids is None:
            position_ids = torch.arange(ids.shape[1]).view(self.shape)
        else:
            position_ids = self.position_ids[..., : ids.shape[1]]
        return self.tokens(ids) + self.positions(position_ids)


class WeightedBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(V, C, mode="sum")

    def forward(self, ids, weights):
        return self.bag(ids, per_sample_weights=weights)


class Bags(nn.EmbeddingBag):
    """Bags of different lengths: ids one after the other, and where each bag begins."""

    def forward(self, ids, offsets):
        return super().forward(ids, offsets)


def one_bag(inputs, b):
    ids, offsets = inputs
    end = offsets[b + 1] if b + 1 < len(offsets) else len(ids)
    return ids[offsets[b] : end], torch.zeros(1, dtype=torch.long)


def bags():
    return torch.tensor([1, 4, 4, 9, 0, 4, 9, 9, 9]), torch.tensor([0, 3, 3, 5])  # the second one is empty


REPEATED = torch.tensor([[1, 4, 4, 9, 1], [0, 0, 0, 0, 0], [9, 2, 0, 2, 4]])
TABLES = [
    module("embedding", lambda: nn.Embedding(V, C), ids(B, T)),
    module("embedding [B]", lambda: nn.Embedding(V, C), ids(B)),
    module("embedding [B, H, W]", lambda: nn.Embedding(V, C), ids(B, 2, 3)),
    module("embedding, repeated ids", lambda: nn.Embedding(V, C), lambda: (REPEATED,)),
    module("embedding, padding_idx", lambda: nn.Embedding(V, C, padding_idx=0), lambda: (REPEATED,)),
    module("embedding, negative padding_idx", lambda: nn.Embedding(V, C, padding_idx=-2), lambda: (REPEATED,)),
    module("embedding, int32 ids", lambda: nn.Embedding(V, C), lambda: (REPEATED.int(),)),
    *(
        module(f"embedding bag, {mode}{', padding_idx' if padding else ''}", make, lambda: (REPEATED,))
        for mode in ("sum", "mean", "max")
        for padding in (False, True)
        for make in [functools.partial(nn.EmbeddingBag, V, C, mode=mode, padding_idx=0 if padding else None)]
    ),
    module("embedding bag, weighted", WeightedBag, lambda: (REPEATED, torch.randn(3, T))),
    *(
        ModelCase(f"embedding bag, offsets, {mode}", lambda mode=mode: Bags(V, C, mode=mode), bags, take=one_bag)
        for mode in ("sum", "mean", "max")
    ),
    *(
        module(f"position ids {list(shape)} {'buffer' if buffer else 'arange'}", make, ids(B, 6))
        for shape in ((1, 6), (6,))
        for buffer in (False, True)
        for make in [lambda shape=shape, buffer=buffer: Positions(shape, buffer)]
    ),
    module("position ids [T], as many as samples", lambda: Positions((6,), True), ids(6, 6)),
]

CASES = LINEAR + PRODUCTS + ELEMENTWISE + NORMS + TABLES


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.float32, "sum"), (torch.float32, "mean"), (torch.float64, "mean"), (torch.bfloat16, "sum")],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case, dtype, reduction):
    check_case(case, dtype, reduction)


# How


@pytest.mark.parametrize(
    "case",
    [*LINEAR[:12], *PRODUCTS[:2], *PRODUCTS[15:18], *NORMS[:7], *TABLES[:9]],
    ids=str,
)
def test_common_layers_do_not_take_the_generic_path(case):
    norms = check_case(case)
    assert "generic" not in norms.methods.values()


@pytest.mark.parametrize("case", [ELEMENTWISE[0], PRODUCTS[13], ELEMENTWISE[16]], ids=str)
def test_the_generic_path_is_named(case):
    assert set(check_case(case).methods.values()) == {"generic"}


def test_ops_do_the_work(recorded, assert_kernel):
    with recorded() as ops:
        check_case(LINEAR[1])
    assert_kernel(ops, "linear_weight_grad_with_norm")


def test_a_norm_of_float16_that_float16_does_not_hold():
    x = torch.full((B, C), 100.0)
    model = nn.Linear(C, N).half()
    with per_sample.grad_norms(model, "sum") as norms:
        (model(x.half()).float() * 50).sum().backward()
    expected = 50 * math.sqrt(N * (C * 100.0**2 + 1))  # 26 thousand, whose square is beyond 65504
    torch.testing.assert_close(norms.squared, torch.full((B,), expected**2))


def test_sparse_gradients_stay_sparse():
    ids = torch.tensor([[1, 4, 4], [0, 0, 2], [4, 1, 3]])
    model, dense = nn.Embedding(7, C, sparse=True), nn.Embedding(7, C)
    dense.load_state_dict(model.state_dict())
    expected = Expected.of(dense, (ids,))
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(model, ids).sum().backward()
    expected.check_norms(norms)
    assert model.weight.grad.is_sparse
    torch.testing.assert_close(model.weight.grad.to_dense(), expected.ordinary["weight"])


def test_a_table_with_a_largest_norm():
    ids = torch.tensor([[1, 4, 4], [0, 0, 2], [4, 1, 3]])
    check_norms(nn.Embedding(7, C, max_norm=1.0), (ids,))


def test_bags_of_float64_are_averaged_in_float64():
    ids, offsets = bags()
    model = Bags(V, C).double()
    with per_sample.grad_norms(model, "sum") as norms:
        model(ids, offsets).sum().backward()
    shares = [torch.bincount(bag, minlength=1).double() / max(len(bag), 1) for bag in ids.tensor_split(offsets[1:])]
    expected = torch.stack([share.norm() for share in shares]) * math.sqrt(C)
    torch.testing.assert_close(norms.total, expected, rtol=1e-14, atol=0)
