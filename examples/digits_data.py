"""scikit-learn's 1797 handwritten digits of 8×8 pixels, a fifth of them for the test, which several examples read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] and labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(lowest: float = 0.0) -> Digits:
    """Images in [lowest, 1]; the split is the same every time."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    train_images, test_images = (lowest + (1 - lowest) * part for part in images)
    train_labels, test_labels = map(torch.tensor, parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def standardised(data: Digits) -> Digits:
    """The training images get mean 0 and deviation 1."""
    mean, std = data.train_images.mean(), data.train_images.std()
    images = {name: (getattr(data, name) - mean) / std for name in ("train_images", "test_images")}
    return replace(data, **images)
