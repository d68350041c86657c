"""FNet of transformers, accelerated in place: the same function, and every thing a user does with a model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastmix.integrations.transformers import accelerate, restore
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytest.importorskip("transformers")
from transformers import FNetConfig, FNetForMaskedLM, FNetModel
from transformers.models.fnet import modeling_fnet

LAYERS = ["fnet.encoder.layer.0.fourier.self", "fnet.encoder.layer.1.fourier.self"]
WHAT = "FNetBasicFourierTransform → fastmix.fourier_mixing"


def _small(**changes) -> FNetForMaskedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    options = {**sizes, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, **changes}
    return FNetForMaskedLM(FNetConfig(**options)).eval()


def _ids(*shape: int, seed: int = 0, vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _as_reference(model: nn.Module) -> nn.Module:
    """The plain model with a transform that computes in float32 and rounds once, where torch.fft refuses the dtype."""

    for name in LAYERS:
        module = model.get_submodule(name)
        module.fourier_transform = lambda x: SimpleNamespace(real=torch.fft.fft2(x.float()).real.to(x.dtype))
    return model


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


@pytest.fixture
def model() -> FNetForMaskedLM:
    return _small()


def test_base_size_keeps_its_logits(recorded, assert_kernel, ordinary_memory):
    torch.manual_seed(0)
    model = FNetForMaskedLM(FNetConfig()).eval()  # base: 12 layers, 768 channels
    ids, tokens = _ids(2, 512, vocabulary=32000), slice(None, None, 4)
    with torch.inference_mode():
        plain = model(ids).logits[:, tokens]
        accelerate(model)
        with recorded() as ops:
            fast = model(ids).logits[:, tokens]
        assert_kernel(ops, "fourier_mixing")
        assert len(ops) in (0, 12)
        restore(model)
        oracle = model.double()(ids).logits[:, tokens]
    check_parity("FNet base, logits", fast, plain, oracle, independent=1)


@pytest.mark.parametrize("length", [1, 2, 17, 64, 97, 128])
def test_logits_and_gradients_of_any_length(model, length):
    ids = _ids(3, length)
    runs = []
    for prepare in (accelerate, restore, lambda m: m.double()):
        prepare(model)
        output = model(ids, labels=ids)
        grads = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        runs.append((output.logits.detach(), grads))
    outputs, grads = zip(*runs, strict=True)
    check_parity("logits", *outputs, independent=1)
    for (name, _), *of_parameter in zip(model.named_parameters(), *grads, strict=True):
        if name.startswith("fnet.pooler"):  # plays no part in the loss
            assert of_parameter == [None, None, None]
        else:
            check_parity(name, *of_parameter, factor=GRADIENT_FACTOR)


def test_training_has_the_same_loss_curve(recorded, assert_kernel):
    def train(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = _loss(model, _ids(2, 128, seed=len(losses) % 4))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    fast_model = _small()
    accelerate(fast_model)
    with recorded() as ops:
        fast = train(fast_model)
    assert_kernel(ops, "fourier_mixing")
    assert len(ops) in (0, 20 * 2 * 2)  # forward and backward of two layers
    plain, oracle = train(_small()), train(_small().double())
    check_parity("loss curve", fast, plain, oracle, factor=GRADIENT_FACTOR)
    assert fast[-1] < fast[0] - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_where_torch_refuses(model, dtype):
    ids = _ids(2, 96)
    model = model.to(dtype)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="Unsupported dtype"):
            model(ids)
        expected = _as_reference(copy.deepcopy(model))(ids).logits
        oracle = copy.deepcopy(model).double()(ids).logits
        accelerate(model)
        check_parity("logits", model(ids).logits, expected, oracle, independent=1)


def test_dtype_may_change_after_acceleration(model):
    ids = _ids(2, 32)
    accelerate(model)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            assert model.to(dtype)(ids).logits.dtype == dtype
    assert accelerate(model.to("meta"))
    assert model(ids.to("meta")).logits.shape == (2, 32, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    """Under autocast the transform keeps the dtype of its input; plain FNet's comes out in float32. Hooks stay."""
    ids = _ids(2, 96)
    oracle = copy.deepcopy(model).double()(ids).logits
    seen = []
    layer = model.fnet.encoder.layer[1].fourier.self
    layer.register_forward_hook(lambda _, given, got: seen.append((given[0].dtype, got[0].dtype)))
    with torch.autocast("cpu", dtype):
        plain = model(ids).logits
        accelerate(model)
        fast = model(ids).logits
        _loss(model, ids).backward()
    assert seen[0][1] == torch.float32
    assert all(given == got for given, got in seen[1:])
    check_parity("logits", fast, plain, oracle, independent=1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# What is replaced, and undone


def test_report_and_restore(model):
    types = {name: type(module) for name, module in model.named_modules()}
    ids = _ids(2, 50)
    before = model(ids).logits
    report = accelerate(model)
    assert report
    assert report.replaced == dict.fromkeys(LAYERS, WHAT)
    assert report.kept == {}
    assert str(report).splitlines() == ["fastmix computes 2 modules:", *(f"  {name}  {WHAT}" for name in LAYERS)]
    changed = {name for name, module in model.named_modules() if type(module) is not types[name]}
    assert changed == set(LAYERS)
    assert isinstance(model.get_submodule(LAYERS[0]), modeling_fnet.FNetBasicFourierTransform)

    accelerated = {name: type(module) for name, module in model.named_modules()}
    assert accelerate(model) == report
    assert {name: type(module) for name, module in model.named_modules()} == accelerated

    restore(model)
    restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert torch.equal(model(ids).logits, before)


def test_a_part_or_a_layer_of_a_model(model):
    report = accelerate(model.fnet.encoder.layer[1])
    assert report.replaced == {"fourier.self": WHAT}
    layer = model.fnet.encoder.layer[0].fourier.self
    assert accelerate(layer).replaced == {"": WHAT}
    assert "(the model)" in str(accelerate(layer))
    assert accelerate(model).replaced == dict.fromkeys(LAYERS, WHAT)


def test_state_dict_keeps_its_keys(model):
    plain = _small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert str(model.load_state_dict(before)) == "<All keys matched successfully>"
    assert str(plain.load_state_dict(after)) == "<All keys matched successfully>"
    restore(model)
    assert str(model.load_state_dict(after)) == "<All keys matched successfully>"


@pytest.mark.parametrize(("positions", "matrices"), [(128, True), (4097, False)])
def test_tpu_optimizations(monkeypatch, positions, matrices):
    """The matrices that replace the FFT stay in the state dict; what comes out is Re(fft2) of any length."""

    def dft(n):
        return torch.fft.fft(torch.eye(n, dtype=torch.float64)).numpy()

    monkeypatch.setattr(modeling_fnet, "is_scipy_available", lambda: True)
    monkeypatch.setattr(modeling_fnet, "linalg", SimpleNamespace(dft=dft), raising=False)
    changes = {"max_position_embeddings": positions}
    model = _small(use_tpu_fourier_optimizations=True, tpu_short_seq_length=32, **changes)
    names = list(model.state_dict())
    assert any("dft_mat_seq" in name for name in names) == matrices
    ids = _ids(2, 32)
    plain = model(ids).logits
    assert accelerate(model).replaced == dict.fromkeys(LAYERS, WHAT)
    fast = model(ids).logits
    assert list(model.state_dict()) == names
    assert str(model.load_state_dict(copy.deepcopy(model).state_dict())) == "<All keys matched successfully>"
    ordinary = _small(**changes).double()
    ordinary.load_state_dict(model.state_dict(), strict=False)
    check_parity("logits", fast, plain, ordinary(ids).logits, independent=1)

    x = torch.randn(2, 20, 64)  # here transformers cuts a part out of the matrix, which is no transform
    layer = model.get_submodule(LAYERS[0])
    check_parity("layer", layer(x)[0], torch.fft.fft2(x).real, torch.fft.fft2(x.double()).real, independent=1)


def test_shared_module_has_two_names(model):
    layers = model.fnet.encoder.layer
    layers[1].fourier.self = layers[0].fourier.self
    ids = _ids(2, 24)
    before = model(ids).logits
    assert set(accelerate(model).replaced) == set(LAYERS)
    assert layers[1].fourier.self is layers[0].fourier.self
    restore(model)
    assert torch.equal(model(ids).logits, before)


class _Scaled(modeling_fnet.FNetBasicFourierTransform):
    def forward(self, hidden_states):
        return (super().forward(hidden_states)[0] * 0.5,)


def test_what_users_changed_is_left_alone(model):
    layers = model.fnet.encoder.layer
    layers[0].fourier.self = _Scaled(model.config)
    layers[1].fourier.self.fourier_transform = partial(torch.fft.fftn, dim=(1, 2), norm="ortho")
    ids = _ids(2, 24)
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"left alone: .*_Scaled, a subclass of .*fourier_transform was exchanged"):
        accelerate(model)
    assert torch.equal(model(ids).logits, before)

    layers[1].fourier.self = modeling_fnet.FNetBasicFourierTransform(model.config)
    report = accelerate(model)
    assert report.replaced == {LAYERS[1]: WHAT}
    assert report.kept == {LAYERS[0]: "_Scaled, a subclass of FNetBasicFourierTransform"}
    assert str(report).splitlines()[2:] == ["left alone, 1 module:", f"  {LAYERS[0]}  {report.kept[LAYERS[0]]}"]
    restore(model)
    assert type(layers[0].fourier.self) is _Scaled

    layers[1].fourier.self.forward = lambda x: (x,)
    with pytest.raises(ValueError, match="its forward was replaced on the object"):
        accelerate(model)


