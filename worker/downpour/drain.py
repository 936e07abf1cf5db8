"""SIGTERM asks a worker to leave its job in good order: after the step it is in, with its gradients pushed."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Drain:
    """Whether this worker has been asked to leave. A plain flag, because a signal's handler may set it anywhere."""

    def __init__(self) -> None:
        self.asked = False
        self.job_ends = False
        """the whole job is being stopped, so there is nothing to leave in good order"""

    def ask(self) -> None:
        """The worker is to leave."""
        self.asked = True

    def install(self) -> None:
        """Take SIGTERM, unless the script has its own handler, or this is not the thread that handlers run in.

        The second SIGTERM, or the first when the whole job ends, does what it does by default: it ends the process.
        """
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.job_ends:
            os.kill(os.getpid(), signal.SIGTERM)
        self.ask()
