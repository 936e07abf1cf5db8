"""One training step of a replica: what is pushed, what is fetched, and when, as the mode says.

``async`` with ``n_push`` and ``n_fetch`` is DistBelief's Downpour SGD (Dean et al. 2012, appendix, algorithm
7.1): the worker takes local steps with its own optimizer, pushes the sum of its gradients every ``n_push``
steps, and replaces its weights by the servers' every ``n_fetch`` steps. With both at 1, and in ``ssp`` and
``sync``, each step is one fused push-pull and no local step is needed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from downpour.client.core import Ticket
from downpour.client.parameters import ParameterClient, PushHeader
from downpour.injection import HeldBack, Late
from downpour.model import options_of
from downpour.overlap import Overlap
from downpour.space import FlatSpace
from downpour.spans import span
from downpour.staging import Staging
from downpour_common import failpoints, wire
from downpour_common import messages as m
from downpour_common.errors import NonFiniteContribution


@dataclass(slots=True)
class Counters:
    """What this worker has done. ``clock`` counts completed steps, from the job's start clock."""

    clock: int
    samples: int = 0
    pushes: int = 0
    """of gradients, each of all chunks"""
    pulls: int = 0
    """of trainable weights, each of all chunks; the first weights at the start not counted"""
    wait_s: float = 0.0


