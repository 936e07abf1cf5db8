"""What can go wrong between a user and a cluster.

::

    DownpourError
    ├── ConfigError
    │   └── BadJobFile               a job file cannot be used                               (exit code 78)
    ├── ClusterError
    │   ├── CoordinatorUnreachable   nobody answers at the address                           (69)
    │   ├── Forbidden                keys are refused, or do not allow what was asked        (77)
    │   ├── Unknown                  no such job, node or file                               (2)
    │   ├── JobRefused               the coordinator will not do this, and says why          (2)
    │   ├── ResultsDiffer            files are in the way of a download                      (74)
    │   └── NotFinished              the job goes on; the time to wait for it is over        (101)
    ├── JobFailed (common)           a process of the job failed                             (100)
    └── JobCancelled                 the job was cancelled                                   (103)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from downpour_common.errors import ConfigError, DownpourError

if TYPE_CHECKING:
    from downpour.jobs.status import JobStatus


class BadJobFile(ConfigError):
    """A job file, or the job made from it, cannot be used."""


class ClusterError(DownpourError):
    """Base of what goes wrong between a user and a cluster."""


class CoordinatorUnreachable(ClusterError):
    """No answer from ``address`` for ``after_s`` seconds."""

    def __init__(self, address: str, after_s: float, listening: bool) -> None:
        self.address = address
        self.after_s = after_s
        found = "no coordinator answers at" if listening else "nothing listens at"
        super().__init__(
            f"{found} {address.removeprefix('tcp://')} (tried for {after_s:.0f} s); check that it runs (`downpour "
            "coordinator start`), its address (--join, DOWNPOUR_COORDINATOR) and firewalls, or raise --timeout"
        )


class Forbidden(ClusterError):
    """Keys are refused, or do not allow what was asked."""


class Unknown(ClusterError):
    """The coordinator knows no such ``kind`` (job, node, file) called ``name``."""

    def __init__(self, kind: str, name: str, reason: str, see: str) -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{reason or f'no {kind} {name}'}; {see}" if see else reason or f"no {kind} {name}")


class JobRefused(ClusterError):
    """The coordinator will not do this; ``code`` is a :class:`downpour_common.messages.Refusal`."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(reason)


class ResultsDiffer(ClusterError):
    """Files of ``folder`` differ from the job's and were left as they are, like everything else there."""

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        self.folder = folder
        self.paths = tuple(paths)
        shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
        super().__init__(f"{folder}: {shown}: there already, with other content; give another folder, or --force")


class NotFinished(ClusterError, TimeoutError):
    """The job had not ended in the time given; it goes on. ``status`` is the newest known."""

    def __init__(self, status: JobStatus, after_s: float) -> None:
        self.status = status
        self.after_s = after_s
        super().__init__(f"job {status.id} has not ended within {after_s:g} s: {status.line()}")


class JobCancelled(DownpourError):
    """The job was cancelled, or interrupted from outside; ``status`` is its last."""

    def __init__(self, status: JobStatus) -> None:
        self.status = status
        reason = status.message.rstrip(".")
        super().__init__(f"job {status.id} was cancelled" + (f": {reason}" if reason else ""))
