"""per_sample.grad_norms with the ways in which models arrange their tensors, against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmix import per_sample
from fastmix.testing.per_sample import ModelCase, check_case, check_norms

B, T, C, H = 3, 6, 8, 2  # samples, tokens, channels, heads


class Pattern(nn.Module):
    """forward(model, *inputs), with the layers under their names."""

    def __init__(self, forward, layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


PATTERNS = []


def pattern(shape=(B, T, C), **layers):
    """Adds the function below it as a case."""

    def decorate(forward):
        name = forward.__name__.replace("_", " ")

        def make():
            return Pattern(forward, {name: layer() for name, layer in layers.items()})

        PATTERNS.append(ModelCase(name, make, lambda: (torch.randn(shape),)))
        return forward

    return decorate


def linear(i=C, o=C, bias=True):
    return lambda: nn.Linear(i, o, bias)


def _attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pattern(qkv=linear(C, 3 * C), out=linear())
def attention_of_timm(m, x):
    qkv = m.qkv(x).reshape(len(x), T, 3, H, C // H).permute(2, 0, 3, 1, 4)
    return m.out(_attend(*qkv.unbind(0)))


@pattern(qkv=linear(C, 3 * C), out=linear())
def attention_by_unflatten(m, x):
    qkv = m.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    return m.out(_attend(qkv[0], qkv[1], qkv[2]))


@pattern((3, 3, C), qkv=linear(C, 3 * C), out=linear())
def attention_with_three_samples_of_three_tokens(m, x):
    qkv = m.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    return m.out(_attend(*qkv.unbind(0)))


@pattern(qkv=linear(C, 3 * C), out=linear())
def attention_of_nanogpt(m, x):
    heads = [part.view(len(x), T, H, C // H).transpose(1, 2) for part in m.qkv(x).split(C, dim=2)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    return m.out(y.transpose(1, 2).contiguous().view(len(x), T, C))


@pattern(q=linear(), k=linear(bias=False), v=linear(), out=linear())
def attention_on_merged_heads(m, x):
    def split(y):  # [B·H, T, C/H]
        return y.view(len(x), T, H, C // H).transpose(1, 2).reshape(-1, T, C // H)

    q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
    y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
    return m.out(y.view(len(x), H, T, -1).transpose(1, 2).flatten(2))


@pattern(q=linear(), k=linear(bias=False), out=linear())
def attention_by_einsum(m, x):
    q, k = m.q(x).unflatten(2, (H, -1)), m.k(x).unflatten(2, (H, -1))
    weights = torch.einsum("bqhc,bkhc->bhqk", q, k).softmax(-1)
    return m.out(torch.einsum("bhqk,bkc->bqhc", weights, x).flatten(2)[..., :C])


@pattern((B, 4, 4, C), norm=lambda: nn.LayerNorm(C), mlp=linear())
def windows_of_swin(m, x):
    y = x.view(len(x), 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, C)
    y = m.mlp(m.norm(y)).view(len(x), 2, 2, 2, 2, C)
    return y.permute(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 4, C)


@pattern(
    (B, 4, 6, 6), conv=lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), norm=lambda: nn.LayerNorm(4), up=linear(4, 8)
)
def block_of_convnext(m, x):
    return m.up(m.norm(m.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@pattern((B, 2, 8, 8), patches=lambda: nn.Conv2d(2, C, 4, 4), out=linear())
def patches_of_a_vit(m, x):
    return m.out(m.patches(x).flatten(2).transpose(1, 2))


@pattern((B, 4, 6, 6), conv=lambda: nn.Conv2d(4, C, 3), down=linear(C, 2), up=linear(2, C))
def squeeze_and_excite(m, x):
    y = m.conv(x)
    return y * m.up(m.down(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


@pattern(
    (B, 2, 8, 8),
    down=lambda: nn.Conv2d(2, 4, 3, 2, 1),
    up=lambda: nn.ConvTranspose2d(4, 2, 2, 2),
    out=lambda: nn.Conv2d(4, 1, 1),
)
def skip_of_a_unet(m, x):
    return m.out(torch.cat([m.up(m.down(x).relu()), F.interpolate(x, scale_factor=1.0)], dim=1))


@pattern(first=linear(), out=linear())
def first_token(m, x):
    return m.out(m.first(x)[:, 0])


@pattern(first=linear(), out=linear())
def last_token_by_index(m, x):
    y = m.first(x)
    return m.out(y[torch.arange(len(x)), torch.full((len(x),), T - 1)])


@pattern(first=linear(), out=linear())
def tokens_of_each_sample_by_index(m, x):
    return m.out(m.first(x)[torch.arange(len(x))[:, None], x[..., 0].argsort(1)[:, :B]])


@pattern(first=linear(), out=linear())
def tokens_by_gather(m, x):
    index = x[..., 0].argsort(1)[..., None].expand(-1, -1, C)
    return m.out(m.first(x).gather(1, index))


@pattern(token=linear(T, T), channel=linear())
def mixing_of_tokens(m, x):
    return m.channel(x + m.token(x.transpose(1, 2)).transpose(1, 2))


@pattern(gate=linear(), up=linear(), down=linear())
def gated(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


@pattern(first=linear(), out=linear())
def padded_and_cut(m, x):
    return m.out(F.pad(m.first(x), (0, 0, 1, 1))[:, 1:-2])


@pattern(first=linear(), out=linear())
def masked(m, x):
    return m.out(m.first(x).masked_fill(x[..., :1] > 0.5, 0.0)).sum(1)


@pattern(router=linear(C, 2), a=linear(), b=linear())
def mixture_of_experts(m, x):
    weights = m.router(x).softmax(-1)
    return weights[..., :1] * m.a(x) + weights[..., 1:] * m.b(x)


@pattern((B, 4, C), layer=linear(), out=linear(4 * C, 2))
def unbound_and_stacked(m, x):
    return m.out(torch.stack([m.layer(step).tanh() for step in x.unbind(1)], dim=1).flatten(1))


@pattern((B, T, C), layer=linear(), out=linear())
def loop_over_samples(m, x):
    return m.out(torch.stack([sample.tanh() for sample in m.layer(x)]))


@pattern(layer=linear(), out=linear())
def chunks_of_channels(m, x):
    first, second = m.layer(x).chunk(2, dim=-1)
    return m.out(torch.cat([second, first], dim=-1).roll(1, dims=1).flip(2))


@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_pattern(case):
    check_case(case)


def test_padding_mask_of_attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, x, lengths):
            beyond = torch.arange(T) >= lengths[:, None]
            return self.attention(x, x, x, key_padding_mask=beyond, need_weights=False)[0]

    check_norms(Model(), (torch.randn(B, T, C), torch.tensor([6, 2, 4])))


@pytest.mark.parametrize("batch", [B, C])
def test_step_embedding_of_a_diffusion_model(batch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.mlp, self.conv = nn.Embedding(10, C), nn.Linear(C, 4), nn.Conv1d(4, 4, 3)

        def forward(self, x, step):
            return self.conv(x + self.mlp(self.steps(step))[:, :, None])

    check_norms(Model(), (torch.randn(batch, 4, T), torch.randint(0, 10, (batch,))))


def test_a_model_that_is_called_twice():
    def losses(model, first, second):
        return (model(first) - model(second)).square().flatten(1).sum(1)

    model = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, 2))
    check_norms(model, (torch.randn(B, T, C), torch.randn(B, T, C)), losses=losses)


def test_a_frozen_teacher():
    teacher, model = nn.Linear(C, 2).requires_grad_(False), nn.Linear(C, 2)

    def losses(model, x):
        with torch.no_grad():
            target = teacher.to(x.dtype)(x)
        return (model(x) - target).square().flatten(1).sum(1)

    check_norms(model, (torch.randn(B, T, C),), losses=losses)


# Rows whose samples the data decide: exact or refused, never wrong


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(C, 5, batch_first=True)

    def forward(self, x):
        lengths = 1 + x[:, :, 0].argmax(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][0][-1]


class Experts(nn.Module):
    """Every token goes to one of two layers, with the tokens of all samples that go there."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, C)
        result = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            (chosen,) = torch.where((rows[:, 0] > 0) == bool(i))
            result.index_add_(0, chosen, expert(rows[chosen]))
        return result.view_as(x)


