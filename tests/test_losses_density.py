"""vae_log_prob: against densities known in closed form and autograd, chunks, random state, memory, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torch.profiler import ProfilerActivity, profile

from fastmix.losses import vae_log_prob

B, D, N = 3, 2, 5
LIKELIHOODS = ("gaussian", "bernoulli")


class _Recorder(nn.Module):
    """A decoder that keeps what it was given and what it returned."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder, self.given, self.returned = decoder, [], []

    def forward(self, z):
        self.given.append(z.detach())
        self.returned.append(self.decoder(z))
        return self.returned[-1]


def _decoder(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, N)).double()


def _arguments() -> tuple[torch.Tensor, ...]:
    x, mu, logvar = torch.rand(B, N), torch.randn(B, D), 0.5 * torch.randn(B, D)
    return tuple(t.double().requires_grad_() for t in (x, mu, logvar))


# A linear decoder with Gaussian noise, whose log p(x) is known


class _Linear:
    """p(x|z) = N(W·z + b, v), so p(x) = N(b, W·Wᵀ + v); W has orthogonal columns, so the posterior is diagonal."""

    variance = 0.3

    def __init__(self):
        weight = torch.linalg.qr(torch.randn(N, D).double()).Q * torch.tensor([1.0, 0.6])
        self.decoder = nn.Linear(D, N).double()
        self.decoder.weight.data = weight
        bias = self.decoder.bias.detach()
        self.x = bias + torch.randn(N).double()
        self.log_prob = MultivariateNormal(bias, weight @ weight.T + self.variance * torch.eye(N)).log_prob(self.x)
        self.posterior_variance = 1 / (1 + weight.square().sum(0) / self.variance)
        self.posterior_mean = self.posterior_variance * ((self.x - bias) @ weight) / self.variance

    def estimates(self, mean, variance, num_samples, repeats=4000, **named):
        with torch.no_grad():
            rows = [t.expand(repeats, -1) for t in (self.x, mean, variance.log())]
            return vae_log_prob(rows[0], self.decoder, *rows[1:], num_samples, variance=self.variance, **named)


def _z_score(draws: torch.Tensor, expected: torch.Tensor) -> float:
    return float((draws.mean() - expected) / (draws.std() / math.sqrt(len(draws))))


def test_the_exact_posterior_gives_the_exact_density():
    linear = _Linear()
    values = linear.estimates(linear.posterior_mean, linear.posterior_variance, 3, repeats=50)
    torch.testing.assert_close(values, linear.log_prob.expand(50))


def test_the_estimate_is_a_bound_that_tightens():
    linear = _Linear()
    mean, variance = linear.posterior_mean + 0.4, 1.5 * linear.posterior_variance
    encoder = Normal(mean, variance.sqrt())
    gap = kl_divergence(encoder, Normal(linear.posterior_mean, linear.posterior_variance.sqrt())).sum()
    values = {k: linear.estimates(mean, variance, k, chunk_size=50) for k in (1, 4, 16, 256)}
    # One latent: the bound is loose by the divergence of the two posteriors.
    assert abs(_z_score(values[1], linear.log_prob - gap)) < 4
    gaps = [float(linear.log_prob - draws.mean()) for draws in values.values()]
    assert gaps == sorted(gaps, reverse=True)
    for draws in values.values():
        assert _z_score(draws, linear.log_prob) < 3
        # The density itself, unlike its logarithm, is estimated without bias.
        assert abs(_z_score((draws - linear.log_prob).exp(), torch.ones(()))) < 4
    assert abs(gaps[-1]) < gaps[0] / 50


# Values and gradients


