"""State dicts of timm's mixer, resmlp and gmlp models: they load unchanged, both ways, and give the same logits."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from fastmix import nn
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

timm = pytest.importorskip("timm")
mlp_mixer = timm.models.mlp_mixer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 3, "num_classes": 7}
# Model → timm's, and ours.
MODELS = {
    "mixer": (mlp_mixer.MlpMixer, nn.MLPMixer),
    "resmlp": (
        functools.partial(mlp_mixer.MlpMixer, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=4),
        nn.ResMLP,
    ),
    "gmlp": (
        functools.partial(
            mlp_mixer.MlpMixer,
            block_layer=mlp_mixer.SpatialGatingBlock,
            mlp_layer=mlp_mixer.GatedMlp,
            mlp_ratio=6,
        ),
        nn.GMLP,
    ),
}
NAMED = {
    "mixer_s16_224": nn.mixer_s16,
    "mixer_b16_224": nn.mixer_b16,
    "mixer_l16_224": nn.mixer_l16,
    "mixer_b32_224": functools.partial(nn.mixer_b16, patch_size=32),
    "resmlp_12_224": nn.resmlp_12,
    "resmlp_24_224": nn.resmlp_24,
    "resmlp_36_224": nn.resmlp_36,
    "gmlp_ti16_224": nn.gmlp_ti16,
    "gmlp_s16_224": nn.gmlp_s16,
    "gmlp_b16_224": nn.gmlp_b16,
}


def _pair(name, **named):
    """timm's model, with parameters away from its initialisation (the classifier starts at 0), and ours with them."""
    theirs, ours = (make(**SMALL | named) for make in MODELS[name])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    return theirs, ours


def _run(model, x):
    output = model(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return output.detach(), dict(zip(names, torch.autograd.grad((weight * output).sum(), parameters), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name):
    theirs, ours = _pair(name)
    x = torch.randn(4, 3, 32, 32)
    oracle, oracle_grads = _run(copy.deepcopy(theirs).double(), x.double())
    expected, expected_grads = _run(theirs, x)
    output, grads = _run(ours, x)
    check_parity("logits", output, expected, oracle, independent=1, factor=FORWARD_FACTOR)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        check_parity(key, grad, expected_grads[key], oracle_grads[key], factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("name", MODELS)
def test_float64_is_the_same_model(name):
    theirs, ours = (model.double() for model in _pair(name))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", MODELS)
def test_ours_loads_into_timms(name):
    theirs, ours = (make(**SMALL) for make in MODELS[name])
    assert theirs.load_state_dict(ours.state_dict(), strict=True) == ([], [])


def test_other_widths():
    """mlp_ratio in place of the papers' sizes."""
    theirs, ours = (model.double() for model in _pair("mixer", mlp_ratio=(1.5, 2.0)))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_timms_names_and_shapes(name):
    with torch.device("meta"):
        theirs, ours = (model.state_dict() for model in (timm.create_model(name), NAMED[name]()))
    assert {key: list(value.shape) for key, value in ours.items()} == {
        key: list(value.shape) for key, value in theirs.items()
    }
