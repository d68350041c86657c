"""Residual connections: post-norm, pre-norm, ReZero, SkipInit, Fixup, and a scale that rises on a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmix.nn.ntk_linear import NTKLinear
from fastmix.ops._check import check_choice, check_tensor, shape_text

_FORMS = ("post", "pre", "rezero", "skipinit", "fixup", "warmup_alpha")
_WITH_NORM = ("post", "pre", "warmup_alpha")
_WEIGHT_LAYERS = (nn.Linear, NTKLinear, nn.MultiheadAttention)
_WEIGHT_LAYERS += (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Residual(nn.Module):
    """A residual connection around a branch F, in one of six forms.

    - "post": norm(x + F(x)), as in the first Transformer. At initialisation, where F(x) is as large as x, each norm
      divides what came before by √2: of the input, 2^(−l/2) is left after l layers.
    - "pre": x + F(norm(x)). What comes out is not normalised: the model needs a norm after its last block.
      Xiong et al. (arXiv:2002.04745).
    - "skipinit": x + α·F(x), α a learned scalar, 0 at first: De and Smith (arXiv:2002.10444), in place of batch norm in
      residual networks, one α for a branch.
    - "rezero": the same formula: Bachlechner et al., ReZero (arXiv:2003.04887), in place of layer norm and warm-up, one
      α for a layer: in a Transformer its attention and its MLP share it (``mlp.scale = attention.scale``).
    - "fixup": x + α·F(x + β₁) + β₂, scalars, α = 1 and β = 0 at first, and the branch's last weight layer is set to 0
      here. A branch that is ``nn.Sequential`` has a β before each of its layers, as the paper has. The other weights
      depend on the whole model: call :func:`fastmix.init.fixup_` on it. Zhang et al. (arXiv:1901.09321).
    - "warmup_alpha": norm(x + α·F(x)), α not learned: it rises from 0 by 1/alpha_steps a step and stays at 1, so that
      the model starts as the identity and ends as post-norm.

    ReZero, SkipInit and Fixup stand in place of normalisation: they take no norm, and the branch should have none.

    Args:
        branch: F, a module that keeps the shape of its first argument.
        form: "post", "pre", "rezero", "skipinit", "fixup" or "warmup_alpha".
        norm: for "post", "pre" and "warmup_alpha", such as ``nn.LayerNorm(dim)``.
        alpha_steps: for "warmup_alpha": after as many steps α = 1.
        advance: for "warmup_alpha", what a step is: "forward", a forward in training mode, or "step", a call of
            :meth:`step`: for accumulated gradients, and for activation checkpointing, which repeats forwards.
        device: of the scalars.
        dtype: of the scalars.
    """

    def __init__(
        self,
        branch: nn.Module,
        form: str = "pre",
        *,
        norm: nn.Module | None = None,
        alpha_steps: int | None = None,
        advance: str = "forward",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("form", form, _FORMS)
        check_choice("advance", advance, ("forward", "step"))
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch must be a torch.nn.Module, got {type(branch).__name__}")
        if form in _WITH_NORM and not isinstance(norm, nn.Module):
            raise TypeError(f"norm must be a torch.nn.Module where form is {form!r}, got {type(norm).__name__}")
        if form not in _WITH_NORM and norm is not None:
            raise ValueError(f"norm must be None where form is {form!r}, got {type(norm).__name__}")
        if form != "warmup_alpha" and (alpha_steps is not None or advance != "forward"):
            raise ValueError(f"alpha_steps and advance must be left out where form is {form!r}")
        if form == "warmup_alpha" and (alpha_steps is None or alpha_steps < 1):
            raise ValueError(f"alpha_steps must be at least 1 where form is 'warmup_alpha', got {alpha_steps}")
        self.branch, self.norm = branch, norm
        self.form, self.alpha_steps, self.advance = form, alpha_steps, advance
        if form in ("rezero", "skipinit", "fixup"):
            # Not of shape [], which fully_shard does not take.
            self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        if form == "fixup":
            inputs = len(branch) if isinstance(branch, nn.Sequential) else 1
            self.biases = nn.Parameter(torch.empty(inputs + 1, device=device, dtype=dtype))
            zero_layer(weight_layers(branch)[-1])
        if form == "warmup_alpha":
            self.register_buffer("num_steps", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scalars as at first; the branch's weights stay."""
        if self.form in ("rezero", "skipinit", "fixup"):
            nn.init.constant_(self.scale, 1.0 if self.form == "fixup" else 0.0)
        if self.form == "fixup":
            nn.init.zeros_(self.biases)
        if self.form == "warmup_alpha":
            self.num_steps.zero_()

    @property
    def alpha(self) -> Tensor | float:
        """The factor of the branch now."""
        if self.form in ("post", "pre"):
            return 1.0
        return self._alpha(torch.float32) if self.form == "warmup_alpha" else self.scale

    def step(self) -> None:
        """One step of α, where form is "warmup_alpha" and advance is "step"; ValueError elsewhere."""
        if self.form != "warmup_alpha" or self.advance != "step":
            raise ValueError(
                "step() must be called where form is 'warmup_alpha' and advance is 'step' alone, "
                f"got {self.form!r} and {self.advance!r}"
            )
        self.num_steps.add_(1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: any shape that branch and norm take; further arguments are the branch's; x's shape comes out."""
        y = self._branch(self.norm(x) if self.form == "pre" else x, *args, **kwargs)
        check_tensor("branch(x)", y)
        if y.shape != x.shape:
            raise ValueError(f"branch(x) must be of x's shape, {shape_text(x)}, got {shape_text(y)}")
        if self.form in ("post", "pre"):
            y = x + y
        elif self.form == "warmup_alpha":
            y = x + self._alpha(y.dtype) * y
            if self.training and self.advance == "forward":
                self.num_steps.add_(1)
        elif self.form == "fixup":
            y = x + (self.scale.to(y.dtype) * y + self.biases[-1].to(y.dtype))
        else:
            y = x + self.scale.to(y.dtype) * y
        return self.norm(y) if self.form in ("post", "warmup_alpha") else y

    def _branch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.form != "fixup":
            return self.branch(x, *args, **kwargs)
        layers = self.branch if isinstance(self.branch, nn.Sequential) else (self.branch,)
        for layer, bias in zip(layers, self.biases[:-1], strict=True):
            x = layer(x + bias.to(x.dtype), *args, **kwargs)
            args, kwargs = (), {}
        return x

    def _alpha(self, dtype: torch.dtype) -> Tensor:
        """A tensor all along, so that a compiled forward is the same at every step."""
        steps = self.num_steps.to(torch.promote_types(dtype, torch.float32))
        return (steps / self.alpha_steps).clamp(max=1.0)

    def extra_repr(self) -> str:
        text = f"form={self.form!r}"
        if self.form == "warmup_alpha":
            text += f", alpha_steps={self.alpha_steps}, advance={self.advance!r}"
        return text


def weight_layers(branch: nn.Module) -> list[nn.Module]:
    """Linear layers, convolutions and PyTorch's attention inside a branch, in the order of their registration."""
    layers = [module for module in branch.modules() if isinstance(module, _WEIGHT_LAYERS)]
    if not layers:
        raise ValueError(f"a Fixup branch must have a linear layer or a convolution, {type(branch).__name__} has none")
    for layer in layers:
        # PyTorch's attention has no `weight`, and its own is followed by that of its output projection.
        if not isinstance(getattr(layer, "weight", layer), (nn.Parameter, nn.MultiheadAttention)):
            raise ValueError(f"a Fixup branch must have parameters for weights, {layer} computes its own")
    return layers


def zero_layer(layer: nn.Module) -> None:
    """Sets a layer's weight and bias to 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
