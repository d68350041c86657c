"""Token-mixing models of timm and lucidrains, accelerated in place: what users do with such a model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.utils import parametrize

from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

CHANNELS = 12


def _timm(block: str, **options) -> nn.Module:
    mlp_mixer = pytest.importorskip("timm.models.mlp_mixer")
    options |= {"block_layer": getattr(mlp_mixer, block), "embed_dim": CHANNELS, "num_blocks": 2}
    return mlp_mixer.MlpMixer(num_classes=5, img_size=20, patch_size=4, **options)


def _timm_gmlp() -> nn.Module:
    return _timm("SpatialGatingBlock", mlp_ratio=3, mlp_layer=pytest.importorskip("timm.layers").GatedMlp)


def _timm_resmlp() -> nn.Module:
    mlp_mixer = pytest.importorskip("timm.models.mlp_mixer")
    return _timm("ResBlock", mlp_ratio=2, norm_layer=mlp_mixer.Affine)


def _mlp_mixer() -> nn.Module:
    sizes = {"image_size": 20, "channels": 3, "patch_size": 4, "dim": CHANNELS, "depth": 2, "num_classes": 5}
    return pytest.importorskip("mlp_mixer_pytorch").MLPMixer(**sizes)


def _g_mlp() -> nn.Module:
    sizes = {"image_size": 20, "patch_size": 4, "dim": CHANNELS, "depth": 2, "num_classes": 5, "attn_dim": 6}
    return pytest.importorskip("g_mlp_pytorch").gMLPVision(**sizes)


# Name → integration, model, the modules that are replaced, the op, a module inside that is passed by.
MODELS = {
    "timm mixer": ("timm", partial(_timm, "MixerBlock"), "blocks.{}", "token_mixing_mlp", "mlp_tokens.fc1"),
    "timm resmlp": ("timm", _timm_resmlp, "blocks.{}", "token_linear", "linear_tokens"),
    "timm gmlp": ("timm", _timm_gmlp, "blocks.{}.mlp_channels.gate", "token_linear", "proj"),
    "mlp-mixer-pytorch": ("lucidrains", _mlp_mixer, "{}.0", "token_mixing_mlp", "fn.0"),
    "g-mlp-pytorch": ("lucidrains", _g_mlp, "layers.{}.fn.fn.sgu", "token_linear", "norm"),
}


class Accelerated:
    """A model with random parameters, none of them without effect, and its integration."""

    def __init__(self, name: str) -> None:
        integration, make, layers, self.op, self.inner = MODELS[name]
        self.integration = importlib.import_module(f"fastmix.integrations.{integration}")
        torch.manual_seed(0)
        self.model = make().eval()
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.layers = [layers.format(i + 2 if name == "mlp-mixer-pytorch" else i) for i in range(2)]
        self.images = torch.randn(3, 3, 20, 20)

    def inner_module(self, layer: int) -> nn.Module:
        return self.model.get_submodule(f"{self.layers[layer]}.{self.inner}")

    def accelerate(self):
        return self.integration.accelerate(self.model)

    def restore(self):
        self.integration.restore(self.model)


@pytest.fixture(params=list(MODELS))
def case(request) -> Accelerated:
    return Accelerated(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(case, dtype, check_accelerated, assert_kernel):
    ops = check_accelerated(case.integration, case.model.to(dtype), case.images.to(dtype))
    assert_kernel(ops, case.op, dtype)
    assert len(ops) in (0, 4)  # forward and backward of two layers


def test_autocast(case, check_accelerated, assert_kernel):
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    ops = check_accelerated(case.integration, case.model, case.images, context=context)
    assert_kernel(ops, case.op, torch.bfloat16)


def test_training_has_the_same_loss_curve(case, recorded, assert_kernel):
    labels = torch.tensor([0, 3, 1])

    def train(model, images):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(images), labels))
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    plain, exact = copy.deepcopy(case.model), copy.deepcopy(case.model).double()
    case.accelerate()
    with recorded() as ops:
        fast = train(case.model, case.images)
    assert_kernel(ops, case.op)
    oracle = train(exact, case.images.double())
    check_parity("loss curve", fast, train(plain, case.images), oracle, factor=GRADIENT_FACTOR)
    assert fast[-1] < fast[0]


def test_compile_whole_graph(case, needs_kernels):
    texts = []

    def backend(graph, inputs):  # inductor would take a minute
        texts.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    def run(answer, model, images):
        output = answer(images)
        return output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))

    exact = copy.deepcopy(case.model).double()
    case.accelerate()
    compiled = torch.compile(case.model, fullgraph=True, backend=backend)
    runs = [(compiled, case.model, case.images), (case.model, case.model, case.images)]
    for results in zip(*(run(*each) for each in (*runs, (exact, exact, case.images.double()))), strict=True):
        check_parity("output, then gradients", *results, factor=GRADIENT_FACTOR)
    (text,) = texts
    assert f"fastmix.{case.op}" in text


# What is replaced, and undone


def test_report_and_restore(case):
    types = {name: type(module) for name, module in case.model.named_modules()}
    keys = list(case.model.state_dict())
    before = case.model(case.images)
    report = case.accelerate()
    assert list(report.replaced) == case.layers
    assert all(f"fastmix.{case.op}" in text for text in report.replaced.values())
    assert report.kept == {}
    changed = {name for name, module in case.model.named_modules() if type(module) is not types[name]}
    assert changed == set(case.layers)
    assert list(case.model.state_dict()) == keys
    assert case.accelerate() == report
    case.restore()
    assert {name: type(module) for name, module in case.model.named_modules()} == types
    assert torch.equal(case.model(case.images), before)


def test_copies_stay_accelerated(case, recorded, assert_kernel):
    plain = case.model(case.images)
    case.accelerate()
    fast = case.model(case.images)
    for store in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = store(case.model)
        with recorded() as ops:
            assert torch.equal(other(case.images), fast)
        assert_kernel(ops, case.op)
        case.integration.restore(other)
        assert torch.equal(other(case.images), plain)
    assert torch.equal(case.model(case.images), fast)


def test_hooks_of_the_replaced_module_fire(case):
    calls = []
    case.model.get_submodule(case.layers[0]).register_forward_hook(lambda *_: calls.append("before"))
    case.accelerate()
    case.model.get_submodule(case.layers[1]).register_forward_hook(lambda *_: calls.append("after"))
    case.model(case.images)
    assert calls == ["before", "after"]


# What is passed by must be what it seems


class _Wrapped(nn.Module):
    """As LoRA does it: the layer, and something more. The layer's parameters can be read through it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(super().__getattr__("layer"), name)

    def forward(self, x):
        return self.layer(x) + 1.0


