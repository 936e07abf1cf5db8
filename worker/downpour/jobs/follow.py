"""Stay with a job until it ends: its logs as they grow, its state as it changes."""

from __future__ import annotations

from typing import Protocol

from downpour.jobs.client import OUTAGE_S, ClusterClient
from downpour.jobs.errors import NotFinished, Unknown
from downpour.jobs.logs import LogLine, LogReader, Selection, tail_offset
from downpour.jobs.status import JobStatus, job_status
from downpour_common.messages import FileData, GetFile

LOOK_S = 0.5
"""Time between two looks at a job."""
_LONGEST_LOOK_S = 2.0


class Watcher(Protocol):
    """Who is told what happens."""

    def line(self, line: LogLine) -> None:
        """A line of a process' output."""

    def status(self, status: JobStatus) -> None:
        """The job, at every look."""

    def silence(self, seconds: float) -> None:
        """The coordinator has not answered for this long."""


class Nobody:
    """Is told, and does nothing."""

    def line(self, line: LogLine) -> None:
        """See :class:`Watcher`."""

    def status(self, status: JobStatus) -> None:
        """See :class:`Watcher`."""

    def silence(self, seconds: float) -> None:
        """See :class:`Watcher`."""


def follow(
    client: ClusterClient,
    job: str,
    watcher: Watcher,
    selection: Selection | None = None,
    tail: int | None = None,
    timeout_s: float | None = None,
    outage_s: float = OUTAGE_S,
) -> JobStatus:
    """Until the job has ended and all its output was told; its last status.

    ``selection``: whose logs, None for none. ``tail``: only the last lines of what is there at the beginning.
    Raises :class:`NotFinished` after ``timeout_s``, :class:`CoordinatorUnreachable` when the coordinator, having
    answered once, is away for ``outage_s``.
    """
    began_s = client.now()
    status = job_status(client.describe(job))
    reader = None if selection is None else LogReader(selection)
    patience_s, client.timeout_s = client.timeout_s, max(client.timeout_s, outage_s)
    heard, client.on_silence = client.on_silence, watcher.silence
    try:
        if reader is not None and tail is not None:
            skip_to_tail(client, status.id, reader, tail)
        look_s = LOOK_S
        while True:
            watcher.status(status)
            if reader is not None:
                read_logs(client, status.id, reader, watcher)
            if status.ended:
                # The status is older than the list of files that was read, so the logs were complete by then.
                for line in reader.rest() if reader is not None else ():
                    watcher.line(line)
                return status
            left_s = float("inf") if timeout_s is None else began_s + timeout_s - client.now()
            if left_s <= 0:
                raise NotFinished(status, timeout_s or 0.0)
            client.pause(min(look_s, left_s))
            look_s = min(_LONGEST_LOOK_S, look_s * 1.1) if reader is None else LOOK_S
            status = job_status(client.describe(status.id))
    finally:
        client.timeout_s, client.on_silence = patience_s, heard


def read_logs(client: ClusterClient, job: str, reader: LogReader, watcher: Watcher) -> None:
    """Tell all lines that are new."""
    spans = reader.wants(client.files(job))
    if not spans:
        return
    answers = client.ask_all(FileData, ((GetFile, job, s.path, s.offset, s.length) for s in spans))
    try:
        for span, data in zip(spans, answers, strict=True):
            for line in reader.take(span.path, data.offset, bytes(data.payload)):
                watcher.line(line)
    except Unknown as error:
        if error.kind != "file":
            raise  # a file that has gone is no loss to those that are there; they come at the next look


def skip_to_tail(client: ClusterClient, job: str, reader: LogReader, lines: int) -> None:
    """Have ``reader`` begin at the last ``lines`` lines of each log."""
    for _, path, size in reader.logs(client.files(job)):

        def read(offset: int, length: int, path: str = path) -> bytes:
            return bytes(client.ask(FileData, GetFile, job, path, offset, length).payload)

        try:
            reader.begin(path, tail_offset(size, lines, read))
        except Unknown:
            continue
