"""Warm start: worker 0 takes the first steps alone, the others begin with its weights (Dean et al. 2012, section 4.2).

Stale gradients do most harm where weights change most, at the start. The workers agree on one word: worker 0's, once it
has taken its steps. If it ends, leaves or dies before, the coordinator says it in its place.
"""

from __future__ import annotations

from collections.abc import Callable

from downpour.context import WorkerContext
from downpour.control import Control
from downpour_common.errors import PeerTimeout
from downpour_common.modifiers import WARM_START


class _NoMore(BaseException):
    """The wait is of no use any more."""


class WarmStart:
    """One worker's part in it."""

    def __init__(self, context: WorkerContext, control: Control) -> None:
        self._steps = context.warm_start
        self._timeout_s = context.timeout_s
        self._control = control
        self._leads = context.replica == 0
        self._tells = self._leads and context.rank == 0 and context.warm_start > 0

    def stepped(self, clock: int) -> None:
        """This worker has completed ``clock`` steps of the job. Waits for nothing."""
        if self._tells and clock >= self._steps:
            self._tells = False
            self._control.propose(WARM_START, b"warm")

    def wait(self, clock: int, updates: Callable[[], int], over: Callable[[], bool]) -> bool:
        """Until worker 0 has taken its steps, or ``over`` says that there is nothing to wait for; whether there was a
        wait at all.

        ``clock``: steps of the job when this worker joined. ``updates`` fetches the weights and counts their updates:
        as long as there are new ones the wait goes on. Raises :class:`PeerTimeout` after ``timeout_s`` without any.
        """
        if self._leads or clock >= self._steps:
            return False

        def look() -> None:
            if over():
                raise _NoMore

        before = -1
        while True:
            try:
                self._control.agree(WARM_START, leave_point=look, timeout_s=self._timeout_s)
            except _NoMore:
                pass
            except PeerTimeout:
                before, last = updates(), before
                if before > last:
                    continue
                raise PeerTimeout(
                    "worker/0", f"the {self._steps} steps that it takes alone (warm_start)", self._timeout_s
                ) from None
            return True
