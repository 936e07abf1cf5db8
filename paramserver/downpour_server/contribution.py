"""A contribution inside the shard: what a Push or PushPull becomes once it has been checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Contribution:
    """``gradient`` is flat, of the chunk's dtype and length; the memory is the shard's own,
    or its worker's until the answer."""

    slot: int
    seq: int
    samples: int
    base_version: int
    hyper: bytes
    gradient: torch.Tensor
    position: tuple[int, ...] = ()
    """of the training data once this contribution counts"""
    void: bool = False
    """it holds NaN or Inf, or has no samples: it counts for its round, and is left out of the mean"""