class Engine:
    """Steps of one worker. ``clock``: of the job, when it joined; ``first_seq``: number of its first contribution.

    ``position`` gives the training data's (epoch, offset) after the step's samples. ``tolerant``: the servers leave
    out a gradient with NaN or Inf; the script's log is to tell of the first.
    """

    def __init__(
        self,
        space: FlatSpace,
        staging: Staging,
        client: ParameterClient,
        optimizer: torch.optim.Optimizer,
        cadence: tuple[int, int],
        clock: int,
        first_seq: int,
        position: Callable[[], tuple[int, ...]],
        tolerant: bool = False,
    ) -> None:
        self.counters = Counters(clock)
        self._watches = tolerant
        self._space = space
        self._staging = staging
        self._client = client
        self._optimizer = optimizer
        self._n_push, self._n_fetch = cadence
        self._position = position
        self._seq = first_seq
        self._first_clock = clock
        self._samples = 0
        self._new_samples = 0
        """of the step to come"""
        self._empty = True
        """whether all steps since the last push were skipped"""
        self._chunks = space.column.by_kind["trainable"]
        self._first_needed_first = tuple(reversed(self._chunks))
        self._overlap: Overlap | None = None
        self._ahead = False
        self._under_way: Ticket | None = None
        """with :meth:`fetch_ahead`: the push-pull of the step before"""
        self._held_back: HeldBack | None = None
        self._late: Late | None = None
        """with :meth:`hold_back`: what is pushed"""
        self._accrued: dict[int, torch.Tensor] | None = None
        if self._n_push > 1:
            self._accrued = {i: torch.zeros_like(g) for i, g in space.gradients.items()}

    def overlap(self) -> None:
        """From now on send chunks while backward computes others, where that is of use."""
        pushes_all = (self._n_push, self._n_fetch) == (1, 1)
        if pushes_all and self._overlap is None and any(self._client.sends(chunk) for chunk in self._chunks):
            self._overlap = Overlap(self._space, self._staging, self._client)

    def fetch_ahead(self) -> None:
        """From now on the answer to a step's push-pull is awaited in the next step, which so computes on the weights of
        the step before (Dean et al. 2012, algorithm 7.1, fetches while it computes). ``staging`` must have mirrors."""
        self._ahead = True
        self._client.compute_on(self._client.fetched())

    def hold_back(self, steps: int) -> None:
        """From now on each gradient is pushed so many steps late; see :mod:`downpour.injection`. Weights must not be
        the servers' own (in place), and chunks not leave ahead of their step (:meth:`overlap`)."""
        self._held_back = HeldBack(steps)

    def add_samples(self, count: int) -> None:
        """The gradient at hand comes from ``count`` more samples."""
        self._new_samples += count
        self.counters.samples += count

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:
        """Complete one step; see the module. One that is ``skipped`` counts, so that the workers' steps keep meeting
        each other in rounds; its gradients, and the samples they come from, do not."""
        if skipped:
            self._space.zero_gradients()
            local_step = _nothing
        else:
            self._counts(self._new_samples)
        self._new_samples = 0
        self._space.gather_gradients()
        if self._watches:
            self._look_for_non_finite()
        if failpoints.on:
            failpoints.hit("worker.push.before")
        if self._held_back is not None:
            self._push_late(self._held_back)
        elif self._ahead:
            self._push_pull_ahead()
        elif (self._n_push, self._n_fetch) == (1, 1):
            self._push_pull(self._space.gradients)
        else:
            self._downpour(local_step)
        if failpoints.on:
            failpoints.hit("worker.push.after")
        self.counters.clock += 1

    def zero_gradients(self) -> None:
        """See :class:`downpour.optimizer.Stepper`."""
        if self._overlap is not None:
            self._overlap.forget()
        self._space.zero_gradients()

    def push(self, samples: int) -> None:
        """Push the gradients at hand as one contribution, without a fetch or a local step."""
        self._space.gather_gradients()
        if self._overlap is not None:
            self._overlap.forget()
        landed = self._land()
        self._samples = self._new_samples = 0
        self._counts(samples)
        self.counters.samples += samples
        self._push(self._space.gradients)
        if landed is not None:
            self._client.compute_on(landed)
        self.counters.clock += 1

    def flush(self) -> None:
        """Push what has accrued since the last push, at the end of training."""
        if self._overlap is not None:
            self._overlap.close()
        self._land()
        if self._held_back is not None:
            for late in self._held_back.rest():
                self._bring(late)
                self._push(self._space.gradients)
        if self._accrued is not None and (self.counters.clock - self._first_clock) % self._n_push:
            self._push(self._accrued)

    def round_is(self, number: int) -> None:
        """``sync``, between two passes: the next contribution is meant for this round. One who took no step in the
        last of the pass before has fetched nothing of it, and does it now."""
        if number > self._seq:
            self._seq = self.counters.clock = number
            self.pull()

    def meet(self, wait: Callable[[], None]) -> None:
        """Come to a barrier; ``wait`` returns once every worker has."""
        wait()

    def pull(self) -> None:
        """Fetch the newest weights now."""
        self._land()
        started_s = time.perf_counter()
        self.counters.pulls += 1
        with span("pull"):
            ticket = self._client.start_pull(self._first_needed_first, self._staging.mirrors)
            self._place(ticket, len(self._chunks))
        if self._ahead:
            self._client.compute_on(self._client.fetched())
        self.counters.wait_s += time.perf_counter() - started_s

    def _downpour(self, local_step: Callable[[], None]) -> None:
        source = self._space.gradients
        if self._accrued is not None:
            for index, accrued in self._accrued.items():
                accrued.add_(source[index])
            source = self._accrued
        done = self.counters.clock - self._first_clock + 1
        push, fetch = done % self._n_push == 0, done % self._n_fetch == 0
        if push and fetch:
            self._push_pull(source)
        else:
            if push:
                self._push(source)
            if fetch:
                self.pull()
            else:
                local_step()
        if push and self._accrued is not None:
            for accrued in self._accrued.values():
                accrued.zero_()

    def _push_late(self, held_back: HeldBack) -> None:
        """Fetch, and push what is due."""
        samples = 0 if self._empty else max(1, self._samples)
        late = held_back.exchange(Late(self._space.gradients, self._client.fetched(), samples, self._position()))
        self._samples, self._empty = 0, True
        if late is None:
            self.pull()
        else:
            self._bring(late)
            self._push_pull(self._space.gradients)
            self._late = None
        self._client.compute_on(self._client.fetched())

    def _bring(self, late: Late) -> None:
        """The next push is of this one."""
        for index, gradient in late.gradients.items():
            self._space.gradients[index].copy_(gradient)
        self._client.compute_on(late.versions)
        self._samples, self._empty, self._late = late.samples, not late.samples, late

    def _push_pull(self, source: Mapping[int, torch.Tensor]) -> None:
        started_s = time.perf_counter()
        header = self._header()
        self.counters.pushes += 1
        self.counters.pulls += 1
        with span("push"):
            ticket = self._client.begin_push_pull(len(self._chunks), self._staging.mirrors)
            current = frozenset() if self._overlap is None else self._overlap.settle()
            # In one order for all workers: answers may wait for the others', and hold the credit of what comes later.
            for ready in self._staging.outgoing(self._first_needed_first, source, current):
                self._client.add_push_pull(ready, header, ticket)
        if failpoints.on:
            failpoints.hit("worker.push.sent")
        with span("pull"):
            self._place(ticket, len(self._chunks))
        if self._overlap is not None:
            self._overlap.judge(time.perf_counter())
        self.counters.wait_s += time.perf_counter() - started_s

    def _push_pull_ahead(self) -> None:
        started_s = time.perf_counter()
        header = self._header()
        landed = self._land()
        self.counters.pushes += 1
        self.counters.pulls += 1
        with span("push"):
            self._under_way = self._client.begin_push_pull(len(self._chunks))
            for ready in self._staging.outgoing(self._first_needed_first, self._space.gradients):
                self._client.add_push_pull(ready, header, self._under_way)
        if landed is not None:
            self._client.compute_on(landed)
        self.counters.wait_s += time.perf_counter() - started_s

    def _land(self) -> list[int] | None:
        """Wait for the push-pull that is under way, and bring its answer into the model; its versions."""
        ticket, self._under_way = self._under_way, None
        if ticket is None:
            return None
        try:
            with span("pull"):
                ticket.wait()
        except NonFiniteContribution as error:  # the gradients at hand are another step's, so no name
            raise explained(error, self.counters.clock - 1, None) from None
        for chunk in self._chunks:
            self._staging.arrived(chunk)
        self._staging.settle()
        return self._client.fetched()

    def _push(self, source: Mapping[int, torch.Tensor]) -> None:
        started_s = time.perf_counter()
        self.counters.pushes += 1
        try:
            with span("push"):
                chunks = [chunk for ready in self._staging.outgoing(self._chunks, source) for chunk in ready]
                self._client.push(chunks, self._header())
        except NonFiniteContribution as error:
            raise self._named(error) from None
        self.counters.wait_s += time.perf_counter() - started_s

    def _place(self, ticket: Ticket, count: int) -> None:
        """Bring answers to the device as they come, then wait for the last."""
        if self._staging.mirrors:
            for _ in range(count):
                answer = ticket.answer()
                if answer is None:
                    break
                assert isinstance(answer, (m.Weights, m.WeightsShared, m.WeightsCoded))
                self._staging.arrived(self._space.layout.chunks[answer.chunk])
        try:
            ticket.wait()
        except NonFiniteContribution as error:
            raise self._named(error) from None
        self._staging.settle()

    def _counts(self, samples: int) -> None:
        """The next push is of these samples, too."""
        self._samples += samples
        self._empty = False

    def _header(self) -> PushHeader:
        hyper = [wire.pack(options_of(group)) for group in self._optimizer.param_groups]
        samples = 0 if self._empty else max(1, self._samples)
        position = self._position() if self._late is None else self._late.position
        header = PushHeader(self._seq, samples, position, hyper)
        self._seq += 1
        self._samples = 0
        self._empty = True
        return header

    def _look_for_non_finite(self) -> None:
        """Warn, once."""
        if all(torch.isfinite(flat.sum()) for flat in self._space.gradients.values()):
            return
        name = self._space.name_non_finite()
        if name is not None:  # a sum may be infinite all the same
            self._watches = False
            warnings.warn(
                f"step {self.counters.clock}: the gradient of {name} holds NaN or Inf. The servers leave such "
                "gradients of this worker out (on_nan); later ones are counted in the job's status and not told here",
                stacklevel=4,
            )

    def _named(self, error: NonFiniteContribution) -> NonFiniteContribution:
        return explained(error, self.counters.clock, self._space.name_non_finite())


def _nothing() -> None:
    """The local step of a step that is skipped."""


def explained(error: NonFiniteContribution, clock: int, name: str | None) -> NonFiniteContribution:
    return NonFiniteContribution(
        f"step {clock}: the gradient of {name or 'a parameter'} holds NaN or Inf, and the servers "
        "refused it. Lower the learning rate, clip gradients (torch.nn.utils.clip_grad_norm_), or check the "
        f"input data. [{error}]"
    )
