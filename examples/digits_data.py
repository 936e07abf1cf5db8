"""Scikit-learn's handwritten digits, split once for the two digits examples.

1,797 images of 8x8 pixels with values 0..16, in ten classes. Part of scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SPLIT_SEED = 1797
"""Seed of the split, not of the training: whatever its `--seed`, every run is tested on the same images."""


@dataclass(frozen=True)
class Digits:
    """Images are float32 of shape (n, 1, 8, 8) with values 0..1, labels int64 of shape (n,)."""

    train: TensorDataset
    test_images: Tensor
    test_labels: Tensor


def load(test_fraction: float = 0.2) -> Digits:
    """Return the digits, shuffled by a fixed seed and cut in two; the same on every worker."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test_count = round(test_fraction * len(labels))
    test, train = order[:test_count], order[test_count:]
    return Digits(TensorDataset(images[train], labels[train]), images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Return the share of `images` that `model` labels rightly; leaves the model in training mode."""
    model.eval()
    predicted = model(images.to(device)).argmax(dim=1).cpu()
    model.train()
    return int((predicted == labels).sum()) / len(labels)
