"""Opacus' private training with its clipped gradients taken from fastmix: the same as Opacus' own, in every mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastmix.integrations.opacus import accelerate

pytest.importorskip("opacus")
from opacus import PrivacyEngine
from opacus.layers import DPMultiheadAttention
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # on layers whose input needs no gradient
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.usefixtures("one_thread"),
]

WAYS = ("engine", "optimizer")


# Models, with inputs


class Attention(nn.Module):
    """With Opacus' attention, on ids [B, T]; tokens first on [T, B]."""

    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.attention = DPMultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.tokens = 1 if batch_first else 0

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x).mean(self.tokens)


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.GroupNorm(3, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def words():
    return nn.Sequential(nn.Embedding(20, 8), nn.Conv1d(5, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(18, 4))


def mlp():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.RMSNorm(9), nn.Linear(9, 4))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


_draw = torch.Generator().manual_seed(0)
IMAGES = torch.randn(12, 3, 8, 8, generator=_draw)
VECTORS = torch.randn(12, 6, dtype=torch.float64, generator=_draw)
IDS = torch.randint(20, (12, 5), generator=_draw)
MODELS = {
    "mlp with frozen layers": (mlp, VECTORS),
    "conv": (conv, IMAGES),
    "attention": (Attention, IDS),
    "attention, as many tokens as samples": (Attention, IDS[:, :4]),
}


def train(run, epochs=1, loader=None):
    """The gradients that each step took, and the model's parameters behind them."""
    found = []
    for _ in range(epochs):
        for x, y in loader or run.loader:
            run.optimizer.zero_grad()
            run.criterion(run.module(x), y).backward()
            run.optimizer.step()
            found += [] if run.optimizer._is_last_step_skipped else run.grads()
    return [*found, *(p.detach().clone() for p in run.model.parameters())]


@pytest.fixture
def check_same(private):
    """check_same(make, x, step=…, …): a step, or several, take what Opacus' own take."""

    def check(make, x, *, step=train, engine=PrivacyEngine, **options):
        def find(way):
            torch.manual_seed(1)
            return step(private(make(), x, way=way, engine=engine(accountant="rdp"), **options))

        expected = find(None)
        assert any(value.norm() > 0 for value in expected)
        for way in WAYS:
            torch.testing.assert_close(find(way), expected)

    return check


# The same clipped gradients


@pytest.mark.parametrize(
    ("mode", "loss_reduction"),
    [("hooks", "mean"), ("hooks", "sum"), ("functorch", "mean"), ("ghost", "mean"), ("ghost", "sum")],
)
@pytest.mark.parametrize("name", list(MODELS))
def test_clipped_gradients(name, mode, loss_reduction, check_same):
    make, x = MODELS[name]
    check_same(make, x, mode=mode, loss_reduction=loss_reduction)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_tokens_first(mode, check_same):
    def make():
        return Attention(batch_first=False, add_bias_kv=True)

    def step(run):
        return train(run, loader=[(x.t(), y) for x, y in run.loader])

    check_same(make, IDS, step=step, mode=mode, batch_first=False)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_float32(mode, private):
    expected, *found = (
        train(private(conv(), IMAGES, way=way, mode=mode, dtype=torch.float32)) for way in (None, *WAYS)
    )
    for actual in found:
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 1e-5 * b.norm()


ADAPTIVE = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.5, "max_clipbound": 5.0}
ADAPTIVE |= {"min_clipbound": 0.01, "unclipped_num_std": 1.0, "clipping": "adaptive"}


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("options", [{"clipping": "per_layer", "max_grad_norm": [0.1, 0.2, 0.05, 0.3]}, ADAPTIVE])
def test_other_ways_to_clip(mode, options, check_same):
    check_same(mlp, VECTORS, mode=mode, **options)


def test_adaptive_ghost_clipping(check_same):
    """Its factors are not the module's, and its criterion gives losses as they are."""

    def step(run):
        run.criterion.criterion.reduction = "none"
        return train(run)

    check_same(mlp, VECTORS, step=step, engine=PrivacyEngineAdaptiveClipping, mode="ghost", min_clipbound=0.01)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_noise_accountant_and_schedulers(mode, private):
    def find(way):
        generator = torch.Generator().manual_seed(5)
        run = private(mlp(), VECTORS, way=way, noise_multiplier=1.3, mode=mode, noise_generator=generator)
        schedulers = [ExponentialNoise(run.optimizer, gamma=0.8), ExponentialGradClip(run.optimizer, gamma=0.5)]
        found = []
        for _ in range(3):
            found += train(run)
            for scheduler in schedulers:
                scheduler.step()
        assert len({noise for noise, *_ in run.engine.accountant.history}) == 3
        return [*found, torch.tensor(run.engine.accountant.history)]

    expected = find(None)
    for way in WAYS:
        torch.testing.assert_close(find(way), expected)


