"""The processes that a job should have, and what became of them."""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass
from typing import Any, Literal

from downpour_common import exitcodes
from downpour_common import messages as m
from downpour_common.names import process_name
from downpour_common.replicas import titled

Key = tuple[str, int]
"""(role, index) of a process: ``server`` or ``worker``."""


@dataclass(slots=True)
class Process:
    """One shard or worker. ``pending``: it waits for a place; ``started``: it has one, whatever it does there."""

    role: str
    index: int
    epoch: int = 0
    state: Literal["pending", "started", "ended"] = "pending"
    node: str = ""
    since_s: float = 0.0
    stop: float | None = None
    """seconds between SIGTERM and SIGKILL, once it is to end"""
    leaving: bool = False
    """a worker that is to leave while the job goes on"""
    replace: bool = False
    """… and for which another is wanted"""
    code: int | None = None
    """how it ended: an exit code, a negative signal; None where nobody knows"""
    tail: tuple[str, ...] = ()
    error: str = ""
    """why it could not be started, or was lost"""
    pid: int = 0
    gpu: int = -1
    replaces: bool = False
    """it takes the place of one that has died while the job went on"""
    quick: int = 0
    """how many before it, one after the other, have lived for a short time only"""
    wait_s: float = 0.0
    """time from ``since_s`` before it should be started"""
    shards: int = 0
    """the job's; of a server process"""
    ranks: int = 1
    """workers of a replica; of a worker"""
    fallen: Literal["", "again", "out", "over"] = ""
    """a worker whose replica ends because one of it has: once all have, it is started again, or left out"""

    @property
    def title(self) -> str:
        """For people, with its rank in its replica if that has several."""
        return titled(self.role, self.index, self.ranks, self.name)

    @property
    def name(self) -> str:
        """For people."""
        return process_name(self.role, self.index, self.shards)

    @property
    def key(self) -> Key:
        """(role, index)."""
        return self.role, self.index

    @property
    def running(self) -> bool:
        """Whether there may be such a process."""
        return self.state == "started"

    def waited_s(self, now_s: float) -> float:
        """Time in this state, from when it should be started on."""
        return now_s - self.since_s - self.wait_s

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Process:
        """The inverse of :meth:`document`."""
        return cls(**{**document, "tail": tuple(document["tail"])})


@dataclass(frozen=True, slots=True)
class Failure:
    """The root cause: the first process that ended badly. ``details`` is its traceback or last output.

    ``role`` is ``run`` (index -1) when it was none of the job's processes.
    """

    role: str
    index: int
    exit_code: int
    message: str
    details: str = ""
    reason: str = "PROCESS_FAILED"
    host: str = ""
    epoch: int = 0
    ranks: int = 1
    """workers of a replica; of a worker's failure"""

    @property
    def who(self) -> str:
        """What failed, for people; "" when it was none of the job's processes."""
        return titled(self.role, self.index, self.ranks) if self.index >= 0 else ""

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


_LAST_WORD = re.compile(r"server/\d+b?: (.+)")
"""What a shard writes last when it ends of an error of its own."""


def explain(process: Process, registered: bool, reported: m.ReportFailure | None, script: str) -> Failure:
    """Why a process that should not have ended has. ``registered``: it had called ``prepare``."""
    code, where = process.code, (process.node, process.epoch, process.ranks)
    if process.error or code is None:
        message = process.error or "was lost"
        reason = "NODE_LOST" if code is None else "NOT_STARTED"
        return Failure(process.role, process.index, exitcodes.FAILED, message, "", reason, *where)
    tail = "\n".join(process.tail)
    if code < 0:
        message = f"killed by signal {-code} ({signal_name(-code)})"
        shown = exitcodes.of_process(code)
        return Failure(process.role, process.index, shown, message, tail, "PROCESS_KILLED", *where)
    if process.role == "worker" and reported is not None:
        details = reported.traceback.rstrip()
        return Failure(process.role, process.index, code or 1, reported.error, details, "SCRIPT_FAILED", *where)
    if code == 0 and process.role == "worker" and not registered:
        message = f"{script} ended without calling downpour.prepare(), so nothing was trained"
        return Failure(process.role, process.index, exitcodes.FAILED, message, "", "NO_PREPARE", *where)
    if code == 0:
        message = "ended with exit code 0 without leaving the job in good order (os._exit?)"
        return Failure(process.role, process.index, exitcodes.FAILED, message, "", "PROCESS_FAILED", *where)
    said = _LAST_WORD.fullmatch(process.tail[-1]) if process.role == "server" and process.tail else None
    message = f"exit code {code}" if said is None else said[1]
    reason = "SCRIPT_FAILED" if process.role == "worker" else "PROCESS_FAILED"
    return Failure(process.role, process.index, code, message, tail, reason, *where)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
