"""What a user sees who stays with a job: its output, its state, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from downpour.jobs.logs import LogLine, LogName
from downpour.jobs.status import JobStatus
from downpour_common.sizes import format_bytes
from downpour_deploy.jobs.tables import clean, closing_lines, failure_lines

STATUS_S = 10.0
"""Time between status lines where there is no terminal."""
SILENCE_S = 3.0
"""Shorter silences of the coordinator are not worth a word."""
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


class View:
    """A :class:`downpour.jobs.follow.Watcher` on a stream: status in place on a terminal, a line per 10 s elsewhere.

    ``lines``: where the job's output goes, None: to the same stream. ``plain``: without the process in front, for the
    output of one.
    """

    def __init__(
        self,
        stream: TextIO,
        lines: TextIO | None = None,
        plain: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
        self._lines = (
            self._console if lines is None else Console(file=lines, highlight=False, soft_wrap=True, emoji=False)
        )
        self._plain = plain
        self._now = now
        self._said_s = now()
        self._state = ""
        self._epochs: dict[str, int] = {}
        self._warnings: set[str] = set()
        self._live: Live | None = None
        self.newest: JobStatus | None = None
        # Two streams on one terminal cannot keep a line in place between them.
        if self._console.is_terminal and lines is None:
            self._live = Live(Text(""), console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No more status in place."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, line: LogLine) -> None:
        """See :class:`downpour.jobs.follow.Watcher`."""
        name = line.name
        if not self._lines.is_terminal:
            # As the process wrote it, for the tools that read it: rich would expand tabs.
            again = f"{name.who} {_again(name)}\n" if self._is_new(name) and not self._plain else ""
            self._lines.file.write(f"{again}{line.text}\n" if self._plain else f"{again}{name.who} {line.text}\n")
            self._lines.file.flush()
            return
        text = Text.from_ansi(line.text)
        if self._plain:
            self._lines.print(text)
            return
        colour = _COLOURS[name.index % len(_COLOURS)] if name.role == "worker" else "white"
        if self._is_new(name):
            self._lines.print(Text.assemble((f"{name.who} ", colour), (_again(name), "dim")))
        self._lines.print(Text.assemble((f"{name.who} ", colour), text))

    def _is_new(self, name: LogName) -> bool:
        """Whether this is the first line of a process that was started again."""
        before, self._epochs[name.who] = self._epochs.get(name.who, 0), name.epoch
        return name.epoch > before

    def status(self, status: JobStatus) -> None:
        """See :class:`downpour.jobs.follow.Watcher`."""
        self.newest = status
        for warning in status.warnings:
            if warning not in self._warnings:
                self._warnings.add(warning)
                self.note(warning)
        changed, self._state = status.state != self._state, status.state
        text = f"{clean(status.id)}: {clean(status.line())}"
        if self._live is not None:
            self._live.update(Text(text, "bold"))
        elif not status.ended and (changed or self._due(status)):
            self._said_s = self._now()
            self._console.print(f"downpour: {text}", markup=False)

    def _due(self, status: JobStatus) -> bool:
        """Whether it is time for a status line. Beside output that goes elsewhere only waiting is worth one."""
        return self._now() - self._said_s >= STATUS_S and (self._lines is self._console or status.state != "RUNNING")

    def silence(self, seconds: float) -> None:
        """See :class:`downpour.jobs.follow.Watcher`."""
        if seconds < SILENCE_S:
            return
        text = f"waiting for the coordinator ({seconds:.0f} s); the job goes on without it"
        if self._live is not None:
            self._live.update(Text(text, "bold yellow"))
        elif self._now() - self._said_s >= STATUS_S:
            self._said_s = self._now()
            self._console.print(f"downpour: {text}", markup=False)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._console.print(Text(f"downpour: {clean(text)}", "yellow"))

    def finish(self, status: JobStatus) -> None:
        """How the job ended."""
        self.stop()
        if status.state == "FAILED":
            verdict, *details = failure_lines(status)
            self._console.print(Text(verdict, "bold red"))
            for line in details:
                self._console.print(Text(f"    {line}"))
        for line in closing_lines(status):
            self._console.print(Text(line))

    def detached(self, job: str) -> None:
        """The user has stopped looking."""
        self.stop()
        self.note(
            f"detached; job {job} goes on. Back to it: downpour logs -f {job}; its end: downpour wait {job}; "
            f"to stop it: downpour cancel {job}"
        )


def _again(name: LogName) -> str:
    return f"--- started again ({name.epoch}) ---"


@contextmanager
def meter(stream: TextIO, verb: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with bytes done and bytes in all; shown in place on a terminal, nowhere else."""
    console = Console(file=stream, highlight=False, emoji=False)
    if not console.is_terminal:
        yield lambda _done, _total: None
        return
    with Live(Text(""), console=console, refresh_per_second=4, transient=True) as live:
        yield lambda done, total: live.update(Text(f"{verb} {format_bytes(done)} of {format_bytes(total)}", "bold"))
