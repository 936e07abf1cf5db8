"""What a worker says to the coordinator of its job.

The coordinator may be restarted or away for minutes: requests are repeated until they are answered, and steps, which
talk to shards only, go on meanwhile.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from downpour.client.core import REPEAT_S, Submission, Ticket
from downpour.client.thread import DEADLINE_MARGIN_S, ClientThread
from downpour.context import WorkerContext
from downpour.engine import Counters
from downpour_common import messages as m
from downpour_common.errors import ConfigError, MateLost, ModelMismatch, PeerRefused, PeerTimeout
from downpour_common.layout import ModelSpec
from downpour_common.messages import Refusal, Request

TRACE_CHARACTERS = 60_000
"""Of a traceback, its end; headers have a limit."""


class Control:
    """The coordinator, as the training thread sees it. ``leave_point`` is called while a wait may be left for good;
    it raises what ends the script.

    Raises :class:`PeerTimeout` past the deadline, :class:`PeerRefused` when this worker has been replaced.
    """

    def __init__(self, thread: ClientThread, context: WorkerContext, leave_point: Callable[[], None]) -> None:
        self._thread = thread
        self._context = context
        self._leave_point = leave_point
        self._timeout_s = context.timeout_s + DEADLINE_MARGIN_S
        self._unnoted: deque[Ticket] = deque()
        thread.name(context.coordinator, "coordinator")

    def register(self, model: ModelSpec) -> m.Welcome:
        """Join. Raises :class:`ModelMismatch` when this worker's model is not the job's."""
        request = m.RegisterWorker(*self._me(), os.getpid(), model.to_wire())
        try:
            answer = self._ask(request, "all workers and servers to be ready", timeout_s=self._context.start_timeout_s)
        except PeerRefused as error:
            if error.code == Refusal.MODEL_DIFFERS:
                raise ModelMismatch(error.reason) from None
            raise
        assert isinstance(answer, m.Welcome)
        return answer

    def begin_pass(self, loader: int, epoch: int, clock: int) -> m.PassBegins:
        """Learn how a pass is split; ``clock`` -1: whether it is already and this worker, which leaves, has a part."""
        answer = self._ask(m.BeginPass(*self._me(), loader, epoch, clock), "a pass over the training data to begin")
        assert isinstance(answer, m.PassBegins)
        return answer

    def take_lease(
        self, loader: int, epoch: int, total: int, unit: int, digest: str, done: Sequence[tuple[int, int]]
    ) -> m.Lease:
        """See :meth:`downpour.data.loader.Host.take_lease`."""
        request = m.TakeLease(*self._me(), loader, epoch, total, unit, digest, _flat(done))
        lease = self._ask(request, "a lease on training samples", self._leave_point)
        assert isinstance(lease, m.Lease)
        return lease

    def report_done(self, loader: int, epoch: int, done: Sequence[tuple[int, int]], wait: bool) -> None:
        """See :meth:`downpour.data.loader.Host.report_done`. Without ``wait`` it is :meth:`settle` that waits."""
        ticket = Ticket(1)
        request = m.TakeLease(*self._me(), loader, epoch, 0, 0, "", _flat(done))
        self._submit(request, ticket, "finished samples to be noted", self._timeout_s)
        if wait:
            ticket.wait()
        else:
            self._unnoted.append(ticket)

    def take_portion(
        self, run: int, options: Mapping[str, Any], evaluation: int, portion: int, loss: float, samples: int
    ) -> m.Portion | m.Minimised:
        """Mode lbfgs: what to compute next, or the result; what is told is of the portion before. See
        :class:`m.TakePortion`. Raises :class:`ConfigError` where this call is not as the other workers'."""
        request = m.TakePortion(*self._me(), run, dict(options), evaluation, portion, loss, samples)
        try:
            answer = self._ask(request, "a portion of the data to compute", self._leave_point)
        except PeerRefused as error:
            if error.code == Refusal.DATA_DIFFERS:
                raise ConfigError(error.reason) from None
            raise
        assert isinstance(answer, m.Portion | m.Minimised)
        return answer

    def barrier(self) -> None:
        """Wait until every live worker is here. All barriers have one name, so that one who joins late finds them."""
        self._ask(m.EnterBarrier(*self._me(), "barrier"), "the other workers at the barrier", self._leave_point)

    def agree(
        self,
        key: str,
        value: bytes | None = None,
        leave_point: Callable[[], None] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """The value that the job's workers have for ``key``: the first that was proposed, which may be ``value``.
        Without one of its own this worker waits for another's, as long as it may take until all have joined, or
        ``timeout_s``. ``leave_point``: instead of this object's."""
        request = m.Agree(*self._me(), key, value or b"", value is not None)
        awaited = f"a worker's word on {key}"
        timeout_s = self._context.start_timeout_s if timeout_s is None else timeout_s
        answer = self._ask(request, awaited, leave_point or self._leave_point, timeout_s=timeout_s)
        assert isinstance(answer, m.Agreed)
        return answer.value

    def propose(self, key: str, value: bytes) -> None:
        """As :meth:`agree`, without waiting for what came of it; :meth:`settle` waits."""
        ticket = Ticket(1)
        self._unnoted.append(ticket)
        self._submit(m.Agree(*self._me(), key, value, True), ticket, f"a word on {key} to be noted", math.inf)

    def log(self, clock: int, values: Mapping[str, float]) -> None:
        """Send scalars to the run's metrics; :meth:`settle` waits for them."""
        while self._unnoted and self._unnoted[0].settled():
            error = self._unnoted.popleft().error
            if isinstance(error, PeerRefused):
                raise error
        ticket = Ticket(1)
        self._unnoted.append(ticket)
        self._submit(m.LogMetrics(*self._me(), clock, dict(values)), ticket, "metrics to be noted", math.inf)

    def end_training(self, clock: int, reason: str) -> None:
        """Have all workers told that the training is done."""
        self._ask(m.EndTraining(*self._me(), clock, reason), "the end of the training to be noted", self._leave_point)

    def spans(self, line: bytes, ticket: Ticket) -> None:
        """Send what this worker has done, see :mod:`downpour.tracing`; nobody waits for it."""
        self._submit(m.Spans(*self._me(), line), ticket, "spans to be noted", math.inf)

    def progress(
        self, counters: Counters, clock: int, epoch: int, traffic: tuple[int, int], shard_epochs: tuple[int, ...]
    ) -> None:
        """Tell how far this worker is, and which processes it takes for the shards; ``traffic``: bytes sent, bytes
        received. Told again while nothing newer is."""
        c = self._context
        message = m.Progress(
            c.job,
            c.slot,
            c.worker_epoch,
            clock,
            epoch,
            counters.samples,
            counters.pushes,
            counters.pulls,
            *traffic,
            counters.wait_s,
            shard_epochs,
        )
        self._thread.keep_telling(c.coordinator, message)

    def settle(self) -> None:
        """Wait until everything is noted that was sent without waiting."""
        deadline_s = time.monotonic() + self._timeout_s
        for ticket in self._unnoted:
            if not ticket.settled(max(0.0, deadline_s - time.monotonic())):
                raise PeerTimeout("coordinator", "metrics to be noted", self._timeout_s)
            ticket.wait()

    def goodbye(self, drained: bool, torn: int, numbers: tuple[int, int]) -> None:
        """Leave the coordinator; the shards have been left before. ``numbers``: of the first contribution, and of the
        one that would come next."""
        self._ask(m.Goodbye(*self._me(), drained, torn, *numbers), "goodbye to be noted")

    def failed(self, error: BaseException, trace: str) -> None:
        """The script has raised."""
        c = self._context
        text = f"{type(error).__name__}: {error}"
        consequence = ("late" if error.late else "gone") if isinstance(error, MateLost) else ""
        message = m.ReportFailure(c.job, c.slot, c.worker_epoch, text, trace[-TRACE_CHARACTERS:], consequence)
        self._thread.tell(c.coordinator, message)

    def _me(self) -> tuple[int, str, int, int]:
        """The first fields of every request."""
        return self._thread.number(), self._context.job, self._context.slot, self._context.worker_epoch

    def _ask(
        self,
        request: Request,
        awaited: str,
        leave_point: Callable[[], None] | None = None,
        timeout_s: float | None = None,
    ) -> Request:
        ticket = Ticket(1)
        self._submit(request, ticket, awaited, self._timeout_s if timeout_s is None else timeout_s)
        if leave_point is not None:
            self._thread.wait(ticket, leave_point)
        return ticket.result()

    def _submit(self, request: Request, ticket: Ticket, awaited: str, timeout_s: float) -> None:
        coordinator = self._context.coordinator
        self._thread.submit([Submission(coordinator, request, ticket, awaited, timeout_s, repeat_s=REPEAT_S)])


def _flat(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(n for span in spans for n in span)
