"""gradient_normalize and GradientNormalized: derivatives, what they cost, bounds in training, modes, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmix.nn import GradientNormalized
from fastmix.per_sample import gradient_normalize
from fastmix.testing.gradient_normalize import discriminator_of, note_claims, plain, values_and_gradients

MODES = ["gn", "gran"]


@pytest.fixture
def claims(monkeypatch):
    return note_claims(monkeypatch)


@pytest.fixture
def one_thread():
    """For work too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("eps", [None, 0.3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.SiLU()], ids=["piecewise linear", "smooth"])
def test_third_order(layer, mode, eps):
    """A gradient penalty on D̂, differentiated by the parameters and x."""
    model, x = discriminator_of(layer, nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))

    def of(function):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(model, leaf, mode=mode, eps=eps).sum(), leaf, create_graph=True)
        penalty = (gradient.flatten(1).square().sum(1) - 0.5).square().sum()
        return gradient, penalty, *torch.autograd.grad(penalty, [leaf, *model.parameters()], materialize_grads=True)

    for actual, expected in zip(of(gradient_normalize), of(plain), strict=True):
        torch.testing.assert_close(actual, expected)


# Training


def _step(discriminator, x, mode):
    """D̂ and the norms of its gradients by x, in float64."""
    x = x.detach().requires_grad_()
    ratio = gradient_normalize(discriminator, x, mode=mode)
    (gradient,) = torch.autograd.grad(ratio.sum(), x, retain_graph=True)
    return ratio, gradient.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("mode", MODES)
def test_bounds_throughout_the_training_of_a_gan(mode, ordinary_memory, one_thread, claims):
    """‖∇_x D̂‖ ≤ 1, and |D̂| ≤ 1 in gn, but for the rounding of float32."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(), nn.Linear(128, 1),
    )  # fmt: skip
    generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    start = [p.detach().clone() for p in discriminator.parameters()]
    adam = {
        model: torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.0, 0.9)) for model in (discriminator, generator)
    }
    bound = 1 + 8 * torch.finfo(torch.float32).eps
    for _ in range(500):
        real, z = digits[torch.randint(len(digits), (16,))], torch.randn(16, 8)
        ratio, norms = _step(discriminator, torch.cat([real, generator(z).detach()]), mode)
        assert norms.max() <= bound
        assert mode == "gran" or ratio.abs().max() <= bound
        adam[discriminator].zero_grad()
        (F.relu(1 - ratio[:16]).mean() + F.relu(1 + ratio[16:]).mean()).backward()
        adam[discriminator].step()
        adam[generator].zero_grad()
        (-gradient_normalize(discriminator, generator(z), mode=mode).mean()).backward()
        adam[generator].step()
    assert all(claims)
    assert all((p - old).norm() > 0.1 * old.norm() for p, old in zip(discriminator.parameters(), start, strict=True))
    fakes = generator(torch.randn(256, 8)).detach()
    assert (fakes.mean(0) - digits.mean(0)).square().mean() < digits.mean(0).square().mean() / 4  # it has learned


def test_gran_is_not_bounded():
    """D = 3 + x/10: D̂ = 3·0.1/(0.1² + 0.1) > 1 at 0."""
    discriminator = nn.Linear(1, 1)
    nn.init.constant_(discriminator.weight, 0.1)
    nn.init.constant_(discriminator.bias, 3)
    ratio = gradient_normalize(discriminator, torch.zeros(1, 1), mode="gran")
    torch.testing.assert_close(ratio, torch.tensor([0.3 / 0.11]))
    assert gradient_normalize(discriminator, torch.zeros(1, 1)) < 1


class _Counter(TorchDispatchMode):
    """How often convolutions, and which gradients of them, are computed."""

    def __init__(self):
        super().__init__()
        self.counts = {"forward": 0, "input": 0, "weight": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.counts["forward"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.counts["input"] += args[-1][0]
            self.counts["weight"] += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU(inplace=True), nn.SiLU()], ids=str)
def test_how_much_is_computed(activation, frozen):
    """Of four convolutions, by both steps: without a second backward if piecewise linear."""
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), activation)]
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *layers, nn.Flatten(), nn.Linear(48, 1)).requires_grad_(not frozen)
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    with _Counter() as counter:
        gradient_normalize(model, x).sum().backward()
    if isinstance(activation, nn.SiLU):
        assert counter.counts["input"] >= 8
    elif frozen:
        assert counter.counts == {"forward": 4, "input": 4, "weight": 0}
    else:
        assert counter.counts == {"forward": 8, "input": 4, "weight": 4}


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.SiLU()], ids=["piecewise linear", "smooth"])
def test_gradients_reach_the_generator(layer):
    """x is no leaf; with the discriminator frozen it is the same gradient."""
    model, _ = discriminator_of(layer)
    generator, z = nn.Linear(5, 72).double(), torch.randn(4, 5).double()

    def gradients(function):
        generator.zero_grad()
        function(model, generator(z).view(4, 2, 6, 6)).sum().backward()
        return [p.grad for p in generator.parameters()]

    expected = gradients(plain)
    torch.testing.assert_close(gradients(gradient_normalize), expected)
    model.requires_grad_(False)
    torch.testing.assert_close(gradients(gradient_normalize), expected)
    assert all(p.grad is None or p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.SiLU()], ids=["piecewise linear", "smooth"])
def test_what_the_discriminator_keeps_may_be_differentiated(layer):
    """A loss on its features beside the normalised output."""
    model, x = discriminator_of(layer, nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    kept = []
    model.layers.register_forward_hook(lambda module, inputs, output: kept.append(output))

    def gradients(function):
        kept.clear()
        model.zero_grad()
        (function(model, x).sum() + kept[0].square().sum()).backward()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(gradient_normalize), gradients(plain))


# Modes and inputs


def test_without_gradients():
    model, x = discriminator_of(nn.ReLU())
    expected = plain(model, x).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            ratio = gradient_normalize(model, x)
            inside = gradient_normalize(model, x.clone())
        assert not ratio.requires_grad
        torch.testing.assert_close(ratio, expected)
        torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, shape, claims):
    model, x = discriminator_of(nn.LeakyReLU(0.1))
    discriminator = nn.Sequential(model, nn.Flatten(0) if shape == (4,) else nn.Identity())
    oracle = gradient_normalize(discriminator, x)
    model.to(dtype)
    ratio = gradient_normalize(discriminator, x.to(dtype))
    assert ratio.dtype == torch.float32
    torch.testing.assert_close(ratio.double(), oracle, rtol=0, atol=50 * torch.finfo(dtype).eps)
    ratio.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(claims)


@pytest.mark.parametrize("layer", [nn.LeakyReLU(0.1), nn.SiLU()], ids=["piecewise linear", "smooth"])
def test_autocast(layer):
    """The cosine to the gradients in float32."""
    model, x = discriminator_of(layer, nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3))
    model, x = model.float(), x.float()
    expected = values_and_gradients(model, x, gradient_normalize)
    expected = {name: grad.clone() for name, grad in expected.items() if grad is not None}
    with torch.autocast("cpu", torch.bfloat16):
        ratio = gradient_normalize(model, x)
    assert ratio.dtype == torch.float32
    torch.testing.assert_close(ratio, expected["ratio"], rtol=0.05, atol=0.05)
    model.zero_grad()
    (ratio * torch.linspace(-1, 2, len(x))).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), expected[name].flatten(), dim=0) > 0.98, name


class _Center(nn.Module):
    """Subtracts a moving mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, h):
        centered = h - self.mean
        with torch.no_grad():
            self.mean.lerp_(h.mean((0, 2, 3))[:, None, None], 0.1)
        return centered