def test_epsilon():
    """Of make_private_with_epsilon, which finds the noise."""
    options = {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2, "max_grad_norm": 1.0}
    found = []
    for is_accelerated in (False, True):
        torch.manual_seed(0)
        model, engine = mlp(), PrivacyEngine(accountant="gdp")
        if is_accelerated:
            accelerate(engine)
        data = TensorDataset(VECTORS.float(), torch.arange(12) % 4)
        module, optimizer, criterion, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad]),
            data_loader=DataLoader(data, batch_size=4),
            grad_sample_mode="ghost",
            **options,
        )
        for x, y in itertools.chain(loader, loader):
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
        found.append(engine.get_epsilon(1e-3))
    assert type(optimizer).__name__ == "AcceleratedGhostDPOptimizer"
    assert 0 < found[1] <= 5.0
    assert found[1] == found[0]


# Batches


@pytest.mark.parametrize(("make", "x"), [(mlp, VECTORS), (words, IDS)])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_poisson_batches_and_empty_ones(mode, make, x, private):
    def find(way):
        run, found, sizes = private(make(), x, way=way, mode=mode, poisson_sampling=True), [], []
        torch.manual_seed(4)
        for batch, y in itertools.chain.from_iterable([run.loader] * 4):
            sizes.append(len(batch))
            found += train(run, loader=[(batch, y)])
            assert len(batch) or not any(p.grad.any() for p in run.optimizer.params)
        assert 0 in sizes
        assert max(sizes) > 2
        return [*found, torch.tensor(run.engine.accountant.history)]

    # Opacus' ghost norms of an embedding fail for no samples.
    expected = find("optimizer" if make is words and mode == "ghost" else None)
    torch.testing.assert_close(find("engine"), expected)


def test_the_adaptive_bound_stays_when_nobody_counts(private):
    """Opacus' own optimizer refuses an empty batch."""
    run = private(mlp(), VECTORS, way="engine", noise_multiplier=0.5, **ADAPTIVE)
    for size in (4, 0, 0, 4):
        bound = float(run.optimizer.max_grad_norm)
        run.step(VECTORS[:size], y=torch.arange(size) % 4)
        assert (run.optimizer.max_grad_norm == bound) == (size == 0)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_virtual_steps(mode, check_same):
    def step(run):
        torch.manual_seed(2)
        with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer) as loader:
            found = train(run, epochs=2, loader=loader)
        assert run.engine.accountant.history[0][-1] == 6
        return found

    check_same(mlp, VECTORS, step=step, mode=mode, poisson_sampling=True)


def test_accumulation(check_same):
    def step(run):
        (x1, y1), (x2, y2), _ = run.loader
        for x, y in ((x1, y1), (x2[:3], y2[:3])):
            run.criterion(run.module(x), y).backward()
        assert run.optimizer.accumulated_iterations == 2
        run.optimizer.step()
        return run.grads()

    check_same(mlp, VECTORS, step=step)


def test_accumulation_is_forbidden_with_poisson_sampling(private):
    run = private(mlp(), VECTORS, way="engine", poisson_sampling=True)
    run.module(VECTORS).sum().backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        run.module(VECTORS).sum().backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradients_are_cleared_and_taken_once(mode, way, private):
    run = private(mlp(), VECTORS, way=way, mode=mode)
    (x, y), *_ = run.loader
    run.criterion(run.module(-x), y).backward()
    run.optimizer.zero_grad()
    assert all(p.grad_sample is None for p in run.optimizer.params)
    torch.testing.assert_close(run.step(x, y=y), private(mlp(), VECTORS, mode=mode).step(x, y=y))
    if mode == "hooks":
        with pytest.raises(ValueError, match="Gradients haven't been cleared"):
            run.optimizer.step()


# A real task


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_digits(mode):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)

    def find(is_accelerated):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        engine = PrivacyEngine(accountant="rdp")
        if is_accelerated:
            accelerate(engine)
        module, optimizer, *criterion, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=100),
            noise_multiplier=0.8,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        criterion = criterion[0] if criterion else nn.CrossEntropyLoss()
        torch.manual_seed(1)
        for images, labels in itertools.chain(loader, loader):
            optimizer.zero_grad()
            criterion(module(images), labels).backward()
            optimizer.step()
        return (model(x[1500:]).argmax(1) == y[1500:]).double().mean().item(), engine.accountant.history

    (fast, spent), (plain, spent_by_opacus) = find(True), find(False)
    assert spent == spent_by_opacus
    assert fast > 0.7
    assert abs(fast - plain) < 0.01
