"""fastmix.nn.MultiheadAttention against PyTorch's, values and gradients."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import fastmix
from fastmix import nn
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

B, T, S, E, H = 2, 5, 7, 48, 3
# One of a kind and all at once.
MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "own widths": {"kdim": 8, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "everything": {"kdim": 8, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def _pair(**named):
    """PyTorch's module, with parameters that are neither 0 nor 1, and ours with them."""
    theirs, ours = torch.nn.MultiheadAttention(E, H, **named), nn.MultiheadAttention(E, H, **named)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    return theirs, ours


def _draw(module, t=T, s=S, same=1):
    """query, key, value in the module's layout; same=3: one tensor for all, same=2: one for key and value."""
    query, key, value = (
        torch.randn(B, n, c) if module.batch_first else torch.randn(n, B, c)
        for n, c in ((t, E), (s, module.kdim), (s, module.vdim))
    )
    return (query,) * 3 if same == 3 else (query, key, key) if same == 2 else (query, key, value)


def _run(module, inputs, **named):
    """The values, and the gradients of inputs, float masks and parameters."""
    leaves = {str(i): x.detach().requires_grad_() for i, x in enumerate(dict.fromkeys(inputs))}
    given = {id(x): leaf for x, leaf in zip(dict.fromkeys(inputs), leaves.values(), strict=True)}
    masks = {name: x for name, x in named.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    masks = {name: x.detach().requires_grad_() for name, x in masks.items()}
    values = [value for value in module(*(given[id(x)] for x in inputs), **named | masks) if value is not None]
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(value.shape, generator=generator).bfloat16().to(value.dtype) for value in values]
    leaves |= masks | dict(module.named_parameters())
    # A causal mask that only says so is not used.
    grads = torch.autograd.grad(values, list(leaves.values()), draws, allow_unused=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return [value.detach() for value in values], found


def _joined(grads, names):
    """One vector of all: the error of a few elements that all but cancel has no measure of its own."""
    return torch.cat([grads[name].flatten() for name in names])


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _check(theirs, ours, inputs, theirs_named, ours_named=None):
    doubles = {id(x): x.double() for x in inputs}
    exact = {name: _double(value) for name, value in theirs_named.items()}
    oracle, oracle_grads = _run(copy.deepcopy(theirs).double(), [doubles[id(x)] for x in inputs], **exact)
    expected, expected_grads = _run(theirs, inputs, **theirs_named)
    values, grads = _run(ours, inputs, **theirs_named if ours_named is None else ours_named)
    assert len(values) == len(expected)
    for name, value, *others in zip(("output", "weights"), values, expected, oracle, strict=False):
        check_parity(name, value, *others, factor=FORWARD_FACTOR)
    masks = {"attn_mask", "key_padding_mask"}
    assert grads.keys() - masks == expected_grads.keys() - masks
    names = sorted(grads.keys() & expected_grads.keys())
    joined = (_joined(found, names) for found in (grads, expected_grads, oracle_grads))
    check_parity("gradients", *joined, factor=GRADIENT_FACTOR)


def _masks(t=T, s=S):
    """By name; PyTorch's convention, True = ignore. No row is left without a key."""
    padding = torch.arange(s) >= torch.tensor([[s], [s - 2]])
    pairs, of_heads = torch.rand(t, s) < 0.3, torch.rand(B * H, t, s) < 0.3
    pairs[:, 0] = of_heads[:, :, 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, s)},
        "pairs": {"attn_mask": pairs},
        "float pairs": {"attn_mask": torch.randn(t, s).masked_fill(pairs, -torch.inf)},
        "heads": {"attn_mask": of_heads, "key_padding_mask": padding},
        "float heads": {"attn_mask": torch.randn(B * H, t, s), "key_padding_mask": torch.randn(B, s)},
        "mixed": {"attn_mask": torch.randn(t, s), "key_padding_mask": padding},
        "mixed the other way": {"attn_mask": pairs, "key_padding_mask": torch.randn(B, s)},
    }


# As PyTorch's


@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name):
    """Of three tensors; of two, the values being the keys; and of one."""
    theirs, ours = _pair(**MODULES[name])
    for same in (1,) if ours.in_proj_weight is None else (1, 2, 3):
        inputs = _draw(ours, same=same)
        for named in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            _check(theirs, ours, inputs, named)


