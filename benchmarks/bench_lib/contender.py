"""What a contender is: the interface that the runner drives, and the facts that the report needs about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

MB = 1_000_000  # bytes; the benchmark counts in powers of ten throughout
FP32_BYTES = 4

Group = Literal["limit", "peer", "ours"]


class ContenderError(Exception):
    """A contender could not start, failed in a run, or did not answer in time; the message says which."""


class UnavailableError(ContenderError):
    """A contender needs what is not installed; the message says what, and how to get it."""


@dataclass(frozen=True)
class Spec:
    """What every contender is asked to do."""

    payload_bytes: int  # one way; a whole number of MB, so also of fp32
    timeout_s: float  # longest wait for any one start or run

    @classmethod
    def of_mb(cls, megabytes: int) -> Spec:
        return cls(payload_bytes=megabytes * MB, timeout_s=60.0 + 0.1 * megabytes)

    @property
    def floats(self) -> int:
        return self.payload_bytes // FP32_BYTES


class Contender(Protocol):
    """One thing to be timed.

    Between runs it stays alive but uses no CPU: contenders take turns, and an idle one must not slow others.
    Every wait inside has a timeout. `close` may be called at any time after construction and more than once,
    also after a failed `start` or an interrupted `run_once`; it leaves no process, socket or shared memory.
    """

    @property
    def name(self) -> str: ...

    def start(self) -> None:
        """Start processes and connect them. Raises ContenderError."""

    def run_once(self) -> float:
        """Move the payload once and return the seconds it took. Raises ContenderError."""

    def close(self) -> None:
        """End everything that was started."""


@dataclass(frozen=True)
class Entry:
    """One line of the registry in contenders.py."""

    name: str
    group: Group
    counted: int  # how many times payload_bytes counts as moved in one run
    counted_what: str  # the same in words
    build: Callable[[str, Spec], Contender]  # from the name; imports what it needs, so that listing is quick