def test_a_buffer_may_be_updated_after_its_use(claims):
    model, x = discriminator_of(_Center())
    other = copy.deepcopy(model)
    expected = values_and_gradients(other, x, plain)
    for name, grad in values_and_gradients(model, x, gradient_normalize).items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])
    torch.testing.assert_close(model.layers[0].mean, other.layers[0].mean)
    assert claims == [True]


@pytest.mark.parametrize("constant", [0.1, torch.tensor([257])], ids=["float", "int64"])
def test_constants_are_not_rounded_to_the_dtype_of_x(constant, claims):
    """As in a discriminator whose end is computed in float32."""
    found = []

    def discriminator(x):
        found.append(x.float().sum(1) + constant)
        return found[-1]

    x = torch.randn(4, 8).bfloat16()
    gradient_normalize(discriminator, x)
    assert claims == [True]
    torch.testing.assert_close(found[0].detach(), x.float().sum(1) + constant, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    model, x = discriminator_of(nn.ReLU(), nn.MaxPool2d(2))
    x = x[:batch]
    ratio = gradient_normalize(model, x)
    assert ratio.shape == (batch,)
    ratio.sum().backward()
    if batch:
        torch.testing.assert_close(ratio, plain(model, x))


def test_a_leaf_gets_its_gradient_and_a_constant_is_left_alone():
    model, x = discriminator_of(nn.ReLU())
    gradient_normalize(model, x).sum().backward()
    assert x.grad is None
    assert not x.requires_grad


def test_conditional_discriminator(claims):
    """A closure over what x was made from, and over labels."""
    model, _ = discriminator_of(nn.ReLU())
    latent = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(4, 2, 6, 6, dtype=torch.float64)

    def gradients(function):
        made = mix * latent.view(4, 1, 1, 1)
        (gradient,) = torch.autograd.grad(function(lambda x: model(x) + 2 * latent + latent.exp(), made).sum(), latent)
        return gradient

    torch.testing.assert_close(gradients(gradient_normalize), gradients(plain))
    assert claims == [True]


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.SiLU()], ids=["piecewise linear", "smooth"])
def test_compiled_discriminator(layer):
    """It runs eagerly: what is compiled can't be differentiated twice."""
    torch._dynamo.reset()
    model, x = discriminator_of(layer)

    def gradients(discriminator):
        model.zero_grad()
        gradient_normalize(discriminator, x).sum().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(model)
    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


