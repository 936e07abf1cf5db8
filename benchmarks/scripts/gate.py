"""A training script's side of a benchmark: it trains when the benchmark says so, and says how long that took.

Processes of one contender and the benchmark meet at a Unix socket, whose path is in the environment.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

VARIABLE = "BENCH_GATE"
MESSAGE_BYTES = 4096


class Turn:
    """One turn: ``warm`` steps that do not count, :meth:`begin`, ``steps`` steps, :meth:`end`.

    ``task`` says what to do, for scripts that can do several things.
    """

    def __init__(self, link: socket.socket, warm: int, steps: int, task: str) -> None:
        self.warm, self.steps, self.task = warm, steps, task
        self._socket = link
        self._begun_s = self._ended_s = 0.0

    def begin(self) -> None:
        """The clock starts."""
        self._begun_s = time.monotonic()  # one clock for all processes of a machine

    def end(self) -> None:
        """The clock stops."""
        self._ended_s = time.monotonic()

    def report(self, value: float) -> None:
        """Tell the benchmark how long it took, and ``value``: a loss, or what else it asks of this script."""
        _send(self._socket, {"begun_s": self._begun_s, "ended_s": self._ended_s, "value": value})


def turns(rank: int) -> Iterator[Turn]:
    """Turns until the benchmark hangs up. Between them, the process waits without using the processor."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(os.environ[VARIABLE])
        _send(link, {"rank": rank, "pid": os.getpid()})
        while message := link.recv(MESSAGE_BYTES):
            order = json.loads(message)
            yield Turn(link, order["warm"], order["steps"], order["task"])


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode())
