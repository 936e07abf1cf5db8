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
    add_samples,
    barrier,
    clock,
    device,
    epoch,
    forward_backward,
    is_chief,
    log,
    minimize,
    prepare,
    pull,
    push,
    rank,
    save,
    seed,
    should_stop,
    stop,
    unsplit,
    version,
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
    from downpour import optim
    from downpour.clipping import clip_grad_norm_
    from downpour.jobs.api import Job, job, nodes, submit
    from downpour.jobs.errors import ClusterError, CoordinatorUnreachable, Forbidden, JobCancelled, NotFinished
    from downpour.jobs.status import JobStatus
    from downpour.parallel.branches import Branches
    from downpour.parallel.plan import Plan
    from downpour.sandblaster import Minimum

__all__ = [
    "Branches",
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
    "Minimum",
    "ModelError",
    "ModelMismatch",
    "NonFiniteContribution",
    "NotFinished",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "Plan",
    "ProtocolError",
    "add_samples",
    "barrier",
    "clip_grad_norm_",
    "clock",
    "device",
    "epoch",
    "forward_backward",
    "is_chief",
    "job",
    "log",
    "minimize",
    "nodes",
    "optim",
    "prepare",
    "pull",
    "push",
    "rank",
    "save",
    "seed",
    "should_stop",
    "stop",
    "submit",
    "unsplit",
    "version",
    "world_size",
]

_LATER = {
    **dict.fromkeys(("Job", "job", "nodes", "submit"), "downpour.jobs.api"),
    **dict.fromkeys(
        ("ClusterError", "CoordinatorUnreachable", "Forbidden", "JobCancelled", "NotFinished"), "downpour.jobs.errors"
    ),
    "JobStatus": "downpour.jobs.status",
    "clip_grad_norm_": "downpour.clipping",
    "Minimum": "downpour.sandblaster",
    "Branches": "downpour.parallel.branches",
    "Plan": "downpour.parallel.plan",
    "optim": "downpour.optim",
}
"""What few training scripts need, or what would import torch, imported at its first use."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    value = globals()[name] = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    return value