class Selected(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(C, 2)

    def forward(self, x):
        result = x.new_zeros(*x.shape[:2], 2)
        inside = x[..., 0] > 0
        result[inside] = self.a(x[inside])
        return result


@pytest.mark.parametrize("make", [Packed, Experts, Selected])
@pytest.mark.parametrize("seed", range(5))  # with as many chosen rows as samples among them
def test_rows_that_the_data_choose(make, seed):
    torch.manual_seed(seed)
    model, x = make(), torch.randn(B, 2, C)
    try:
        check_norms(model, (x,))
    except ValueError as error:
        text = str(error)
    else:
        return
    assert "batch" in text


@pytest.mark.parametrize("positions", [5, 3], ids=["more positions than samples", "as many"])
def test_in_place_functions_behind_a_transposition(positions):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.transpose(0, 1)
            h = torch.relu_(self.a(x)) * 1
            h += x
            h[0] = 0.0
            return self.b(h).transpose(0, 1)

    check_norms(Model(), (torch.randn(3, positions, 4),))


class ComplexModel(nn.Module):
    """A learned filter in the frequency domain, then a complex linear layer."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x):
        spectrum = torch.fft.rfft(x, dim=1).transpose(1, 2) * self.filter
        spectrum = F.linear(spectrum.transpose(1, 2), self.weight)
        return torch.fft.irfft(spectrum, n=x.shape[1], dim=1)


def test_complex_parameters():
    torch.manual_seed(0)
    model, x = ComplexModel(), torch.randn(3, 5, 4)
    with per_sample.grad_norms(model) as norms:
        losses = model(x).square().mean((1, 2))
        matrix = per_sample.gram(model, losses)
        norms.backward(losses)
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(model(x[i : i + 1]).square().mean(), list(model.parameters()))
        rows.append(torch.cat([torch.view_as_real(grad).flatten() for grad in grads]))
    torch.testing.assert_close(norms.total, torch.stack(rows).norm(dim=1))
    torch.testing.assert_close(matrix, torch.stack(rows) @ torch.stack(rows).t())


class NestedCheckpoints(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x):
        def inner(h):
            return torch.tanh(self.b(h))

        def outer(h):
            return self.c(checkpoint(inner, torch.tanh(h), use_reentrant=self.reentrant))

        return checkpoint(outer, self.a(x), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_nested_checkpoints(reentrant):
    check_norms(NestedCheckpoints(reentrant), (torch.randn(3, 5, 4),))
