"""Jobs on a cluster from Python: ``downpour.submit``, ``downpour.job``, ``downpour.nodes``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from downpour.jobs.access import access
from downpour.jobs.client import TIMEOUT_S, ClusterClient
from downpour.jobs.download import MODEL, download, wanted
from downpour.jobs.errors import Unknown
from downpour.jobs.follow import Nobody, follow, read_logs
from downpour.jobs.logs import LogLine, LogReader, Selection, parse_selection
from downpour.jobs.status import JobStatus, job_status
from downpour.jobs.submission import describe, packed, send
from downpour_common.errors import ConfigError
from downpour_common.messages import Document

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Which cluster, and how to come to it; see :func:`downpour.jobs.access.access`. ``timeout_s``: for an answer."""

    join: str | None = None
    keys: PathLike | None = None
    security: str | None = None
    timeout_s: float = TIMEOUT_S

    def problems(self) -> tuple[str, ...]:
        """Why it cannot even be tried."""
        try:
            access(self.join, self.keys, self.security).keys()
        except ConfigError as error:
            return error.problems
        return ()

    def client(self) -> ClusterClient:
        """A new connection."""
        return ClusterClient(self.join, self.keys, self.security, self.timeout_s)


def submit(
    script: PathLike,
    args: Sequence[object] = (),
    *,
    join: str | None = None,
    keys: PathLike | None = None,
    security: str | None = None,
    timeout_s: float = TIMEOUT_S,
    anyway: bool = False,
    **fields: Any,
) -> Job:
    """Send ``script`` (or a job file) with its folder to a cluster and start it there; returns at once.

    ``fields``: ``workers``, ``shards``, ``mode``, ``name``, ``seed``, ``settings={"n_push": 5}``, ``env``,
    ``restarts``, ``min_workers``, ``resume=JOB``, ``folder`` and so on: what :class:`downpour_common.config.JobSpec`
    has. ``anyway``: queue the job even if the cluster is too small today.

    Raises :class:`downpour.ConfigError` with all problems of the job, :class:`downpour.BundleError` when the folder
    cannot travel, and a :class:`downpour.ClusterError` when the coordinator is away or refuses.
    """
    cluster = Cluster(join, keys, security, timeout_s)
    given = {**fields, "args": tuple(map(str, args)) or None}
    spec, folder = describe(os.fspath(script), given, cluster.problems())
    with packed(spec, folder) as submission, cluster.client() as client:
        return Job(job_status(send(client, submission, anyway)).id, cluster)


def job(
    id: str,
    *,
    join: str | None = None,
    keys: PathLike | None = None,
    security: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Job:
    """A job that was submitted before: by its id, an unambiguous beginning of one, or a name (its newest job).

    Raises :class:`downpour.ClusterError`: no such job, no such coordinator.
    """
    cluster = Cluster(join, keys, security, timeout_s)
    with cluster.client() as client:
        return Job(job_status(client.describe(id)).id, cluster)


def nodes(
    *,
    join: str | None = None,
    keys: PathLike | None = None,
    security: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Document]:
    """The cluster's hosts: ``node``, ``role``, ``state``, ``host``, ``slots``, ``used``, … of each."""
    with Cluster(join, keys, security, timeout_s).client() as client:
        return list(client.nodes().get("nodes", []))


@dataclass(frozen=True, slots=True)
class Job:
    """A job at a cluster. Each call opens a connection of its own, so any thread may make it."""

    id: str
    cluster: Cluster = field(default=Cluster(), repr=False)

    def status(self) -> JobStatus:
        """How it stands now."""
        with self.cluster.client() as client:
            return job_status(client.describe(self.id))

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Until it has ended, however it did; its last status.

        Raises :class:`downpour.NotFinished` (a :class:`TimeoutError`) after ``timeout`` seconds.
        """
        with self.cluster.client() as client:
            return follow(client, self.id, Nobody(), timeout_s=timeout)

    def result(self, timeout: float | None = None) -> Document:
        """Until it has ended well: the document of ``downpour run --json`` (``metrics``, ``steps``, ``samples``, …).

        Raises :class:`downpour.JobFailed` with the traceback of the process that failed first,
        :class:`downpour.JobCancelled`, and :class:`downpour.NotFinished` after ``timeout`` seconds.
        """
        status = self.wait(timeout).check()
        found = status.document.get("result")
        plain = {"job": self.id, "state": status.state, "metrics": status.metrics}
        return dict(found) if isinstance(found, dict) else plain

    def follow(self, stream: TextIO | None = None) -> JobStatus:
        """Write its output to ``stream`` (sys.stdout), from the beginning, until it has ended; its last status."""
        with self.cluster.client() as client:
            return follow(client, self.id, _Writer(sys.stdout if stream is None else stream), Selection())

    def logs(self, process: str = "") -> str:
        """The output so far of one process (``"worker/3"``); of all, each line with its process in front, without one.

        Raises :class:`downpour.ConfigError` for what is no process, :class:`downpour.ClusterError` for one without
        output.
        """
        _, selection = parse_selection(f"{self.id}/{process}" if process else self.id)
        lines = _Lines()
        with self.cluster.client() as client:
            reader = LogReader(selection)
            read_logs(client, self.id, reader, lines)
        lines.found += reader.rest()
        if selection.single and not lines.found:
            raise Unknown("log", process, "", "that process has not written anything")
        return "".join(f"{line.text}\n" if selection.single else _with_name(line) for line in lines.found)

    def cancel(self) -> JobStatus:
        """Have it end; returns at once."""
        with self.cluster.client() as client:
            return job_status(client.cancel(self.id))

    def scale(self, workers: int) -> JobStatus:
        """Have ``workers`` workers from now on; returns at once."""
        with self.cluster.client() as client:
            return job_status(client.scale(self.id, workers))

    def download(self, folder: PathLike, checkpoints: bool = False, force: bool = False) -> str:
        """Fetch model, metrics, logs and job.toml (and checkpoints) into ``folder``; the path of model.safetensors.

        Raises :class:`downpour.ClusterError` when there is no model (yet), or files with other content are in the way
        (unless ``force``); nothing is written then.
        """
        with self.cluster.client() as client:
            files = wanted(client.files(self.id), checkpoints)
            if MODEL not in dict(files):
                raise Unknown("file", MODEL, "", f"job {self.id} is {job_status(client.describe(self.id)).state}")
            download(client, self.id, files, os.fspath(folder), force)
        return os.path.join(os.fspath(folder), MODEL)


class _Lines(Nobody):
    def __init__(self) -> None:
        self.found: list[LogLine] = []

    def line(self, line: LogLine) -> None:
        self.found.append(line)


class _Writer(Nobody):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, line: LogLine) -> None:
        self._stream.write(_with_name(line))
        self._stream.flush()


def _with_name(line: LogLine) -> str:
    return f"{line.name.who} {line.text}\n"


__all__ = ["Cluster", "Job", "job", "nodes", "submit"]
