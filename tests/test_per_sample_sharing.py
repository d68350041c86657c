"""per_sample.grad_norms of parameters that are shared, used several times, frozen or unused, against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fastmix import per_sample
from fastmix.testing.per_sample import Expected, ModelCase, check_case, weighted_losses

B, T, C, V = 3, 5, 4, 7


def floats(*shape):
    return lambda: (torch.randn(shape),)


def ids():
    return (torch.tensor([[1, 4, 4, 0, 1], [0, 6, 0, 5, 2], [3, 2, 6, 2, 3]]),)


class Forward(nn.Module):
    """modules by name, and a function of them and of the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def case(name, forward, inputs=None, **make):
    def build():
        return Forward(forward, **{name: module() for name, module in make.items()})

    return ModelCase(name, build, inputs or floats(B, T, C))


def linear(i=C, o=6):
    return lambda: nn.Linear(i, o)


def frozen(module, *names):
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


# Shared


def _tied(padding_idx=None, transform=False):
    embedding = nn.Embedding(V, C, padding_idx=padding_idx)
    output = nn.Linear(C, V)
    output.weight = embedding.weight
    middle = nn.Sequential(nn.Linear(C, C), nn.Tanh()) if transform else nn.Identity()
    return nn.Sequential(embedding, middle, output)


