"""The listening side's loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from downpour_common.keys import ServerKeys
from downpour_common.process import keep_freed_memory
from downpour_common.sizes import format_bytes
from downpour_common.transport import ServerTransport
from downpour_common.transport.zeromq import ZmqServer
from downpour_deploy.bench.answer import Answerer, Measurement

UNREAD_ANSWERS = 1024
"""Answers kept for a client that does not read; honest ones have fewer requests open."""
LOOK_S = 0.5


@dataclass(slots=True)
class Stop:
    """Whether a signal has asked for the end."""

    asked: bool = False

    def on_signals(self) -> None:
        """Have SIGINT and SIGTERM ask for it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def listen(
    address: str,
    keys: ServerKeys | None,
    once: bool,
    ready: Callable[[str], None],
    over: Callable[[str], None],
) -> None:
    """Serve one measurement after the other until SIGINT or SIGTERM, or ``once``. Raises :class:`ConfigError`.

    ``ready`` gets the address when it listens, ``over`` a line for people after each measurement.
    """
    keep_freed_memory()
    stop = Stop()
    stop.on_signals()
    transport = ZmqServer(address, keys=keys, backlog=UNREAD_ANSWERS)
    try:
        ready(transport.address)
        serve(transport, lambda: stop.asked, once, over)
    finally:
        transport.close()


def serve(transport: ServerTransport, stop: Callable[[], bool], once: bool, over: Callable[[str], None]) -> None:
    """Answer until ``stop()``, or until a measurement has ended when it is to be ``once``."""
    answerer = Answerer()
    while not stop():
        for peer, message in transport.poll(LOOK_S):
            answer = answerer.handle(message, time.monotonic())
            if answer is not None:
                transport.send(peer, answer)
        answerer.tick(time.monotonic())
        while answerer.finished:
            over(_line(answerer.finished.pop(0)))
            if once:
                return


def _line(measurement: Measurement) -> str:
    return f"measured: {format_bytes(measurement.bytes_in)} came, {format_bytes(measurement.bytes_out)} went"
