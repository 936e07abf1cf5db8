"""Which bytes of which logs to ask for next, and the lines in what came. No I/O.

A job's logs are ``logs/ROLE-INDEX.log``, and ``logs/ROLE-INDEX.EPOCH.log`` of a process that was started again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from downpour_common.errors import ConfigError

PART_BYTES = 256 << 10
"""Bytes asked for at once: little enough that a slow link brings them before the request is repeated."""
LINE_BYTES = 64 << 10
"""Longer lines are cut into lines of this length."""
_LOG = re.compile(r"logs/(worker|server)-(\d{1,9})(?:\.(\d{1,9}))?\.log")
_BLOCK = 64 << 10


@dataclass(frozen=True, slots=True, order=True)
class LogName:
    """Whose output a log holds."""

    role: str
    index: int
    epoch: int

    @property
    def who(self) -> str:
        """``worker/3``"""
        return f"{self.role}/{self.index}"


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of output, without its end."""

    name: LogName
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file."""

    path: str
    offset: int
    length: int


def log_name(path: str) -> LogName | None:
    """Whose log the file is, None for other files."""
    match = _LOG.fullmatch(path)
    return None if match is None else LogName(match[1], int(match[2]), int(match[3] or 0))


@dataclass(frozen=True, slots=True)
class Selection:
    """Some of a job's processes: those of ``role`` (None: all) with ``index`` (None: all)."""

    role: str | None = None
    index: int | None = None

    def has(self, name: LogName) -> bool:
        """Whether ``name`` is one of them."""
        return self.role in (None, name.role) and self.index in (None, name.index)

    @property
    def single(self) -> bool:
        """Whether it is one process."""
        return self.index is not None


def parse_selection(text: str) -> tuple[str, Selection]:
    """``JOB``, ``JOB/worker`` or ``JOB/worker/3`` → job and selection; raises :class:`ConfigError`."""
    job, *rest = text.split("/")
    role = rest[0] if rest else None
    index = rest[1] if len(rest) > 1 else None
    bad_index = index is not None and not (index.isascii() and index.isdecimal() and len(index) < 10)
    if not job or len(rest) > 2 or role not in (None, "worker", "server") or bad_index:
        raise ConfigError(f"{text}: expected JOB, JOB/worker, JOB/worker/3, JOB/server or JOB/server/0")
    return job, Selection(role, None if index is None else int(index))


class LogReader:
    """Follows the selected logs of one job: tell it the files and what came, it gives spans to ask for and lines."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._offset: dict[str, int] = {}
        self._part: dict[str, bytes] = {}

    def begin(self, path: str, offset: int) -> None:
        """Skip what comes before ``offset``."""
        self._offset.setdefault(path, offset)

    def logs(self, files: Iterable[tuple[str, int]]) -> list[tuple[LogName, str, int]]:
        """The selected logs among ``files`` with their sizes, ordered by process and start."""
        found = [(name, path, size) for path, size in files if (name := log_name(path)) is not None]
        return sorted(entry for entry in found if self._selection.has(entry[0]))

    def wants(self, files: Iterable[tuple[str, int]]) -> list[Span]:
        """What has not been read of ``files``."""
        spans = []
        for _, path, size in self.logs(files):
            offset = self._offset.get(path, 0)
            spans += [Span(path, at, min(PART_BYTES, size - at)) for at in range(offset, size, PART_BYTES)]
        return spans

    def take(self, path: str, offset: int, payload: bytes) -> list[LogLine]:
        """Bytes have come: the lines that they complete. Bytes that are not next are left to be asked for again."""
        name = log_name(path)
        if name is None or offset != self._offset.get(path, 0):
            return []
        self._offset[path] = offset + len(payload)
        *whole, rest = (self._part.pop(path, b"") + payload).split(b"\n")
        while len(rest) > LINE_BYTES:
            whole.append(rest[:LINE_BYTES])
            rest = rest[LINE_BYTES:]
        if rest:
            self._part[path] = rest
        return [LogLine(name, _text(line)) for line in whole]

    def rest(self) -> list[LogLine]:
        """Last lines without an end."""
        lines = [LogLine(name, _text(part)) for path, part in self._part.items() if (name := log_name(path))]
        self._part.clear()
        return lines


def tail_offset(size: int, lines: int, read: Callable[[int, int], bytes]) -> int:
    """Where the last ``lines`` lines of a file of ``size`` bytes begin. ``read(offset, length)`` gives its bytes."""
    if lines <= 0:
        return size
    wanted, end, last = lines, size, True
    while end > 0:
        start = max(0, end - _BLOCK)
        block = read(start, end - start)
        cut = len(block)
        if last and block.endswith(b"\n"):
            cut -= 1  # ends the last line, does not begin another
        last = False
        while (found := block.rfind(b"\n", 0, cut)) >= 0:
            wanted -= 1
            if wanted == 0:
                return start + found + 1
            cut = found
        end = start
    return 0


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")
