"""What a worker draws in a synchronous job follows from the job's seed and from where the worker is.

So a process that goes on where another was, after a resume or in the place of one that has died, draws what that would
have drawn. It happens once a step, so everything that costs is left out: ``torch.manual_seed``, which looks at all
kinds of devices and takes longer than a small model's backward, and numpy's ``SeedSequence``.
"""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch

_PLACE = struct.Struct("<5q")
_SEEDS = struct.Struct("<QQI")


class StepSeeds:
    """Seeds ``torch``, ``random`` and ``numpy`` of this process, for the worker in ``slot``."""

    def __init__(self, seed: int, slot: int) -> None:
        self._seed = seed
        self._slot = slot

    def reseed(self, clock: int, loader: int = 0, batch: int = 0) -> None:
        """Begin what is drawn for the step after ``clock``, from the ``batch``-th batch of ``loader`` on."""
        place = _PLACE.pack(self._seed, self._slot, clock, loader, batch)
        sow(*_SEEDS.unpack(hashlib.blake2b(place, digest_size=_SEEDS.size).digest()))


def sow(first: int, second: int, third: int) -> None:
    """Seed the generators that scripts draw from; a GPU's only if it is in use."""
    torch.default_generator.manual_seed(first)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(first)
    random.seed(second)
    np.random.seed(third)