# What users do with an accelerated model


def test_deepcopy_is_accelerated_and_restored_on_its_own(model, recorded, assert_kernel):
    ids = _ids(2, 40)
    plain = model(ids).logits
    accelerate(model)
    fast = model(ids).logits
    other = copy.deepcopy(model)
    restore(model)
    with recorded() as ops:
        assert torch.equal(other(ids).logits, fast)
    assert_kernel(ops, "fourier_mixing")
    assert torch.equal(model(ids).logits, plain)
    accelerate(model)
    restore(other)
    assert torch.equal(other(ids).logits, plain)
    assert torch.equal(model(ids).logits, fast)


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("store", [lambda m: pickle.loads(pickle.dumps(m)), _through_torch_save])
def test_stored_whole(model, store):
    ids = _ids(2, 40)
    plain = model(ids).logits
    accelerate(model)
    loaded = store(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    restore(loaded)
    assert torch.equal(loaded(ids).logits, plain)
    assert accelerate(loaded).replaced == dict.fromkeys(LAYERS, WHAT)


def test_save_pretrained(model, tmp_path):
    ids = _ids(2, 40)
    plain = model(ids).logits
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = FNetForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, plain)
    base = FNetModel.from_pretrained(tmp_path)
    assert len(accelerate(base).replaced) == 2