@pytest.mark.parametrize("mask", _masks())
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_masks(name, mask):
    theirs, ours = _pair(**MODULES[name])
    for need_weights in (False, True):
        _check(theirs, ours, _draw(ours), {"need_weights": need_weights, **_masks()[mask]})


@pytest.mark.parametrize("name", ["plain", "batch first", "everything"])
def test_without_a_batch(name):
    theirs, ours = _pair(**MODULES[name])
    inputs = torch.randn(T, E), torch.randn(S, ours.kdim), torch.randn(S, ours.vdim)
    named = {"key_padding_mask": torch.arange(S) >= S - 2, "attn_mask": torch.rand(H, T, S - 1) < 0.3}
    named["attn_mask"] = torch.nn.functional.pad(named["attn_mask"], (1, 0))
    for need_weights in (False, True):
        _check(theirs, ours, inputs, {"need_weights": need_weights, **named})
    _check(theirs, ours, inputs, {"average_attn_weights": False})


@pytest.mark.parametrize("name", ["plain", "zero_attn"])
def test_causal(name):
    """With PyTorch's mask, which is then not read; and without it, where PyTorch asks for it."""
    theirs, ours = _pair(**MODULES[name])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S)
    padding = {"key_padding_mask": torch.zeros(B, S).masked_fill(_masks()["padding"]["key_padding_mask"], -torch.inf)}
    inputs = _draw(ours, S, S, same=3)
    for named in ({}, {"need_weights": False, **padding}):
        _check(theirs, ours, inputs, {"attn_mask": causal, "is_causal": True, **named})
    if not ours.add_zero_attn:
        _check(theirs, ours, inputs, {"attn_mask": causal, "is_causal": True}, {"is_causal": True})


def test_calls_its_op(recorded, assert_kernel):
    ours, x = nn.MultiheadAttention(E, H), torch.randn(S, B, E)
    for need_weights in (False, True):
        with recorded() as ops:
            ours(x, x, x, need_weights=need_weights)
        assert_kernel(ops, "scaled_attention")


def test_structure_takes_the_masks_place(monkeypatch):
    """What the op is given: no [T, S] mask where is_causal or prefix_len says it."""
    _, ours = _pair()
    calls = []

    def spy(*args, **options):
        calls.append(options)
        return fastmix.scaled_attention(*args, **options)

    monkeypatch.setattr("fastmix.nn.attention.scaled_attention", spy)
    x = torch.randn(S, B, E)
    ours(x, x, x, attn_mask=torch.ones(S, S).triu(1).bool(), is_causal=True, need_weights=False)
    padding = torch.zeros(B, S, dtype=torch.bool)
    ours(x, x, x, padding, need_weights=False, prefix_len=torch.tensor([2, 3]))
    assert [call["is_causal"] for call in calls] == [True, False]
    assert calls[0]["attn_mask"] is None
    assert calls[1]["attn_mask"].shape == (B, 1, 1, S)


