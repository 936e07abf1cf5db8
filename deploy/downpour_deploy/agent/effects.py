"""What an agent's state machine is told and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages import Document, Message


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process of one job; a process that is started again has the next epoch."""

    job: str
    role: str
    index: int
    epoch: int

    @property
    def parts(self) -> tuple[str, str, int, int]:
        """The four in order, as messages have them."""
        return self.job, self.role, self.index, self.epoch

    def __str__(self) -> str:
        again = f" (epoch {self.epoch})" if self.epoch else ""
        return f"{self.job} {self.role}/{self.index}{again}"


class Numbers:
    """Request numbers of one agent."""

    def __init__(self) -> None:
        self._last = 0

    def new(self) -> int:
        """A number never given before."""
        self._last += 1
        return self._last


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """Who this agent is. Times in seconds."""

    node: str
    role: str
    """``server`` or ``worker``"""
    instance: str
    """random, new with every start of the agent"""
    document: Document
    """resources and facts of the host, as the coordinator gets them"""
    orphan_s: float
    """silence of the coordinator after which processes are ended"""
    grace_s: float
    """time between SIGTERM and SIGKILL when the agent itself is stopped"""


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the coordinator."""

    message: Message


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Read this part of the process' log and send it as the request of this number."""

    process: ProcessId
    request: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have all that the process needs on this host, then tell ``fetched``."""

    process: ProcessId
    document: Document


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """The process is not going to be started."""

    process: ProcessId


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the process, then tell ``started`` or ``not_started`` at once, and ``ended`` later."""

    process: ProcessId
    document: Document


@dataclass(frozen=True, slots=True)
class Signal:
    """Signal a running process and what it started: ``kill`` for SIGKILL, else SIGTERM."""

    process: ProcessId
    kill: bool


@dataclass(frozen=True, slots=True)
class RemoveFolder:
    """The job's folder may go; none of its processes runs."""

    job: str


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Give up the connection to the coordinator, with what is queued in it, and make a new one."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Something the operator should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Exit:
    """The agent is done. ``reason`` is empty when it was asked to stop, else why the coordinator turned it down."""

    reason: str


Effect = Send | ReadLog | Fetch | CancelFetch | Spawn | Signal | RemoveFolder | Reconnect | Tell | Exit
