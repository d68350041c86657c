"""Gradient penalties and gradient normalisation of whole models, and what else computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fastmix import per_sample
from fastmix.benchmarks.grad_norm_models import Setting, losses
from fastmix.benchmarks.harness import Provider
from fastmix.benchmarks.per_sample_peers import Tensors, on_setting, plain, taken

WEIGHT = 0.1  # of a penalty


# Penalty on the gradient by the parameters: gradients of mean L_i + WEIGHT·mean ‖∇_θ L_i‖²


def parameter_penalty_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    return (
        Provider("plain step", at(plain), yardstick=True),
        Provider("vmap(grad)", at(vmap_parameter_penalty)),
        Provider("batch-1 loop", at(loop_parameter_penalty)),
    )


def our_parameter_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    with per_sample.grad_norms(model):
        each = losses(model(x), y)
        (each.mean() + WEIGHT * per_sample.parameter_gradient_penalty(model, each)).backward()
    return taken(model)


def vmap_parameter_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    def loss(parameters, x, y):
        return losses(functional_call(model, parameters, (x[None],)), y[None])[0]

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), x, y).values()
    penalty = sum(g.square().sum() for g in grads) / len(x)
    (losses(model(x), y).mean() + WEIGHT * penalty).backward()
    return taken(model)


def loop_parameter_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    parameters, each = list(model.parameters()), losses(model(x), y)
    rows = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in each]
    penalty = sum(g.square().sum() for row in rows for g in row) / len(x)
    (each.mean() + WEIGHT * penalty).backward()
    return taken(model)


# Norms of the gradient by the input


def input_norm_peers(setting: Setting) -> tuple[Provider, ...]:
    at = functools.partial(on_setting, setting)
    return (
        Provider("forward, autograd.grad", at(input_gradient), yardstick=True),
        Provider("vmap(grad)", at(vmap_input_norms)),
        Provider("batch-1 loop", at(loop_input_norms)),
    )


def our_input_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return (per_sample.input_gradient_norms(model, x),)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x)


def vmap_input_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    gradients = vmap(grad(lambda one: model(one[None])[0, 0]))(x)
    return (gradients.flatten(1).norm(dim=1),)


def loop_input_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    return (torch.cat([input_gradient(model, one[None], y)[0].flatten(1).norm(dim=1) for one in x]),)


# Gradient normalisation of a GAN: the gradients of the discriminator's step, then of the generator's


class Gan(nn.Module):
    """SNDCGAN's discriminator of seven convolutions, without normalisation, and a generator, of images 32×32."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
            layers += [nn.Conv2d(before, after, *((4, 2, 1) if i % 2 else (3, 1, 1))), activation()]
        self.discriminator = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 8 * width, 1))
        ups = [nn.ConvTranspose2d(c, c // 2, 4, 2, 1) for c in (4 * width, 2 * width)]
        self.generator = nn.Sequential(
            nn.Linear(128, 4 * width * 64),
            nn.Unflatten(1, (4 * width, 8, 8)),
            *(layer for up in ups for layer in (nn.ReLU(), up)),
            nn.ReLU(),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Tanh(),
        )


def gan_setting(batch: int, width: int, smooth: bool = False) -> Setting:
    """x is real images, y what the generator makes images of."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.rand(batch, 3, 32, 32, generator=generator, dtype=torch.float64)
        return {"x": 2 * x - 1, "y": torch.randn(batch, 128, generator=generator, dtype=torch.float64)}

    activation = nn.SiLU if smooth else functools.partial(nn.LeakyReLU, 0.1)
    name = f"GAN B{batch} width {width}{', SiLU' if smooth else ''}"
    return Setting(name, functools.partial(Gan, width, activation), draw)


def critic_setting(batch: int, width: int) -> Setting:
    """The discriminator alone."""
    gan = gan_setting(batch, width)
    return Setting(gan.name.replace("GAN", "critic"), lambda: gan.make().discriminator, gan.draw)


def gan_peers(setting: Setting) -> tuple[Provider, ...]:
    return (
        Provider("PyTorch, double backward", on_setting(setting, gan_step(normalize))),
        Provider("without normalisation", on_setting(setting, gan_step(lambda d, x: d(x)[:, 0])), yardstick=True),
    )


def gan_step(normalized: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Tensor], Tensors]:
    """normalized(discriminator, x) → [B]."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
        fake = model.generator(y)
        (normalized(model.discriminator, fake.detach()).mean() - normalized(model.discriminator, x).mean()).backward()
        of_discriminator = taken(model.discriminator)
        (-normalized(model.discriminator, fake).mean()).backward()
        model.discriminator.zero_grad()
        return *of_discriminator, *taken(model.generator)

    return step


def normalize(discriminator: nn.Module, x: Tensor) -> Tensor:
    """GN as its authors write it."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    value = discriminator(x)[:, 0]
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value / (gradient.flatten(1).norm(dim=1) + value.abs())
