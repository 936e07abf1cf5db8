"""Downpour: parameter-server training for PyTorch scripts.

::

    import downpour
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

and ``downpour run -w 4 -s 2 train.py``. Without the launcher, the same script trains as before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    BundleError,
    CheckpointError,
    ConfigError,
    DownpourError,
    JobFailed,
    ModelError,
    ModelMismatch,
    NonFiniteContribution,
    PeerError,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
)

if TYPE_CHECKING:
    from downpour.jobs.api import Job, job, nodes, submit
    from downpour.jobs.errors import ClusterError, CoordinatorUnreachable, Forbidden, JobCancelled, NotFinished
    from downpour.jobs.status import JobStatus

__all__ = [
    "BundleError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "CoordinatorUnreachable",
    "DownpourError",
    "Forbidden",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobStatus",
    "ModelError",
    "ModelMismatch",
    "NonFiniteContribution",
    "NotFinished",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "ProtocolError",
    "barrier",
    "clock",
    "device",
    "epoch",
    "is_chief",
    "job",
    "log",
    "nodes",
    "prepare",
    "pull",
    "push",
    "rank",
    "save",
    "seed",
    "should_stop",
    "submit",
    "world_size",
]

_CLUSTER = {
    **dict.fromkeys(("Job", "job", "nodes", "submit"), "downpour.jobs.api"),
    **dict.fromkeys(
        ("ClusterError", "CoordinatorUnreachable", "Forbidden", "JobCancelled", "NotFinished"), "downpour.jobs.errors"
    ),
    "JobStatus": "downpour.jobs.status",
}
"""What a training script does not need, imported at its first use."""


def __getattr__(name: str) -> Any:
    if name not in _CLUSTER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_CLUSTER[name]), name)
    return value
