"""Exchanges in rounds: ``average`` and ``diloco``.

A worker's *anchor* is what it has fetched last. After h local steps from it to w, it pushes anchor - w; the shards
take the mean of all workers', by samples, as the gradient of their SGD, and answer with the new weights, which are the
worker's next anchor::

    g = sum_i n_i (anchor - w_i) / sum_i n_i        A = SGD(A, g)        w_i = anchor = A

By samples, as everywhere: a worker that had fewer steps, because it joined or its data ended, counts by what it saw,
and with equal batches it is the plain mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from downpour.local.engine import LocalEngine
from downpour.local.fragments import Fragment, fragments_of
from downpour.spans import span
from downpour.takeover import fresh
from downpour_common import failpoints
from downpour_common.errors import NonFiniteContribution


class RoundsEngine(LocalEngine):
    """See the module, and :mod:`downpour_server.policy.exchanges` for the numbers of contributions."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._anchor = {i: flat.clone() for i, flat in self._space.weights.items()}
        count = self.fragments
        self._fragments = fragments_of(self._chunks, count, self._every, self._seq)
        self._done = 0
        """steps since the first period began"""

    @property
    def fragments(self) -> int:
        """Parts that are exchanged one after the other, if there are as many chunks."""
        return 1

    def stepped(self, samples: int) -> None:
        """See :class:`LocalEngine`."""
        self._done += 1
        for fragment in self._fragments:
            fragment.steps += 1
            fragment.samples += samples
        for fragment in self._fragments:
            if self._done % self._every == fragment.offset:
                self._exchange(fragment)

    def flush(self) -> None:
        """Push what has become of the weights since the last exchange, without waiting for the others."""
        started_s = time.perf_counter()
        dirty = [fragment for fragment in self._fragments if fragment.samples]
        for fragment in dirty:
            self._write(fragment)
            header = self._header_with(fragment.seq, fragment.samples)
            try:
                with span("push"):
                    out = self._staging.outgoing(fragment.chunks, self._space.gradients)
                    self._client.start_push([c for ready in out for c in ready], header, last=False).wait()
            except NonFiniteContribution as error:
                raise self._named(error) from None
            self._exchanged(fragment)
        if dirty:
            self.counters.pushes += 1
            self._space.zero_gradients()
        self.counters.wait_s += time.perf_counter() - started_s

    def pull(self) -> None:
        """Fetch the newest weights. What this worker has done since its last exchange stays, on top of them."""
        if not any(fragment.samples for fragment in self._fragments):
            super().pull()
            self._set_anchor()
            return
        own = {i: flat.clone() for i, flat in self._space.weights.items()}
        super().pull()
        with torch.no_grad():
            for i, new in self._space.weights.items():
                anchor = self._anchor[i]
                if not torch.equal(new, anchor):  # else even the last bit stays
                    own[i].sub_(anchor).add_(new)
                    anchor.copy_(new)
                new.copy_(own[i])

    def meet(self, wait: Callable[[], None]) -> None:  # noqa: ARG002
        """Wait until every worker is here, with what all of them have done; nobody's exchange waits for one that is.

        All begin a period together then.
        """
        self.flush()
        with span("wait"):
            self._client.end_epoch(-1, 0, self._job.leave_point)
        number = self._job.agreed(fresh(self._client.hello_again(), self._space.column).seq)
        self._client.begin_at(number)
        self._client.take_part()
        self._done = 0
        for fragment in self._fragments:
            fragment.seq, fragment.steps, fragment.samples = number, 0, 0
        self.pull()

    def _exchange(self, fragment: Fragment) -> None:
        started_s = time.perf_counter()
        if failpoints.on:
            failpoints.hit("worker.push.before")
        self._write(fragment)
        header = self._header_with(fragment.seq, fragment.samples)
        with span("push"):
            ticket = self._client.begin_push_pull(len(fragment.chunks), self._staging.mirrors, last=False)
            for ready in self._staging.outgoing(fragment.chunks, self._space.gradients):
                self._client.add_push_pull(ready, header, ticket)
        self._exchanged(fragment)
        if failpoints.on:
            failpoints.hit("worker.push.sent")
        with span("pull"):
            self._place(ticket, len(fragment.chunks))
        for chunk in fragment.chunks:
            self._space.of(self._anchor, chunk).copy_(self._space.of(self._space.weights, chunk))
        self._space.zero_gradients()
        if fragment is self._fragments[-1]:
            self.counters.pushes += 1
            self.counters.pulls += 1
        self.counters.wait_s += time.perf_counter() - started_s
        if failpoints.on:
            failpoints.hit("worker.push.after")

    def _write(self, fragment: Fragment) -> None:
        """The change since the last exchange, as a gradient."""
        space = self._space
        for chunk in fragment.chunks:
            weights, change = space.of(space.weights, chunk), space.of(space.gradients, chunk)
            torch.sub(space.of(self._anchor, chunk), weights, out=change)

    def _exchanged(self, fragment: Fragment) -> None:
        fragment.exchanged()
        self._client.next_is(min(f.seq for f in self._fragments))

    def _set_anchor(self) -> None:
        for i, flat in self._space.weights.items():
            self._anchor[i].copy_(flat)
