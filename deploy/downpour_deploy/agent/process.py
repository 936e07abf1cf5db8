"""What an agent knows of one process, from the order to start it to the acknowledged report of its end. I/O-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from downpour_common.messages import Document
from downpour_deploy.agent.effects import CancelFetch, Effect, ProcessId, Signal
from downpour_deploy.agent.logs import LogFeed

Phase = Literal["fetching", "ready", "running", "ended"]
"""``ready``: all is there, but an older epoch of the process still runs."""
NOT_STARTED = -15
"""The exit code reported of a process that never ran."""
TAIL_CHARS = 16 << 10
_LINE_CHARS = 2000


class Record:
    """One process. ``stopped`` says for whom it was ended: "" (by itself), asked, superseded, orphaned, agent."""

    def __init__(self, process: ProcessId, document: Document) -> None:
        self.id, self.document = process, document
        self.phase: Phase = "fetching"
        self.pid = 0
        self.feed = LogFeed()
        self.stopped = ""
        self.acknowledged = False
        self.report: Document = {}
        self.report_request = 0
        self.reported_s = -math.inf
        self._kill_s = math.inf

    @property
    def over(self) -> bool:
        """Whether nothing of it runs or is going to."""
        return self.phase == "ended"

    @property
    def slot(self) -> tuple[str, str, int]:
        """What its epochs have in common."""
        return self.id.job, self.id.role, self.id.index

    @property
    def grace_s(self) -> float:
        """The job's own time between SIGTERM and SIGKILL."""
        try:
            return float(self.document["spec"]["settings"]["grace_s"])
        except (KeyError, TypeError, ValueError):
            return 5.0

    def line(self) -> Document:
        """Its entry in a heartbeat."""
        state = "fetching" if self.phase == "ready" else self.phase
        job, role, index, epoch = self.id.parts
        return {"job": job, "role": role, "index": index, "epoch": epoch, "state": state, "pid": self.pid}

    def stop(self, grace_s: float, why: str, now_s: float) -> list[Effect]:
        """End it. Said again, it can only shorten the grace."""
        if self.over:
            return []
        if self.phase != "running":
            self.stopped = why
            self.end(NOT_STARTED, error="stopped before it was started")
            return [CancelFetch(self.id)]
        first = not self.stopped
        self.stopped = self.stopped or why
        self._kill_s = min(self._kill_s, now_s + max(0.0, grace_s))
        return [Signal(self.id, kill=False)] if first else []

    def kill_due(self, now_s: float) -> bool:
        """Whether its grace has passed; true once."""
        if self.phase != "running" or now_s < self._kill_s:
            return False
        self._kill_s = math.inf
        return True

    def end(self, code: int, tail: Sequence[str] = (), error: str = "") -> None:
        """It has ended, or cannot be started (``error``)."""
        self.phase = "ended"
        self.feed.grew(0, complete=True)
        self.report = {
            "code": code,
            "tail": _shortened(tail),
            "error": error,
            "stopped": self.stopped,
            "log_bytes": self.feed.size,
            "pid": self.pid,
        }


def _shortened(tail: Sequence[str]) -> list[str]:
    """The last of these lines that are short enough to be sent."""
    lines: list[str] = []
    room = TAIL_CHARS
    for line in reversed(tail):
        lines.append(line if len(line) <= _LINE_CHARS else line[:_LINE_CHARS] + " …")
        room -= len(lines[-1])
        if room < 0:
            break
    return lines[::-1]