def test_gradient_checkpointing(model):
    accelerate(model)
    model.train()
    ids = _ids(2, 48)
    grads = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        _loss(model, ids).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compile_whole_graph(model, recorded):
    ids = _ids(2, 40)
    plain = model(ids).logits.detach()
    oracle = copy.deepcopy(model).double()(ids).logits.detach()
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor would take a minute
    check_parity("logits", compiled(ids).logits.detach(), plain, oracle, independent=1)
    grads = []
    for either in (compiled, model):
        model.zero_grad()
        _loss(either, ids).backward()
        grads.append(model.fnet.embeddings.word_embeddings.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_accelerated_after_compiling(model):
    """Dynamo guards on a module's class, so what was compiled before is compiled again."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    ids = _ids(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = compiled(ids).logits
    assert set(accelerate(compiled).replaced) == {f"_orig_mod.{name}" for name in LAYERS}
    compiled(ids)
    restore(compiled)
    assert torch.equal(compiled(ids).logits, plain)
    texts = [graph.print_readable(print_output=False) for graph in graphs]
    assert ["fft" in text.replace("fourier", "") and "fastmix" not in text for text in texts] == [True, False]


# Errors


def test_nothing_to_replace():
    with pytest.raises(ValueError, match=r"nothing that fastmix replaces in transformers models; looked for FNetBasic"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    restore(nn.Linear(2, 2))


@pytest.mark.parametrize("function", [accelerate, restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("google/fnet-base")


def test_without_transformers():
    code = """
import sys
from torch import nn
import fastmix.integrations.transformers as integration
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    integration.accelerate(nn.Linear(2, 2))
except ImportError as error:
    assert "fastmix[transformers]" in str(error), error
else:
    raise SystemExit("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