@pytest.mark.parametrize("chunk_size", [None, 4, 1])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_against_autograd(likelihood, chunk_size):
    """Of the definition, written with torch.distributions, on the latents that the decoder was given."""
    decoder, (x, mu, logvar) = _Recorder(_decoder()), _arguments()
    variance = 0.7 if likelihood == "gaussian" else 1.0
    named = {"likelihood": likelihood, "variance": variance, "chunk_size": chunk_size}
    value = vae_log_prob(x, decoder, mu, logvar, 10, **named)
    chunks = [z.view(-1, B, D) for z in decoder.given]
    assert max(map(len, chunks)) == (chunk_size or 10)
    std = (logvar / 2).exp()
    z = mu + std * ((torch.cat(chunks) - mu) / std).detach()
    decoded = decoder.decoder(z)
    p = (
        Normal(decoded, math.sqrt(variance))
        if likelihood == "gaussian"
        else Bernoulli(logits=decoded, validate_args=False)
    )
    log_weight = p.log_prob(x).sum(2) + Normal(0.0, 1.0).log_prob(z).sum(2) - Normal(mu, std).log_prob(z).sum(2)
    expected = log_weight.logsumexp(0) - math.log(10)
    torch.testing.assert_close(value, expected)
    leaves, grad_output = [x, mu, logvar, *decoder.parameters()], torch.randn(B).double()
    grads = torch.autograd.grad(value, leaves, grad_output)
    for one, other in zip(grads, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradcheck(likelihood):
    decoder, arguments = _decoder(), _arguments()

    def estimate(x, mu, logvar):
        generator = torch.Generator().manual_seed(1)
        return vae_log_prob(x, decoder, mu, logvar, 5, likelihood=likelihood, chunk_size=2, generator=generator)

    assert gradcheck(estimate, arguments)
    assert gradgradcheck(estimate, arguments)


def test_chunks_change_nothing():
    decoder, arguments = _decoder(), _arguments()
    leaves = [*arguments, *decoder.parameters()]

    def values(chunk_size):
        generator = torch.Generator().manual_seed(3)
        x, mu, logvar = arguments
        value = vae_log_prob(x, decoder, mu, logvar, 50, chunk_size=chunk_size, generator=generator)
        return value, *torch.autograd.grad(value.sum(), leaves)

    expected = values(50)
    for chunk_size in (1, 7, 16, 49, 1000):
        torch.testing.assert_close(values(chunk_size), expected)


def test_gradients_accumulate_in_parameters():
    decoder, (x, mu, logvar) = _decoder(), _arguments()
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        vae_log_prob(x, decoder, mu, logvar, 6, chunk_size=4, generator=generator).sum().backward()
    once = vae_log_prob(x, decoder, mu, logvar, 6, generator=torch.Generator().manual_seed(3)).sum()
    for leaf in (x, mu, *decoder.parameters()):
        torch.testing.assert_close(leaf.grad, 2 * torch.autograd.grad(once, leaf, retain_graph=True)[0])


def test_an_impossible_sample_has_density_zero_and_no_gradient():
    _, mu, logvar = _arguments()
    x = torch.ones(B, N).double()
    far = torch.tensor([[1.0], [1e200], [1.0]], dtype=torch.float64)  # whose square is infinite

    def decoder(z):
        return (far + z.sum(1).view(-1, B, 1)).flatten(0, 1).expand(-1, N)

    value = vae_log_prob(x, decoder, mu, logvar, 4, chunk_size=2)
    assert (value == -torch.inf).tolist() == [False, True, False]
    for grad in torch.autograd.grad(value.sum(), (mu, logvar)):
        assert (grad == 0).all(1).tolist() == [False, True, False]
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    decoder = _decoder().to(dtype)
    x, mu, logvar = (t.detach().to(dtype).requires_grad_() for t in _arguments())
    value = vae_log_prob(x, decoder, mu, logvar, 6, chunk_size=4)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in (x, mu, logvar, *decoder.parameters()))


def test_autocast_is_replayed():
    decoder = _Recorder(_decoder().float())
    x, mu, logvar = (t.detach().float().requires_grad_() for t in _arguments())
    with torch.autocast("cpu", torch.bfloat16):
        value = vae_log_prob(x, decoder, mu, logvar, 6, chunk_size=3)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert [t.dtype for t in decoder.returned] == 4 * [torch.bfloat16]


@pytest.mark.parametrize("shape", [(B,), (B, 2, 3, 4), (0, 5), (B, 0)], ids=str)
def test_shapes_of_x(shape):
    numel = math.prod(shape[1:])
    linear = nn.Linear(D, numel)
    mu = torch.randn(shape[0], D, requires_grad=True)
    value = vae_log_prob(torch.rand(shape), lambda z: linear(z).view(len(z), *shape[1:]), mu, mu, 5, chunk_size=2)
    assert value.shape == shape[:1]
    value.sum().backward()
    assert mu.grad.isfinite().all()


# Random state


def test_random_state():
    """It advances by one number, and a backward pass leaves it alone, with dropout too."""
    decoder, (x, mu, logvar) = _decoder(0.5), _arguments()
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        vae_log_prob(x, decoder.eval(), mu, logvar, 40, chunk_size=chunk_size)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        torch.randint(1 << 31, ())
        assert torch.equal(state, torch.get_rng_state())
    value = vae_log_prob(x, decoder.train(), mu, logvar, 6, chunk_size=2).sum()
    state = torch.get_rng_state()
    value.backward()
    assert torch.equal(state, torch.get_rng_state())


