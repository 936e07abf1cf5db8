"""The benchmark's side of training scripts: it lets all processes of a contender train together, a turn at a time.

The other side is ``scripts/gate.py``; between turns the processes wait for a message.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_lib.contender import ContenderError

VARIABLE = "BENCH_GATE"
MESSAGE_BYTES = 4096
LOOK_S = 0.2


class GoneError(ContenderError):
    """A process has left the gate."""


@dataclass(frozen=True)
class TurnTaken:
    """What one turn of all participants came to."""

    seconds: float
    """from the first that began to the last that ended"""
    value: float
    """the mean of what they reported: losses, in training"""


class Gate:
    """A Unix socket in ``folder`` at which ``count`` processes wait for their turns.

    ``check`` is called while waiting and raises :class:`ContenderError` when one of them has ended.
    """

    def __init__(self, folder: str, count: int, timeout_s: float, check: Callable[[], None]) -> None:
        self.path = os.path.join(folder, "gate")
        self.pids: dict[int, int] = {}  # by rank
        self._links: dict[int, socket.socket] = {}
        self._count = count
        self._timeout_s = timeout_s
        self._check = check
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(count)
        self._listener.settimeout(LOOK_S)

    def admit(self) -> None:
        """Wait until all have come. Raises :class:`ContenderError`."""
        deadline_s = time.monotonic() + self._timeout_s
        while len(self._links) < self._count:
            self._check()
            if time.monotonic() > deadline_s:
                raise ContenderError(f"{len(self._links)} of {self._count} were ready after {self._timeout_s:g} s")
            try:
                link, _ = self._listener.accept()
            except TimeoutError:
                continue
            link.settimeout(self._timeout_s)
            hello = _receive(link)
            self._links[hello["rank"]] = link
            self.pids[hello["rank"]] = hello["pid"]

    def turn(self, warm: int, steps: int, task: str = "") -> TurnTaken:
        """Have all train for ``warm`` steps and then, timed, for ``steps``. Raises :class:`ContenderError`.

        ``task`` says what to do to scripts that can do several things.
        """
        order = json.dumps({"warm": warm, "steps": steps, "task": task}).encode()
        for link in self._links.values():
            try:
                link.send(order)
            except OSError as error:
                raise GoneError(f"a process is gone: {error}") from error
        reports = self._collect()
        return conclude(reports)

    def close(self) -> None:
        """Hang up; the scripts then come to their ends."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._listener.close()

    def _collect(self) -> list[dict[str, Any]]:
        deadline_s = time.monotonic() + self._timeout_s
        reports = []
        with selectors.DefaultSelector() as selector:
            for each in self._links.values():
                selector.register(each, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(1.0):
                    link = key.fileobj
                    assert isinstance(link, socket.socket)
                    selector.unregister(link)
                    reports.append(_receive(link))
                if time.monotonic() > deadline_s:
                    raise ContenderError(f"no answer within {self._timeout_s:g} s")
        return reports


def conclude(reports: Sequence[Mapping[str, float]]) -> TurnTaken:
    """What the participants' reports come to. Raises :class:`ContenderError` for a value that is not finite."""
    value = sum(r["value"] for r in reports) / len(reports)
    if not math.isfinite(value):
        raise ContenderError(f"the loss is {value}")
    return TurnTaken(max(r["ended_s"] for r in reports) - min(r["begun_s"] for r in reports), value)


def _receive(link: socket.socket) -> dict[str, Any]:
    try:
        data = link.recv(MESSAGE_BYTES)
    except OSError as error:
        raise GoneError(f"a process did not answer: {error}") from error
    if not data:
        raise GoneError("a process ended in its turn")
    message: dict[str, Any] = json.loads(data)
    return message