def test_values_in_compiled_code(monkeypatch):
    """PyTorch follows torch.autograd.grad if it is told to, and says so."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(2, 3)
    compiled = torch.compile(lambda x: gradient_normalize(model, x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="trace_autograd_ops"):
            compiled(x)
        monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
        torch.testing.assert_close(compiled(x), gradient_normalize(model, x))


# Errors


def _bad(function):
    return lambda x: function(x.flatten(1))


@pytest.mark.parametrize(
    ("error", "match", "discriminator", "arguments"),
    [
        (ValueError, r"discriminator's output must be \[B\] or \[B, 1\], .* B = 3, got \[3, 2\]",
         _bad(lambda x: x[:, :2]), {}),
        (ValueError, r"discriminator's output must be \[B\] or \[B, 1\], .* B = 3, got \[\]",
         _bad(lambda x: x.sum()), {}),
        (ValueError, r"discriminator's output must be \[B\] or \[B, 1\], .* B = 3, got \[1, 3\]",
         _bad(lambda x: x.sum(1)[None]), {}),
        (TypeError, "discriminator's output must be a Tensor, got tuple", lambda x: (x, x), {}),
        (ValueError, "discriminator's output must depend on x",
         _bad(lambda x: x.detach().sum(1)), {}),
        (ValueError, "discriminator's output must depend on x",
         lambda x: torch.ones(3, requires_grad=True) * 2, {}),
        (ValueError, "mode must be one of 'gn', 'gran', got 'GN'", nn.Identity(), {"mode": "GN"}),
        (ValueError, "eps must be finite and at least 0, got -1", nn.Identity(), {"eps": -1}),
        (TypeError, "eps must be a float or None, got str", nn.Identity(), {"eps": "1"}),
        (TypeError, "x must be a Tensor, got float", nn.Identity(), {"x": 1.0}),
        (TypeError, "x must be float32, .* got int64", nn.Identity(), {"x": torch.ones(3).long()}),
        (TypeError, "x must be float32, .* got complex64", nn.Identity(), {"x": torch.ones(3).cfloat()}),
        (ValueError, r"x must be \[B, …\], got \[\]", nn.Identity(), {"x": torch.ones(())}),
        (ValueError, "discriminator has the layer '1', a BatchNorm1d that is in training mode",
         nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 1)), {}),
        (ValueError, "discriminator has the layer '1', a SyncBatchNorm that is in training mode",
         nn.Sequential(nn.Flatten(), nn.SyncBatchNorm(4), nn.Linear(4, 1)), {}),
        (ValueError, "discriminator has the layer '2', a BatchNorm1d that keeps no running statistics",
         nn.Sequential(nn.Flatten(), nn.SiLU(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).eval(),
         {}),
        (ValueError, "discriminator must treat samples apart, got BatchNorm in training",
         lambda x: F.batch_norm(x.flatten(1), None, None, training=True).sum(1), {}),
        (TypeError, "discriminator must be callable, got float", 1.0, {}),
    ],
)  # fmt: skip
def test_errors(error, match, discriminator, arguments):
    with pytest.raises(error, match=match):
        gradient_normalize(discriminator, **({"x": torch.randn(3, 2, 2)} | arguments))


# The module


@pytest.mark.parametrize("mode", MODES)
def test_module(mode):
    model, x = discriminator_of(nn.ReLU(), nn.Dropout(0.5))
    module = GradientNormalized(model, mode=mode, eps=0.2)
    torch.testing.assert_close(module(x), gradient_normalize(model, x, mode=mode, eps=0.2))
    assert list(module.state_dict()) == [f"discriminator.{name}" for name in model.state_dict()]
    assert list(module.parameters()) == list(model.parameters())
    assert not module.training or module.train(False)
    assert not model.training
    assert module.train().discriminator.layers[1].training
    other = GradientNormalized(copy.deepcopy(model), mode=mode, eps=0.2)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other.eval()(x), module.eval()(x))
    assert f"mode={mode!r}, eps=0.2" in repr(module)
    assert GradientNormalized(model, "gran").eps == 0.1


def test_errors_of_the_module():
    with pytest.raises(TypeError, match=r"discriminator must be a torch.nn.Module, got function"):
        GradientNormalized(lambda x: x)
    with pytest.raises(ValueError, match="mode must be one of"):
        GradientNormalized(nn.Linear(2, 1), mode="ratio")
    with pytest.raises(ValueError, match="eps must be"):
        GradientNormalized(nn.Linear(2, 1), eps=-1.0)