def _wrap(case, seen):
    parent, _, name = f"{case.layers[0]}.{case.inner}".rpartition(".")
    setattr(case.model.get_submodule(parent), name, _Wrapped(case.inner_module(0)))


def _hook(case, seen):
    case.inner_module(0).register_forward_hook(lambda *_: seen.append(1))


def _exchange_forward(case, seen):
    inner = case.inner_module(0)
    inner.forward = lambda x: type(inner).forward(inner, x) * 0.5


def _parametrize(case, seen):
    parametrize.register_parametrization(case.inner_module(0), "weight", nn.Tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_wrap, "is a _Wrapped"),
        (_hook, "has hooks"),
        (_exchange_forward, "was replaced on the object"),
        (_parametrize, "is a Parametrized"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_changed_inner_modules_are_called(case, change, reason, later):
    """Before accelerate the layer is left alone, later it computes as the peer does."""
    seen = []
    if later:
        case.accelerate()
    change(case, seen)
    if not later:
        report = case.accelerate()
        assert list(report.replaced) == case.layers[1:]
        assert list(report.kept) == case.layers[:1]
        assert reason in report.kept[case.layers[0]]
        assert case.inner in report.kept[case.layers[0]]
    fast = case.model(case.images)
    assert len(seen) == (change is _hook)
    case.restore()
    plain = case.model(case.images)
    check_parity("logits", fast, plain, case.model.double()(case.images.double()), independent=1)


# Errors


@pytest.mark.parametrize(("integration", "peers"), [("timm", "timm models"), ("lucidrains", "g-mlp-pytorch models")])
def test_nothing_to_replace(integration, peers):
    module = importlib.import_module(f"fastmix.integrations.{integration}")
    with contextlib.suppress(ImportError):  # the peer is not installed
        with pytest.raises(ValueError, match=f"nothing that fastmix replaces in .*{peers}; looked for "):
            module.accelerate(nn.Linear(2, 2))
        module.restore(nn.Linear(2, 2))
        for function in (module.accelerate, module.restore):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
                function("mixer_b16_224")


@pytest.mark.parametrize(
    ("integration", "peers"), [("timm", ["timm"]), ("lucidrains", ["mlp_mixer_pytorch", "g_mlp_pytorch"])]
)
def test_without_the_peer(integration, peers):
    code = f"""
import sys
from torch import nn
import fastmix.integrations.{integration} as integration
assert not set({peers}) & set(sys.modules)
sys.modules |= dict.fromkeys({peers})
try:
    integration.accelerate(nn.Linear(2, 2))
except ImportError as error:
    assert "pip install fastmix[{integration}]" in str(error), error
else:
    raise SystemExit("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
