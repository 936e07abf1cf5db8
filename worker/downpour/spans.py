"""What this process does when: spans of time with a name, recorded if the job is traced.

::

    with span("forward", stage=1, microbatch=3):
        …

Names that reports know: :data:`BUSY` (a rank computes), :data:`MOVING` (it moves bytes, or awaits those that come) and
``wait`` (for other processes). Facts are numbers and short texts; ``stage`` and ``microbatch`` place a span in a
pipeline, and ``bytes`` (given and got) of ``send``, ``receive`` and ``exchange`` are added up per rank.

While nothing records, :func:`span` costs a call; docs/tracing.md has the figures. Any thread may record. Times are
``time.monotonic_ns()``, which the processes of one machine have in common.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from typing import Final

from downpour_common.spans import BUSY, MOVING

__all__ = [
    "BUSY",
    "MOVING",
    "ROWS",
    "Fact",
    "Recorder",
    "Row",
    "peak",
    "record",
    "recording",
    "span",
    "start",
    "stepped",
    "stop",
]

Fact = int | float | str
Row = tuple[str, int, int, int, int, dict[str, Fact] | None]
"""name, begin and end in nanoseconds, identity of the thread, steps completed before, facts"""

ROWS = 1 << 16
"""Spans kept until they are sent; what comes beyond is dropped and counted."""


class Recorder:
    """A bounded buffer of spans, filled by any thread and emptied by one."""

    def __init__(self, limit: int = ROWS) -> None:
        self.dropped = 0
        """spans for which there was no room, so far"""
        self.peaks: dict[str, int] = {}
        """largest value of each thing that :func:`peak` was told of"""
        self.step = 0
        """steps that have been completed; spans of a step are told from those of others by it"""
        self._limit = limit
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, begin_ns: int, end_ns: int, thread: int, facts: dict[str, Fact] | None) -> None:
        """Keep a span."""
        if len(self._rows) < self._limit:
            self._rows.append((name, begin_ns, end_ns, thread, self.step, facts))
        else:
            self.dropped += 1

    def take(self, most: int) -> list[Row]:
        """The ``most`` oldest spans, or fewer, which are forgotten here."""
        return [self._rows.popleft() for _ in range(min(most, len(self._rows)))]


class _Span:
    __slots__ = ("_begin_ns", "_facts", "_name", "_recorder")

    def __init__(self, recorder: Recorder, name: str, facts: dict[str, Fact]) -> None:
        self._recorder, self._name, self._facts = recorder, name, facts
        self._begin_ns = 0

    def __enter__(self) -> None:
        self._begin_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        end_ns = time.monotonic_ns()
        self._recorder.add(self._name, self._begin_ns, end_ns, threading.get_ident(), self._facts or None)


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING: Final = _Nothing()
_recorder: Recorder | None = None


def span(name: str, **facts: Fact) -> AbstractContextManager[None]:
    """A context manager whose time is recorded under ``name``, also if it is left by an exception."""
    if _recorder is None:
        return _NOTHING
    return _Span(_recorder, name, facts)


def record(name: str, begin_ns: int, end_ns: int, thread: int | None = None, **facts: Fact) -> None:
    """A span that has ended already. ``thread``: the one it is shown with, by default the calling one."""
    if _recorder is not None:
        _recorder.add(name, begin_ns, end_ns, threading.get_ident() if thread is None else thread, facts or None)


def peak(name: str, value: int) -> None:
    """``value`` of ``name``, such as bytes of activations, right now; the largest is reported."""
    if _recorder is not None and value > _recorder.peaks.get(name, -1):
        _recorder.peaks[name] = value


def stepped(steps: int) -> None:
    """So many steps have been completed."""
    if _recorder is not None:
        _recorder.step = steps


def recording() -> bool:
    """Whether spans are recorded: where there is something to find out before one can be."""
    return _recorder is not None


def start(limit: int = ROWS) -> Recorder:
    """Record from now on, in this process. Replaces a recorder that there is."""
    global _recorder
    _recorder = Recorder(limit)
    return _recorder


def stop() -> None:
    """Record no more; the recorder keeps what it has."""
    global _recorder
    _recorder = None
