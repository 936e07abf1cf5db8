"""Keep Ctrl-C out of a section that must not be left half-way, and deliver it right after."""

from __future__ import annotations

import threading

# The signal module's own functions convert to enumerations, which costs more than the calls themselves, twice a step.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Callable
from signal import SIGINT
from types import FrameType, TracebackType
from typing import Any


class Shield:
    """A context in which the main thread's ``SIGINT`` handler is put off. Elsewhere it costs and does nothing.

    Python runs signal handlers in the main thread, between any two instructions; one that raises in the middle of a
    message of several frames would leave half of it on the connection. ``struck`` says that a signal is waiting, so
    long sections can end early. Leaving the context runs the handler that was put off.
    """

    __slots__ = ("_before", "_frame", "struck")

    def __init__(self) -> None:
        self.struck = False
        self._before: Callable[[int, FrameType | None], Any] | None = None
        self._frame: FrameType | None = None

    def __enter__(self) -> Shield:
        if threading.current_thread() is threading.main_thread():
            before = getsignal(SIGINT)
            if callable(before):  # not ignored, and not left to the system
                self._before = before
                signal(SIGINT, self._note)
        return self

    def _note(self, _number: int, frame: FrameType | None) -> None:
        self.struck = True
        self._frame = frame

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        signal(SIGINT, before)
        if self.struck:
            before(SIGINT, self._frame)
