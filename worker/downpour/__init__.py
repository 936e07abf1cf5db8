"""Downpour: parameter-server training for PyTorch scripts.

::

    import downpour
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

and ``downpour run -w 4 -s 2 train.py``. Without the launcher, the same script trains as before.
"""

from __future__ import annotations

from downpour.api import (
    barrier,
    clock,
    device,
    epoch,
    is_chief,
    log,
    prepare,
    pull,
    push,
    rank,
    save,
    seed,
    should_stop,
    world_size,
)
from downpour_common.errors import (
    CheckpointError,
    ConfigError,
    DownpourError,
    ModelError,
    ModelMismatch,
    NonFiniteContribution,
    PeerError,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DownpourError",
    "ModelError",
    "ModelMismatch",
    "NonFiniteContribution",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "ProtocolError",
    "barrier",
    "clock",
    "device",
    "epoch",
    "is_chief",
    "log",
    "prepare",
    "pull",
    "push",
    "rank",
    "save",
    "seed",
    "should_stop",
    "world_size",
]
