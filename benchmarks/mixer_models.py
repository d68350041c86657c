"""Whole MLP-Mixers of timm before and after accelerate: inference, and a step of training."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.benchmarks.models import Model, ModelCase, Part
from fastmix.benchmarks.peers import missing

MODEL = "mixer_b16_224"


def cases(device: str, full: bool) -> list[ModelCase]:
    depth, batch = (12, 8) if full else (2, 2)
    if device == "cuda":
        batch = 256
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    blocks = f"{depth} of 12 blocks" if depth < 12 else "12 blocks"
    what = f"timm {MODEL}, {blocks}, batch {batch}, {str(dtype).removeprefix('torch.')}, random weights"
    return [
        ModelCase(
            "token_mixing",
            f"{what}, {task}",
            functools.partial(mixer, MODEL, depth, batch, dtype, device, training),
            missing("timm"),
        )
        for task, training in (("inference", False), ("training step (forward, loss, backward, SGD)", True))
    ]


def mixer(name: str, depth: int, batch: int, dtype: torch.dtype, device: str, training: bool) -> Model:
    """A timm mixer whose replaced parts are the token halves of its blocks, cut down to so many blocks."""
    import timm

    from fastmix.integrations.timm import accelerate, restore

    torch.manual_seed(0)
    model = timm.create_model(name).train(training)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # it is zero at first, and would stop every gradient
    model.blocks = model.blocks[:depth]
    model.to(device, dtype)
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    labels = torch.randint(0, 1000, (batch,), device=device)
    shape = (batch, model.stem.num_patches, model.embed_dim)
    # A step costs the same with any learning rate; with 0 the next one is the same.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return model.stem.proj.weight.grad.clone()  # it has come through every block

    return Model(
        run=step if training else lambda: model(images),
        # The token half of a block ends where the channel half begins, with its norm.
        parts=[
            Part(block, torch.randn(shape, device=device, dtype=dtype), until=block.norm2) for block in model.blocks
        ],
        accelerate=lambda: accelerate(model),
        restore=lambda: restore(model),
        training=training,
    )
