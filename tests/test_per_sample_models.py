"""per_sample.grad_norms of attention, recurrent networks, fastmix's modules and whole models, against the loop."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastmix.nn as fnn
from fastmix.testing.per_sample import ModelCase, check_case

B, S, C = 3, 5, 8  # samples, tokens, channels


def floats(*shape):
    return lambda: (torch.randn(shape),)


class First(nn.Module):
    """The first result of a module, called with its input in each of `times` places, samples first outside."""

    def __init__(self, module, times=1, *, sequence_first=False, **options):
        super().__init__()
        self.module, self.times, self.sequence_first, self.options = module, times, sequence_first, options

    def forward(self, *inputs):
        inputs = inputs * self.times if len(inputs) == 1 else inputs
        if self.sequence_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        output = self.module(*inputs, **self.options)
        output = output[0] if isinstance(output, tuple) else output
        return output.transpose(0, 1) if self.sequence_first else output


def attention(name, inputs=None, *, batch_first=True, cls=nn.MultiheadAttention, call=None, **options):
    def make():
        module = cls(C, 2, batch_first=batch_first, **options)
        return First(module, 3, sequence_first=not batch_first, **(call or {}))

    return ModelCase(f"{cls.__module__.split('.')[0]} attention, {name}", make, inputs or floats(B, S, C))


def cross(q=C, k=C, v=C, keys=6):
    return lambda: (torch.randn(B, S, q), torch.randn(B, keys, k), torch.randn(B, keys, v))


CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
ATTENTION = [
    attention("batch first"),
    attention("sequence first", batch_first=False),
    attention("as many tokens as samples and channels", floats(8, 8, 8)),
    attention("as many tokens as samples and channels, sequence first", floats(8, 8, 8), batch_first=False),
    attention("without weights", call={"need_weights": False}),
    attention("causal", call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    attention("without bias", bias=False),
    attention("bias of keys and values", add_bias_kv=True),
    attention("bias of keys and values, sequence first", add_bias_kv=True, batch_first=False),
    attention("added zeros", add_zero_attn=True),
    attention("cross", cross()),
    attention("cross, sequence first", cross(), batch_first=False),
    attention("cross, as many keys as samples, sequence first", cross(keys=B), batch_first=False),
    attention("keys and values of other widths", cross(k=3, v=6), kdim=3, vdim=6),
    attention("keys and values of other widths, sequence first", cross(k=3, v=6), kdim=3, vdim=6, batch_first=False),
    attention("batch first", cls=fnn.MultiheadAttention),
    attention("sequence first", cls=fnn.MultiheadAttention, batch_first=False),
    attention("cross", cross(), cls=fnn.MultiheadAttention),
    attention("without weights", cls=fnn.MultiheadAttention, call={"need_weights": False}),
]


def recurrent(cls, name, inputs=None, **options):
    options = {"batch_first": True} | options

    def make():
        return First(cls(C, 6, **options), sequence_first=not options["batch_first"])

    return ModelCase(f"{cls.__name__} {name}", make, inputs or floats(B, S, C))


class LastState(nn.Module):
    """The final hidden state, [layers, B, H] in any case."""

    def __init__(self, cls, **options):
        super().__init__()
        self.rnn = cls(C, 6, batch_first=True, **options)

    def forward(self, x):
        state = self.rnn(x)[1]
        return (state[0] if isinstance(state, tuple) else state).transpose(0, 1)


class Cells(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cell = cls(C, 6)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


RECURRENT = [
    *(
        recurrent(cls, name, **options)
        for cls in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in {
            "batch first": {},
            "sequence first": {"batch_first": False},
            "two layers": {"num_layers": 2},
            "bidirectional": {"bidirectional": True, "num_layers": 2},
            "bidirectional, sequence first": {"bidirectional": True, "batch_first": False},
        }.items()
    ),
    recurrent(nn.LSTM, "as many steps as samples, sequence first", floats(B, B, C), batch_first=False),
    recurrent(nn.LSTM, "projected", proj_size=2),
    recurrent(nn.GRU, "without bias", bias=False),
    ModelCase("LSTM, last state", functools.partial(LastState, nn.LSTM, num_layers=2), floats(B, S, C)),
    ModelCase("GRU, last state", functools.partial(LastState, nn.GRU, bidirectional=True), floats(B, S, C)),
    ModelCase("LSTM cell", lambda: Cells(nn.LSTMCell), floats(B, S, C)),
    ModelCase("GRU cell", lambda: Cells(nn.GRUCell), floats(B, S, C)),
]

LAYER = {"d_model": C, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0}
TRANSFORMERS = [
    ModelCase(
        f"encoder layer, {'pre' if norm_first else 'post'}-norm, {'batch' if batch_first else 'sequence'} first",
        lambda norm_first=norm_first, batch_first=batch_first: First(
            nn.TransformerEncoderLayer(**LAYER, norm_first=norm_first, batch_first=batch_first),
            sequence_first=not batch_first,
        ),
        floats(B, S, C),
    )
    for norm_first in (False, True)
    for batch_first in (False, True)
]
TRANSFORMERS += [
    ModelCase(
        "decoder layer",
        lambda: nn.TransformerDecoderLayer(**LAYER, batch_first=True),
        lambda: (torch.randn(B, S, C), torch.randn(B, 6, C)),
    ),
    ModelCase(
        "encoder of two layers",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER, batch_first=True), 2),
        floats(B, S, C),
    ),
]

IMAGE = {"img_size": 8, "patch_size": 4, "embed_dim": C, "num_blocks": 1, "num_classes": 5}
GRID = 4  # tokens of such an image


def image(cls, vanishing=(), **options):
    return ModelCase(cls.__name__, lambda: cls(**IMAGE, **options), floats(B, 3, 8, 8), vanishing)


def tokens(cls, *sizes, **options):
    name = f"{cls.__name__} {options.get('kind', '')}".strip()
    return ModelCase(name, lambda: cls(*sizes, **options), floats(B, S, C))


OWN = [
    # What one value adds to all channels, the norm behind it takes away.
    image(fnn.MLPMixer, ("mlp_tokens.fc2.bias",)),
    image(fnn.ResMLP, init_values=0.5),
    image(fnn.FeedForwardStack, ("mlp2.fc2.bias",)),
    image(fnn.GMLP, attention_dim=4),
    image(fnn.GFNet),
    image(fnn.EAMLP, ("norm1.bias",), num_heads=2, memory_size=6, expansion=2),
    tokens(fnn.FNetBlock, C, dropout=0.0),
    tokens(fnn.FNetBlock, C, dropout=0.0, mixing="linear", seq_len=S),
    tokens(fnn.ExternalAttention, C, num_heads=2, memory_size=6),
    *(tokens(fnn.Synthesizer, C, S, kind, num_heads=2) for kind in ("random", "factorized_random", "dense")),
    *(tokens(fnn.TokenConv, C, 3, kind, num_heads=heads) for kind, heads in (("depthwise", 1), ("dynamic", 2))),
    tokens(fnn.TokenConv, C, 3, "lightweight", num_heads=2, causal=True),
    ModelCase(
        "RoFormerEncoder",
        lambda: fnn.RoFormerEncoder(
            vocab_size=11, embed_dim=C, num_blocks=1, num_heads=2, dropout=0.0, attention_dropout=0.0, max_seq_len=S
        ),
        lambda: (torch.randint(1, 11, (B, S)),),
        vanishing=("key.bias",),
    ),
    ModelCase(
        "T5Attention",
        lambda: fnn.T5Attention(C, 2, 4, has_relative_attention_bias=True, num_buckets=8, dropout=0.0),
        floats(B, S, C),
    ),
]

CASES = ATTENTION + RECURRENT + TRANSFORMERS + OWN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_model(case, dtype):
    check_case(case, dtype, "mean")


@pytest.mark.parametrize("case", [*ATTENTION[:4], *TRANSFORMERS], ids=str)
def test_products_inside_are_found(case):
    methods = check_case(case, torch.float64).methods
    assert {how for name, how in methods.items() if name.endswith("weight")}.isdisjoint({"generic", "unused"})


# Models of others


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=C, n_layer=2, n_head=2)
    return Logits(GPT2LMHeadModel(config).eval())


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=13, hidden_size=C, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8,
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config).eval())


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=C, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return Logits(ViTForImageClassification(config).eval())


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=13, hidden_size=C, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config).eval())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs).logits


def _ids():
    return (torch.randint(0, 13, (B, 6)),)


def _ids_of_different_lengths():
    return *_ids(), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "case",
    [
        ModelCase("GPT-2", _gpt2, _ids),
        ModelCase("BERT", _bert, _ids, vanishing=("key.bias",)),
        ModelCase("BERT with a padding mask", _bert, _ids_of_different_lengths, vanishing=("key.bias",)),
        ModelCase("ViT", _vit, floats(B, 3, 8, 8), vanishing=("k_proj.bias",)),
        ModelCase("Llama", _llama, _ids),
    ],
    ids=str,
)
def test_transformers(case, reduction):
    pytest.importorskip("transformers")
    methods = check_case(case, torch.float32, reduction).methods
    assert all("generic" not in how for name, how in methods.items() if "dense" in name or "c_attn" in name)
