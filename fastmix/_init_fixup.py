"""Fixup: residual networks without normalisation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Generator, nn

from fastmix._init_scaling import lecun_normal_


def fixup_(
    model: nn.Module,
    branches: Iterable[nn.Module | Sequence[nn.Module]] | None = None,
    *,
    generator: Generator | None = None,
) -> nn.Module:
    """Initialises a model of residual branches so that it trains without normalisation, in place.

    With L branches, of m weight layers each (linear layers, convolutions, a ``torch.nn.MultiheadAttention``'s input
    projection, in the order in which they are registered): the last layer of each branch is 0, the others are He's
    normal times L^(−1/(2m − 2)), their biases 0; the scalars of :class:`fastmix.nn.Residual` are α = 1 and β = 0; and
    the classification layer, the last linear layer that is registered behind all branches, is 0, unless its weight is
    also an embedding's. All else, such as the stem, stays as it is. So a step of SGD changes the model's function by
    O(learning rate), whatever the depth. Zhang et al., Fixup Initialization: Residual Learning Without Normalization
    (arXiv:1901.09321), whose scalars only :class:`fastmix.nn.Residual` has.

    Args:
        model: with residual branches.
        branches: the residual branches, each a module or a sequence of layers, such as
            ``[(block.conv1, block.conv2) for block in blocks]``; None for those of the model's
            ``fastmix.nn.Residual(…, form="fixup")``.
        generator: to draw with, None for PyTorch's own.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: there are no branches, one is not the model's, has no weight layer or computes its weights
            (weight normalisation), or two branches share a layer.
    """
    # Here, since modules are built with initialisers.
    from fastmix.nn.ntk_linear import NTKLinear
    from fastmix.nn.residual import Residual, weight_layers, zero_layer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    residuals = [module for module in modules if isinstance(module, Residual) and module.form == "fixup"]
    if branches is None:
        branches = [residual.branch for residual in residuals]
    layers = [weight_layers(branch if isinstance(branch, nn.Module) else nn.ModuleList(branch)) for branch in branches]
    if not layers:
        raise ValueError(
            "model must have branches of fastmix.nn.Residual(…, form='fixup'), or branches must be given, "
            f"got {type(model).__name__} without"
        )
    places = {module: place for place, module in enumerate(modules)}
    counts = Counter(layer for branch in layers for layer in branch)
    for layer, count in counts.items():
        if layer not in places:
            raise ValueError(f"branches must be parts of model, {layer} is not")
        if count > 1:
            raise ValueError(f"branches must not share layers, {layer} is in {count}")

    for branch in layers:
        *others, last = branch
        zero_layer(last)
        for layer in others:
            gain = math.sqrt(2) * len(layers) ** (-1 / (2 * len(others)))
            # This layer divides by √in_features itself.
            _init_layer(layer, gain * layer.in_features**0.5 if isinstance(layer, NTKLinear) else gain, generator)
    for residual in residuals:
        residual.reset_parameters()
    behind = modules[max(places[layer] for layer in counts) + 1 :]
    heads = [module for module in behind if isinstance(module, (nn.Linear, NTKLinear))]
    embeddings = [module.weight for module in modules if isinstance(module, nn.Embedding)]
    if heads and not any(heads[-1].weight is weight for weight in embeddings):
        zero_layer(heads[-1])
    return model


def _init_layer(layer: nn.Module, gain: float, generator: Generator | None) -> None:
    if isinstance(layer, nn.MultiheadAttention):
        packed = layer.in_proj_weight is not None
        separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        weights, bias = (layer.in_proj_weight,) if packed else separate, layer.in_proj_bias
    else:
        weights, bias = (layer.weight,), layer.bias
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    for weight in weights:
        lecun_normal_(weight, gain, groups=groups, transposed=transposed, generator=generator)
    if bias is not None:
        nn.init.zeros_(bias)