@pytest.mark.parametrize("layer", [torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer])
def test_inside_pytorchs_layers(layer):
    theirs = layer(E, H, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        if hasattr(ours, name):
            setattr(ours, name, nn.MultiheadAttention(E, H, batch_first=True))
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(B, S, E), torch.randn(B, T, E)
    inputs = (x,) if layer is torch.nn.TransformerEncoderLayer else (x, memory)
    for training in (True, False):  # in evaluation without gradients PyTorch's layer has a way past its attention
        with torch.no_grad():
            output, expected = (module.train(training)(*inputs) for module in (ours, theirs))
            check_parity("output", output, expected, copy.deepcopy(theirs).double()(*map(_double, inputs)))


def test_bfloat16():
    theirs, ours = (module.bfloat16() for module in _pair())
    inputs = tuple(x.bfloat16() for x in _draw(ours))
    for named in ({}, {"need_weights": False}):
        _check(theirs, ours, inputs, named)


# Beyond PyTorch's


def _check_with_and_without_weights(theirs, ours, theirs_named, ours_named):
    inputs = _draw(ours)
    for need_weights in (False, True):
        named = {"need_weights": need_weights}
        _check(theirs, ours, inputs, theirs_named | named, ours_named | named)


def test_prefix_len():
    theirs, ours = _pair(batch_first=True)
    prefix = torch.tensor([0, 4], dtype=torch.int32)
    rows, columns = torch.arange(T)[:, None], torch.arange(S)
    dense = (columns > rows) & (columns >= prefix[:, None, None])
    dense = dense.repeat_interleave(H, dim=0)
    _check_with_and_without_weights(theirs, ours, {"attn_mask": dense}, {"prefix_len": prefix})


def test_relative_bias():
    """Nine distances, each with a bucket of its own."""
    theirs, ours = _pair()
    weight = torch.randn(32, H)
    distance = torch.arange(S) - torch.arange(T)[:, None]
    bucket = distance.abs() + 16 * (distance > 0)
    dense = weight[bucket].permute(2, 0, 1).repeat(B, 1, 1)
    _check_with_and_without_weights(theirs, ours, {"attn_mask": dense}, {"relative_bias": fastmix.RelativeBias(weight)})


def test_scale():
    """The same as a larger query projection."""
    theirs, ours = _pair()
    other = copy.deepcopy(theirs)
    with torch.no_grad():
        other.in_proj_weight[:E] *= 0.7 * (E // H) ** 0.5
        other.in_proj_bias[:E] *= 0.7 * (E // H) ** 0.5
    inputs = _draw(ours)
    with torch.no_grad():
        expected, oracle = other(*inputs), other.double()(*map(_double, inputs))
        for value, *others in zip(ours(*inputs, scale=0.7), expected, oracle, strict=True):
            check_parity("scale", value, *others)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved):
    """Of the projected queries and keys: row p of the pairs, seen as complex numbers, is turned by angle p."""
    _, ours = _pair(batch_first=True)
    angle, x = torch.rand(S, E // H // 2) * 6, torch.randn(B, S, E)
    cos, sin = angle.cos(), angle.sin()

    def turned(heads):  # [B, H, S, E/H]
        pairs = heads.unflatten(3, (-1, 2)) if interleaved else heads.unflatten(3, (2, -1)).mT
        numbers = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.to(heads), sin.to(heads))
        pairs = torch.view_as_real(numbers)
        return (pairs if interleaved else pairs.mT).flatten(3)

    def formula(module, x):
        projected = (x @ module.in_proj_weight.mT + module.in_proj_bias).chunk(3, dim=-1)
        query, key, value = (part.unflatten(2, (H, -1)).transpose(1, 2) for part in projected)
        weights = (turned(query) @ turned(key).mT * (E // H) ** -0.5).softmax(dim=-1)
        return module.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights.mean(dim=1)

    values = ours(x, x, x, rotary=fastmix.Rotary(cos, sin, interleaved))
    for value, *others in zip(values, formula(ours, x), formula(copy.deepcopy(ours).double(), x.double()), strict=True):
        check_parity("rotary", value, *others, independent=1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_without_a_key_give_the_bias(batch_first):
    _, ours = _pair(batch_first=batch_first)
    inputs = [x.requires_grad_() for x in _draw(ours)]
    padding = torch.tensor([[False] * S, [True] * S])
    output, weights = ours(*inputs, padding)
    output = output if batch_first else output.transpose(0, 1)
    assert torch.equal(output[1], ours.out_proj.bias.expand(T, E))
    assert not weights[1].any()
    (output.sum() + weights.sum()).backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert not (x.grad if batch_first else x.grad.transpose(0, 1))[1].any()


@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_may_be_nan(need_weights):
    _, ours = _pair(batch_first=True)
    query, key, value = _draw(ours)
    padding = torch.arange(S) >= torch.tensor([[S], [S - 2]])
    expected = ours(query, key, value, padding, need_weights)
    spoiled = [x.masked_fill(padding[..., None], torch.nan) for x in (key, value)]
    for value, wanted in zip(ours(query, *spoiled, padding, need_weights), expected, strict=True):
        assert (value is None and wanted is None) or torch.equal(value, wanted)


def test_dropout():
    """Of the weights, in training: what is returned is what was applied."""
    ours = nn.MultiheadAttention(E, H, dropout=0.4, batch_first=True)
    query, key, value = _draw(ours, 16, 16)
    output, weights = ours(query, key, value, average_attn_weights=False)
    dropped = weights == 0
    assert 0.25 < float(dropped.float().mean()) < 0.55
    kept = ours.eval()(query, key, value, average_attn_weights=False)[1] / 0.6
    torch.testing.assert_close(weights, kept.masked_fill(dropped, 0))
    values = (value @ ours.in_proj_weight[2 * E :].mT).unflatten(2, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(output, ours.out_proj((weights @ values).transpose(1, 2).flatten(2)))
    assert not torch.equal(ours.train()(query, key, value)[0], output)


# Modules


@pytest.mark.parametrize("name", MODULES)
def test_state_and_initialisation(name):
    """Names, shapes, numbers and the random generator's state after are PyTorch's."""
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(E, H, **MODULES[name])
    torch.manual_seed(1)
    ours = nn.MultiheadAttention(E, H, **MODULES[name])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    meta = nn.MultiheadAttention(E, H, **MODULES[name], device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


def test_compile():
    """In one graph, forward and backward, with dropout."""
    ours, x = nn.MultiheadAttention(E, H, batch_first=True, dropout=0.5), torch.randn(B, S, E)

    def call(x):
        return ours(x, x, x, need_weights=False, prefix_len=torch.tensor([2, 3]))[0]

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        output = function(leaf)
        results.append((output, torch.autograd.grad(output.square().sum(), [leaf, *ours.parameters()])))
    torch.testing.assert_close(results[1], results[0])


def test_autocast():
    theirs, ours = _pair(batch_first=True)
    inputs = _draw(ours)
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = theirs(*inputs, need_weights=False)[0], ours(*inputs, need_weights=False)[0]
    oracle = copy.deepcopy(theirs).double()(*map(_double, inputs))[0]
    check_parity("output", output, expected, oracle)


def test_double_backward():
    """The parameters' gradients of a penalty on the input's; PyTorch has it for its explicit weights only."""
    theirs, ours = _pair(batch_first=True)
    x = torch.randn(B, S, E)

    def penalty(module, x, **named):
        x = x.detach().requires_grad_()
        output = module(x, x, x, **named)[0]
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        grads = torch.autograd.grad(dx.square().sum(), list(module.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    oracle = penalty(copy.deepcopy(theirs).double(), x.double())
    actual = penalty(ours, x, need_weights=False)
    check_parity("gradients", actual, penalty(theirs, x), oracle, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: m(x[..., :8], y, y), ValueError, "query must be [length, 2, 48], got [5, 2, 8]"),
        (lambda m, x, y: m(x[None], y, y), ValueError, "query must be [T, E], or a batch of them in 3 dimensions"),
        (lambda m, x, y: m(x, y[:, :1], y), ValueError, "key must be [length, 2, 48], got [7, 1, 48]"),
        (lambda m, x, y: m(x, y[:, 0], y), ValueError, "key must be [length, 2, 48], got [7, 48]"),
        (lambda m, x, y: m(x[:, 0], y, y), ValueError, "key must be [length, 48], got [7, 2, 48]"),
        (lambda m, x, y: m(x, y, y[1:]), ValueError, "value must be as long as key, [7, 2, 48], got [6, 2, 48]"),
        (lambda m, x, y: m(x, y, y, torch.ones(2, 7)[:1]), ValueError, "key_padding_mask must be [2, 7], got [1, 7]"),
        (lambda m, x, y: m(x, y, y, torch.ones(2, 7).int()), TypeError, "key_padding_mask must be bool or floating"),
        (lambda m, x, y: m(x, y, y, attn_mask=torch.ones(7, 5)), ValueError, "attn_mask must be [5, 7] or [6, 5, 7]"),
        (lambda m, x, y: m(x, y, y, prefix_len=torch.tensor([1])), ValueError, "prefix_len must be [2]"),
        (lambda m, x, y: m(x, y, y, rotary=(x, y)), TypeError, "rotary must be a Rotary, got tuple"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(nn.MultiheadAttention(E, H), torch.randn(T, B, E), torch.randn(S, B, E))


def test_appended_keys_have_no_place():
    ours, x = nn.MultiheadAttention(E, H, add_bias_kv=True), torch.randn(S, B, E)
    bias = fastmix.RelativeBias(torch.randn(8, H))
    for name, value in (("prefix_len", torch.tensor([1, 1])), ("relative_bias", bias)):
        with pytest.raises(ValueError, match=f"{name} must be None where add_bias_kv or add_zero_attn append keys"):
            ours(x, x, x, **{name: value})
    with pytest.raises(ValueError, match="attn_mask must be the causal mask where is_causal and keys are appended"):
        ours(x, x, x, is_causal=True)