def test_generator():
    decoder, (x, mu, logvar) = _decoder(), _arguments()
    generator = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    values = [vae_log_prob(x, decoder, mu, logvar, 6, generator=generator) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert (values[0] != values[1]).all()
    torch.testing.assert_close(values[0], vae_log_prob(x, decoder, mu, logvar, 6, generator=generator.manual_seed(7)))


def test_latents_are_standard_normal():
    decoder = _Recorder(nn.Linear(1, 1))
    zero = torch.zeros(50, 1)
    with torch.no_grad():
        vae_log_prob(zero, decoder, zero, zero, 400, chunk_size=7)
    noise = torch.cat([z.view(-1, 50) for z in decoder.given]).double()
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert abs(noise.mean()) * math.sqrt(noise.numel()) < 4
    assert abs(noise.square().mean() - 1) * math.sqrt(noise.numel() / 2) < 4
    # Neither latents nor samples are related to each other.
    assert (torch.corrcoef(noise) - torch.eye(400)).abs().max() * math.sqrt(50) < 7
    assert (torch.corrcoef(noise.T) - torch.eye(50)).abs().max() * math.sqrt(400) < 5


def test_dropout_is_replayed():
    decoder, (x, mu, logvar) = _Recorder(_decoder(0.5)), _arguments()
    vae_log_prob(x, decoder, mu, logvar, 6, chunk_size=2).sum().backward()
    forward, again = decoder.returned[:3], decoder.returned[3:][::-1]
    torch.testing.assert_close(again, forward, rtol=0, atol=0)
    assert not torch.equal(forward[0], forward[1])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu(device):
    pytest.importorskip("triton")
    decoder = _decoder(0.5).float().cuda()
    x, mu, logvar = (t.detach().float().cuda().requires_grad_() for t in _arguments())

    def grads(chunk_size, train):
        decoder.train(train)
        generator = torch.Generator(device).manual_seed(3)
        value = vae_log_prob(x, decoder, mu, logvar, 40, chunk_size=chunk_size, generator=generator)
        return value, *torch.autograd.grad(value.sum(), (x, mu, logvar, *decoder.parameters()))

    torch.testing.assert_close(grads(7, False), grads(40, False), rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in grads(7, True))


# Memory


def _peak_mib(chunk_size: int) -> float:
    """Of the tensors that a forward and a backward pass hold at the same time."""
    decoder = nn.Linear(4, 20000)
    x, mu = torch.rand(2, 20000), torch.zeros(2, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        vae_log_prob(x, decoder, mu, mu, 200, chunk_size=chunk_size).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def test_memory_is_that_of_a_chunk():
    """All decoded at once are 31 MiB, ten latents 1.5 MiB, of which a pass has two, and its gradient a third."""
    assert _peak_mib(10) < 6
    assert _peak_mib(200) > 60


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "x must be a Tensor, got list", {"x": []}),
        (TypeError, "mu must be float32, .* got int64", {"mu": torch.ones(2, 3).long()}),
        (TypeError, "decoder must be callable, got str", {"decoder": "mlp"}),
        (TypeError, "num_samples must be an int, got float", {"num_samples": 2.0}),
        (TypeError, "chunk_size must be an int, got bool", {"chunk_size": True}),
        (TypeError, "variance must be a float, got Tensor", {"variance": torch.ones(())}),
        (TypeError, "generator must be a torch.Generator or None, got int", {"generator": 3}),
        (TypeError, "what decoder returns must be a Tensor, got tuple", {"decoder": lambda z: (z, z)}),
        (TypeError, "decoder must return a floating-point tensor, got int64",
         {"decoder": lambda z: torch.ones(len(z), 5).long()}),
        (ValueError, r"x must be \[B, …\], got \[\]", {"x": torch.ones(())}),
        (ValueError, r"mu must be \[B, D\] with B = 2, got \[3, 3\]", {"mu": torch.ones(3, 3)}),
        (ValueError, r"mu must be \[B, D\] with B = 2, got \[2\]", {"mu": torch.ones(2)}),
        (ValueError, r"logvar must be \[B, D\] = \[2, 3\], as mu is, got \[2, 1\]", {"logvar": torch.ones(2, 1)}),
        (ValueError, "logvar must be on the device of x, cpu, got meta", {"logvar": torch.ones(2, 3, device="meta")}),
        (ValueError, "num_samples must be at least 1, got 0", {"num_samples": 0}),
        (ValueError, "chunk_size must be at least 1, got -1", {"chunk_size": -1}),
        (ValueError, "likelihood must be one of 'gaussian', 'bernoulli', got 'normal'", {"likelihood": "normal"}),
        (ValueError, "variance must be above 0 and finite, got 0", {"variance": 0}),
        (ValueError, "variance must be above 0 and finite, got nan", {"variance": math.nan}),
        (ValueError, "variance must be left at 1 for the likelihood 'bernoulli', got 2.0",
         {"variance": 2.0, "likelihood": "bernoulli"}),
        (ValueError, r"decoder must return \[8, 5\] for z \[8, 3\] and x \[2, 5\], got \[8, 4\]",
         {"decoder": lambda z: torch.ones(len(z), 4)}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    good = {"x": torch.ones(2, 5), "decoder": nn.Linear(3, 5), "mu": torch.ones(2, 3), "logvar": torch.ones(2, 3),
            "num_samples": 4}  # fmt: skip
    with pytest.raises(error, match=match):
        vae_log_prob(**(good | arguments))
