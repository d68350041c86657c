"""parameter_gradient_penalty in a grad_norms block, layer by layer, against double backwards of each sample's loss."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import fastmix.nn as fnn
from fastmix.per_sample import grad_norms, parameter_gradient_penalty
from fastmix.testing.per_sample import ModelCase, SmallModel, check_tensors, weighted_losses

B, T, C, N, V = 3, 5, 4, 6, 11  # samples, positions, channels in and out, vocabulary
IDS = torch.tensor([[1, 4, 4, 9, 1], [0, 0, 0, 0, 0], [9, 2, 0, 2, 4]])


# The loop


def squares_of(model, losses):
    """‖∇L_i‖² [B], which autograd can differentiate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([sum(grad.square().sum() for grad in row if grad is not None) for row in rows])


def run(model, inputs, in_block, losses_of=weighted_losses):
    """Value, squared norms and gradients, by parameter and by input, of the mean loss with the penalty."""
    model = copy.deepcopy(model)
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    with grad_norms(model) if in_block else contextlib.nullcontext() as norms:
        losses = losses_of(model, *inputs)
        if in_block:
            penalty = parameter_gradient_penalty(model, losses)
    if in_block:
        squared = norms.squared
    else:
        squared = squares_of(model, losses)
        penalty = squared.mean()
    (losses.mean() + 0.3 * penalty).backward()
    found = dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    grads = {name: tensor.grad for name, tensor in found.items() if tensor.grad is not None}
    return {"value": penalty.detach(), "squared norms": squared.detach()} | grads


def check(model, inputs, losses_of=weighted_losses, loop=None):
    """The block gives what the loop gives, of another model with the same parameters if that is `loop`."""
    actual, expected = run(model, inputs, True, losses_of), run(loop or model, inputs, False, losses_of)
    torch.testing.assert_close(actual, expected)


# Layers