class Lora(nn.Module):
    """A frozen linear layer with a trained product of low rank beside it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up) * 0.5


class MergedLora(Lora):
    def forward(self, x):
        return F.linear(x, self.linear.weight + 0.5 * self.up @ self.down, self.linear.bias)


def _shared_linears():
    first, second = nn.Linear(C, C), nn.Linear(C, C)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


SHARED = [
    ModelCase("tied embedding and output", _tied, ids),
    ModelCase("tied, hidden layer", lambda: _tied(transform=True), ids),
    ModelCase("tied, padding_idx", lambda: _tied(padding_idx=0), ids),
    ModelCase("two linears with one weight", _shared_linears, floats(B, T, C)),
    ModelCase("two linears with one weight [B, C]", _shared_linears, floats(B, C)),
    case("twice in a row", lambda m, x: m.a(m.a(x).tanh()), a=linear(C, C)),
    case("three times", lambda m, x: m.a(m.a(m.a(x).tanh()).tanh()), a=linear(C, C)),
    case("side by side, cancelling", lambda m, x: m.a(x) - m.a(x.flip(1)), a=linear()),
    case("on inputs of different lengths", lambda m, x: m.a(x)[:, :2] * m.a(x[:, 2:4]), a=linear()),
    case("with and without positions", lambda m, x: m.a(x) + m.a(x[:, 0])[:, None], a=linear()),
    case("convolution twice", lambda m, x: m.a(m.a(x).tanh()), floats(B, C, 9), a=lambda: nn.Conv1d(C, C, 3)),
    case("embedding twice", lambda m, x: m.a(x) * m.a(x.flip(1) % 3), ids, a=lambda: nn.Embedding(V, C)),
    case("norm twice", lambda m, x: m.a(m.a(x).sin()), a=lambda: nn.LayerNorm(C)),
    case("scale and product", lambda m, x: F.linear(x * m.a.weight[0], m.a.weight), a=linear()),
    case("weight and its transpose", lambda m, x: F.linear(F.linear(x, m.a.weight), m.a.weight.t()), a=linear()),
    case("recurrent by hand", lambda m, x: _roll_out(m, x), h=linear(C, C), i=linear(C, C)),
    case(
        "encoder and decoder of one table",
        lambda m, x: m.conv(m.table(x).mT).mT @ m.table.weight.t(),
        ids,
        table=lambda: nn.Embedding(V, C),
        conv=lambda: nn.Conv1d(C, C, 3, padding=1),
    ),
]


def _roll_out(model, x):
    state = x.new_zeros(len(x), C)
    for step in x.unbind(1):
        state = torch.tanh(model.h(state) + model.i(step))
    return state


# Frozen, wrapped, reshaped


FROZEN = [
    ModelCase("frozen weight", lambda: frozen(nn.Linear(C, 6), "weight"), floats(B, T, C)),
    ModelCase("frozen bias", lambda: frozen(nn.Linear(C, 6), "bias"), floats(B, T, C)),
    ModelCase(
        "frozen first layer",
        lambda: nn.Sequential(frozen(nn.Linear(C, 6), "weight", "bias"), nn.ReLU(), nn.Linear(6, 2)),
        floats(B, T, C),
    ),
    ModelCase(
        "frozen last layer",
        lambda: nn.Sequential(nn.Linear(C, 6), nn.ReLU(), frozen(nn.Linear(6, 2), "weight", "bias")),
        floats(B, T, C),
    ),
    ModelCase("frozen scale", lambda: frozen(nn.LayerNorm(C), "weight"), floats(B, T, C)),
    ModelCase("frozen shift", lambda: frozen(nn.LayerNorm(C), "bias"), floats(B, T, C)),
    ModelCase("frozen filters", lambda: frozen(nn.Conv2d(C, 6, 3), "weight"), floats(B, C, 5, 6)),
    ModelCase(
        "frozen attention weight",
        lambda: frozen(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), "self_attn.in_proj_weight"),
        floats(B, T, 8),
    ),
    ModelCase("LoRA", lambda: Lora(nn.Linear(C, 6)), floats(B, T, C)),
    ModelCase("LoRA, merged", lambda: MergedLora(nn.Linear(C, 6)), floats(B, T, C)),
    ModelCase("weight norm", lambda: parametrizations.weight_norm(nn.Linear(C, 6)), floats(B, T, C)),
    ModelCase("weight norm of filters", lambda: parametrizations.weight_norm(nn.Conv1d(C, 6, 3)), floats(B, C, 9)),
    ModelCase("spectral norm in eval", lambda: parametrizations.spectral_norm(nn.Linear(C, 6)).eval(), floats(B, T, C)),
]

# Rows of all samples one after the other
ROWS = [
    case("view", lambda m, x: m.a(x.view(-1, C)).view(len(x), -1), a=linear()),
    case("flatten and unflatten", lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, (-1, T)), a=linear()),
    case(
        "reshape, activation, norm",
        lambda m, x: m.b(m.n(m.a(x.reshape(-1, C)).relu())).view(len(x), T, 2),
        a=linear(),
        n=lambda: nn.LayerNorm(6),
        b=linear(6, 2),
    ),
    case("rows, added to", lambda m, x: m.a(x.view(-1, C) + x.view(-1, C)).view(len(x), -1), a=linear()),
    case(
        "rows of images",
        lambda m, x: m.a(x.permute(0, 2, 3, 1).reshape(-1, C)).view(len(x), -1),
        floats(B, C, 2, 3),
        a=linear(),
    ),
    case("rows of ids", lambda m, x: m.a(x.view(-1)).view(*x.shape, -1), ids, a=lambda: nn.Embedding(V, C)),
    case(
        "frames through a convolution",
        lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1),
        floats(B, 2, C, 5, 6),
        a=lambda: nn.Conv2d(C, 6, 3),
    ),
    case("heads", lambda m, x: m.a(x.view(len(x), T, 2, C // 2).transpose(1, 2)), a=linear(C // 2)),
    case("windows", lambda m, x: m.a(x.unfold(1, 3, 1).flatten(0, 1).flatten(1)).view(len(x), -1), a=linear(3 * C)),
]

CASES = SHARED + FROZEN + ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype):
    check_case(case, dtype, "mean")


def test_an_orthogonal_weight():
    """A matrix exponential, which bfloat16 does not hold."""
    check_case(ModelCase("", lambda: parametrizations.orthogonal(nn.Linear(C, C)), floats(B, T, C)))


def test_cross_terms_are_what_is_tested():
    """The norm of a shared weight is not the root of its uses' squared norms, by far."""
    case = SHARED[7]
    model, (x,) = case.draw()
    separate = Forward(lambda m, x: m.a(x) - m.b(x.flip(1)), a=model.a, b=nn.Linear(C, 6))
    separate.b.load_state_dict(model.a.state_dict())
    with per_sample.grad_norms(separate, "sum") as norms:
        weighted_losses(separate, x).sum().backward()
    together = Expected.of(model, (x,)).oracle["a.weight"].flatten(1).norm(dim=1)
    assert (together < 0.9 * norms.total).any()


def test_tied_names_are_those_of_named_parameters():
    norms = check_case(SHARED[0])
    assert list(norms.per_parameter) == ["0.weight", "2.bias"]


# Unused


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_unused_layer_counts_nothing(reduction):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(C, 6), nn.Linear(C, 6)

        def forward(self, x):
            self.unused(x)  # whose result the loss does not see
            return self.used(x)

    norms = check_case(ModelCase("", Model, floats(B, T, C)), reduction=reduction)
    for name in ("unused.weight", "unused.bias"):
        assert norms.methods[name] == "unused"
        assert torch.equal(norms.per_parameter[name], torch.zeros(B))


def test_a_layer_that_only_some_samples_use():
    def forward(m, x):
        return torch.where((x[:, :1, :1] > 0), m.a(x), m.b(x))

    check_case(case("", forward, a=linear(), b=linear()))


def test_parameters_of_the_block_are_those_that_require_a_gradient():
    model = nn.Sequential(frozen(nn.Linear(C, 6), "weight"), nn.Linear(6, 2))
    norms = check_case(ModelCase("", lambda: model, floats(B, C)))
    assert list(norms.per_parameter) == ["0.bias", "1.weight", "1.bias"]
    assert model[0].weight.grad is None
