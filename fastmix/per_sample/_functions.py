"""Which function a recorder treats how: PyTorch function → handler(recorder, function, *args, **kwargs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.per_sample import _layers, _products
from fastmix.per_sample._autograd import without_interception
from fastmix.per_sample._recorder import Recorder


def _multi_head_attention_forward(
    recorder: Recorder, func: Callable, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
):
    """Runs its body, so that the functions in it are intercepted."""
    batch = recorder.batch
    seen = next((tensor for tensor in (query, key, value) if recorder.has_samples(tensor)), None)
    if seen is None or seen.ndim != 3:
        return recorder.follow(func, query, key, value, *args, **kwargs)
    if batch.size is None:
        batch.size = seen.shape[1]
    elif seen.shape[1] != batch.size or (batch.size > 1 and batch.place(seen) != 1):
        raise ValueError(
            f"multi_head_attention_forward must see the batch, of {batch.size} samples, as the second dimension, got "
            f"{list(seen.shape)}: call the model batch first, with batch_first=True or a transposition before the layer"
        )
    batch.inside_attention = True
    try:
        with recorder:
            output, weights = _MHA_BODY(query, key, value, *args, **kwargs)
    finally:
        batch.inside_attention = False
    batch.places[output] = 1
    return output, weights


_MHA_BODY = without_interception(F.multi_head_attention_forward)

HANDLERS: dict[Callable, Callable] = {
    torch.autograd.grad: lambda _, func, *args, **kwargs: func(*args, **kwargs),
    F.linear: _products.linear,
    torch.addmm: _products.addmm,
    Tensor.addmm: _products.addmm,
    F.embedding: _layers.embedding,
    F.embedding_bag: _layers.embedding_bag,
    F.layer_norm: _layers.layer_norm,
    F.rms_norm: _layers.rms_norm,
    F.group_norm: _layers.group_norm,
    F.instance_norm: _layers.instance_norm,
    F.batch_norm: _layers.batch_norm,
    F.multi_head_attention_forward: _multi_head_attention_forward,
}
HANDLERS |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _products.matmul)
HANDLERS |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _products.conv)
HANDLERS |= dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _products.conv_transpose)