class Forward(nn.Module):
    """function(self, *inputs) of modules and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def floats(*shape):
    return lambda: (torch.randn(shape),)


def ids():
    return (IDS,)


def case(name, make, inputs=None):
    return ModelCase(name, make, inputs or floats(B, T, C))


def by(name, function, inputs=None, **parts):
    return case(name, lambda: Forward(function, **{key: make() for key, make in parts.items()}), inputs)


def weight(*shape):
    return lambda: torch.randn(shape)


def linear(i=C, o=N, **options):
    return lambda: nn.Linear(i, o, **options)


LINEAR = [
    case("linear [B, C]", linear(), floats(B, C)),
    case("linear [B, T, C]", linear()),
    case("linear [B, H, W, C]", linear(), floats(B, 2, 3, C)),
    case("linear without bias", linear(bias=False)),
    case("linear, direct form", linear(3, 2), floats(B, 40, 3)),
    case("linear, B = 1", linear(), floats(1, T, C)),
    by("x @ w + b", lambda m, x: x @ m.w + m.b, w=weight(C, N), b=weight(N)),
    by("addmm", lambda m, x: torch.addmm(m.b, x, m.w), floats(B, C), w=weight(C, N), b=weight(N)),
    by("rows of a view", lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, (B, T)), a=linear()),
    by("positions first", lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), a=linear(), b=linear(N, C)),
]  # fmt: skip

CONV, TRANSPOSED = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPATIAL = ((7,), (5, 6), (3, 4, 3))


def conv(layer, name, dims, **options):
    options = {"kernel_size": 2, "out_channels": N} | options
    return case(f"{layer[dims].__name__}, {name}", lambda: layer[dims](C, **options), floats(B, C, *SPATIAL[dims]))


CONVOLUTIONS = [
    *(conv(CONV, "stride", dims, stride=2, padding=1) for dims in range(3)),
    *(conv(TRANSPOSED, "stride", dims, stride=2, padding=1, output_padding=1) for dims in range(3)),
    conv(CONV, "without bias", 1, bias=False),
    conv(CONV, "groups and dilation", 1, groups=2, dilation=2),
    conv(CONV, "depthwise", 0, groups=C, out_channels=2 * C),
    conv(CONV, "same", 1, padding="same", kernel_size=(2, 3)),
    conv(CONV, "same, dilated", 0, padding="same", dilation=3),
    conv(CONV, "circular", 0, padding=1, padding_mode="circular"),
    conv(CONV, "valid, stride beyond the kernel", 0, padding="valid", stride=3),
    conv(TRANSPOSED, "groups and dilation", 1, groups=2, dilation=2, bias=False),
    conv(TRANSPOSED, "output padding of a stride", 0, dilation=2, output_padding=1),
]

TABLES = [
    case("embedding", lambda: nn.Embedding(V, C), ids),
    case("embedding, padding_idx", lambda: nn.Embedding(V, C, padding_idx=0), ids),
    by("embedding and MLP", lambda m, i: m.b(m.a(m.e(i)).tanh()), ids,
       e=lambda: nn.Embedding(V, C, padding_idx=0), a=linear(), b=linear(N, 2)),
    by("position ids [1, T]", lambda m, i: (m.e(i) + m.p(torch.arange(T)[None])).sin(), ids,
       e=lambda: nn.Embedding(V, C), p=lambda: nn.Embedding(T, C)),
]  # fmt: skip


def norm(name, make, *spatial):
    """With a layer in front, so that its input carries a gradient to parameters."""
    first = (linear(), lambda: nn.Conv1d(C, N, 1), lambda: nn.Conv2d(C, N, 1))[len(spatial)]
    inputs = floats(B, C, *spatial) if spatial else None
    return by(name, lambda m, x: m.norm(m.first(x)).sin(), inputs, first=first, norm=make)


NORMS = [
    norm("layer norm", lambda: nn.LayerNorm(N)),
    norm("layer norm of two dimensions", lambda: nn.LayerNorm((T, N))),
    norm("layer norm without bias", lambda: nn.LayerNorm(N, bias=False)),
    norm("layer norm without affine", lambda: nn.LayerNorm(N, elementwise_affine=False)),
    norm("RMS norm", lambda: nn.RMSNorm(N, eps=0.1)),
    norm("group norm", lambda: nn.GroupNorm(2, N), T),
    norm("group norm of images", lambda: nn.GroupNorm(3, N), 2, 3),
    norm("instance norm", lambda: nn.InstanceNorm1d(N, affine=True), T),
    norm("instance norm of images", lambda: nn.InstanceNorm2d(N, affine=True), 3, 4),
    norm("instance norm, running", lambda: nn.InstanceNorm1d(N, affine=True, track_running_stats=True).eval(), T),
    norm("batch norm in eval", lambda: nn.BatchNorm1d(N).eval(), T),
    norm("batch norm of images in eval", lambda: nn.BatchNorm2d(N).eval(), 3, 4),
]


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(N, 2)), nn.Parameter(torch.randn(2, C))

    def forward(self, frozen):
        return frozen + self.up @ self.down


def lora():
    layer = nn.Linear(C, N)
    parametrize.register_parametrization(layer, "weight", LoRA())
    layer.parametrizations.weight.original.requires_grad_(False)
    return layer


def tied(padding_idx=None):
    embedding, output = nn.Embedding(V, C, padding_idx=padding_idx), nn.Linear(C, V)
    output.weight = embedding.weight
    return Forward(lambda m, i: m.output(m.embedding(i).tanh()), embedding=embedding, output=output)


def frozen(module):
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i % 2 == 1)
    return module


SHARING = [
    case("tied table", tied, ids),
    case("tied table, padding_idx", lambda: tied(0), ids),
    by("a layer twice", lambda m, x: m.a(m.a(x).tanh()), a=linear(C, C)),
    by("a norm twice", lambda m, x: m.norm(m.a(m.norm(x)).tanh()), a=linear(C, C), norm=lambda: nn.LayerNorm(C)),
    by("a convolution twice", lambda m, x: m.a(m.a(x).tanh()), floats(B, C, T), a=lambda: nn.Conv1d(C, C, 2)),
    by("transposed weight too", lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t()), a=linear()),
    case("LoRA", lambda: nn.Sequential(nn.Linear(C, C), nn.Tanh(), lora())),
    case("weight norm", lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(C, N)), nn.Tanh())),
    by("slices of a weight", lambda m, x: F.linear(x, m.w[1:4]) * F.linear(x, m.w[:3]).cos(), w=weight(N, C)),
    case("frozen weights", lambda: frozen(nn.Sequential(nn.Linear(C, N), nn.Tanh(), nn.Linear(N, 2)))),
    case("frozen biases", lambda: frozen(nn.Sequential(nn.Linear(C, N, bias=False), nn.LayerNorm(N), nn.Linear(N, 2)))),
    by("an unused layer", lambda m, x: m.a(x), a=linear(), b=linear()),
]  # fmt: skip

GENERIC = [
    by("x * scale + shift", lambda m, x: x * m.s + m.b, s=weight(C), b=weight(C)),
    by("x / exp(scalar)", lambda m, x: (x / m.s.exp()).sin(), s=weight()),
    by("learned positions", lambda m, x: m.a((x + m.p).sin()), p=weight(1, T, C), a=linear()),
    by("class token", lambda m, x: torch.cat([m.c.expand(len(x), -1, -1), x], 1).sin(), c=weight(1, 1, C)),
    by("einsum", lambda m, x: torch.einsum("btc,ts->bsc", x.sin(), m.w), w=weight(T, N)),
    case("bilinear", lambda: Forward(lambda m, x: m.a(x, x.sin()), a=nn.Bilinear(C, C, 2))),
    case("PReLU", lambda: nn.Sequential(nn.Linear(C, N), nn.PReLU(T))),
    by("LSTM", lambda m, x: m.a(x)[0], floats(B, 2, C), a=lambda: nn.LSTM(C, 2, batch_first=True)),
    by("GRU cell", lambda m, x: m.a(x[:, 1], m.a(x[:, 0])), floats(B, 2, C), a=lambda: nn.GRUCell(C, 2)),
]

ACTIVATIONS = [
    case(f"activation {activation}", lambda a=activation: nn.Sequential(nn.Linear(C, N), a, nn.Linear(N, 2)))
    for activation in (
        nn.GELU(), nn.SiLU(inplace=True), nn.Softmax(-1), nn.Softplus(), nn.ReLU(), nn.ReLU(inplace=True),
        nn.LeakyReLU(0.2, inplace=True), nn.ELU(inplace=True), nn.Hardtanh(inplace=True),
    )
]  # fmt: skip
ACTIVATIONS += [
    case("small CNN", lambda: nn.Sequential(
        nn.Conv2d(1, C, 3), nn.GroupNorm(2, C), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(C, N, 2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(N, 2),
    ), floats(B, 1, 6, 6)),
    by("SwiGLU", lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=linear(), b=linear(), c=linear(N, C)),
    by("x += layer(x)", lambda m, x: m.b(m.a(x).add_(x).tanh_()), a=linear(C, C), b=linear()),
    case("small model", SmallModel),
]  # fmt: skip


def attention(name, module, call=None, *, sequence_first=False, keys=None):
    def forward(m, x, y=None):
        query, key = (t.transpose(0, 1) if sequence_first else t for t in (x, x if y is None else y))
        output = m.a(query, key, key, **(call or {}))[0]
        return output.transpose(0, 1) if sequence_first else output

    return by(name, forward, keys or floats(B, T, 4), a=module)


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
ATTENTION = [
    attention("attention", lambda: nn.MultiheadAttention(4, 2, batch_first=True)),
    attention("attention, sequence first", lambda: nn.MultiheadAttention(4, 2), sequence_first=True),
    attention("attention without weights", lambda: nn.MultiheadAttention(4, 2, batch_first=True),
              {"need_weights": False}),
    attention("causal attention", lambda: nn.MultiheadAttention(4, 2, batch_first=True),
              {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}),
    attention("cross attention", lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
              keys=lambda: (torch.randn(B, T, 4), torch.randn(B, 2, 4))),
    attention("fastmix's attention", lambda: fnn.MultiheadAttention(4, 2, batch_first=True), {"need_weights": False}),
    case("encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)),
]  # fmt: skip

CASES = LINEAR + CONVOLUTIONS + TABLES + NORMS + SHARING + GENERIC + ACTIVATIONS + ATTENTION


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case):
    with sdpa_kernel(SDPBackend.MATH):
        check(*case.draw(torch.float64))


class SummedEmbedding(nn.Embedding):
    def __init__(self, *args, mode, **options):
        super().__init__(*args, **options)
        self.mode = mode

    def forward(self, ids):
        kept = torch.ones(ids.shape, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        count = kept.sum(1, keepdim=True).clamp(min=1) if self.mode == "mean" else 1
        return (super().forward(ids) * kept[..., None]).sum(1) / count


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_bag(mode, padding_idx):
    """PyTorch's bag has no double backward, which the loop needs and the block does not."""
    bag, loop = (
        nn.Sequential(table(V, C, mode=mode, padding_idx=padding_idx), nn.Tanh(), nn.Linear(C, N)).double()
        for table in (nn.EmbeddingBag, SummedEmbedding)
    )
    loop.load_state_dict(bag.state_dict())
    check(bag, (IDS,), loop=loop)


# Precision


@pytest.mark.parametrize("case", [LINEAR[1], CONVOLUTIONS[1], NORMS[0], SHARING[1], ACTIVATIONS[-1]], ids=str)
def test_float32(case):
    model, inputs = case.draw()
    oracle = run(copy.deepcopy(model).double(), [x.double() if x.is_floating_point() else x for x in inputs], False)
    actual, reference = run(model, inputs, True), run(model, inputs, False)
    scalars, gradients = list(oracle)[:2], list(oracle)[2:]
    for names in (scalars[:1], scalars[1:], gradients):
        tensors = ({name: found[name].reshape(-1) for name in names} for found in (actual, reference, oracle))
        check_tensors(", ".join(names), *tensors, torch.float32)
