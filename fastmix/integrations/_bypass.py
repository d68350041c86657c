"""When a fused forward may pass a peer's inner modules by: they are of a class whose parameters tell all, and unhooked.

The fused forwards ask at every call, because people register hooks, wrap layers (LoRA) or exchange them at any time.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def needed(name: str, module: nn.Module, *classes: type[nn.Module]) -> str | None:
    """Why a module must be called itself, or None if using its parameters is the same; classes says what it may be."""
    if type(module) not in classes:
        return f"its {name} is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return f"the forward of its {name} was replaced on the object"
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return f"its {name} has hooks"
    return None


def needed_norm(name: str, module: nn.Module, *others: type[nn.Module]) -> str | None:
    """As `needed`, for a LayerNorm over the channels, or one of the other classes."""
    reason = needed(name, module, nn.LayerNorm, *others)
    if reason is None and type(module) is nn.LayerNorm and len(module.normalized_shape) != 1:
        return f"its {name} normalises over several dimensions"
    return reason


def needed_activation(name: str, module: nn.Module) -> str | None:
    """As `needed`, for what `activation_name` knows."""
    return needed(name, module, nn.GELU, nn.ReLU, nn.SiLU)


def activation_name(module: nn.Module) -> str:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "relu" if type(module) is nn.ReLU else "silu"


def layer_norm_options(module: nn.LayerNorm) -> dict[str, Any]:
    return {"norm": "layer", "norm_weight": module.weight, "norm_bias": module.bias, "eps": module.eps}


def drops(dropout: nn.Module) -> bool:
    """Whether a Dropout drops anything now; an Identity in its place never does."""
    return dropout.training and getattr(dropout, "p", 0) > 0
