"""Mode ``lbfgs`` at the coordinator: carries :mod:`downpour_coordinator.lbfgs` out with messages. I/O-free.

Commands to shards are numbered; one that is not answered is said again with each report of its shard, and carried out
once. There is one way to go on after whatever has been lost, vectors with a shard or this state with the coordinator's
process: a new *attempt*, from the point that the shards have, with steepest descent. The counts of iterations and
evaluations go on, so nothing runs for longer than it was told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ConfigError
from downpour_common.messages import Message, Refusal
from downpour_common.modes import Mode
from downpour_common.transport import Peer
from downpour_common.vectors import Commands, packed, together, unpacked
from downpour_coordinator.lbfgs import Algorithm, Evaluate, Options, Progress, minimise
from downpour_coordinator.portions import Portions, cut

ATTEMPT_BITS = 24
"""Evaluations are numbered from ``attempt << ATTEMPT_BITS`` upwards, so that no number is used twice."""


class Minimiser:
    """The calls of ``downpour.minimize`` of one job, one after the other; see the module.

    What is to be sent gathers in ``answers`` (slot, peer, message), ``notices`` (slot, message), ``commands`` (shards
    that are to get :attr:`command`) and ``rows``; :meth:`said` forgets it. ``clock``: of the job, where it begins.
    """

    def __init__(self, mode: Mode, shards: int, clock: int = 0) -> None:
        self._mode = mode
        self._first_clock = clock
        self._shards = shards
        self.answers: list[tuple[int, Peer, Message]] = []
        self.notices: list[tuple[int, Message]] = []
        self.commands: list[int] = []
        self.rows: list[dict[str, Any]] = []
        self.command: m.VectorOps | None = None
        self._run = 0
        self._document: dict[str, Any] = {}
        """options of the run, as its first worker gave them"""
        self._options = Options(1, 1)
        self._count = 1
        """portions of an evaluation"""
        self._attempt = 0
        self._progress = Progress()
        self._results: dict[int, dict[str, Any]] = {}
        self._algorithm: Algorithm | None = None
        self._number = 0
        self._parts: dict[int, list[float]] = {}
        self._portions: Portions | None = None
        self._waiting: dict[int, tuple[Peer, int, int]] = {}
        """slot → where it is, its request, and the run that it asks for"""
        self._logged = 0
        self._backups = 0
        self._bytes = 0
        """of commands and their answers since the last iteration, all shards together"""

    # ------------------------------------------------------------ workers

    def asked(self, slot: int, peer: Peer, message: m.TakePortion, workers: int) -> None:
        """A worker has nothing to do; ``workers`` there are. A repeat changes nothing but where it is."""
        objection = self._objection(message, workers)
        if objection:
            self.answers.append((slot, peer, m.Refused(message.request, Refusal.DATA_DIFFERS.value, objection)))
            return
        self._waiting[slot] = peer, message.request, message.run
        if message.run == self._run and message.run not in self._results:
            if self._portions is not None and message.evaluation == self._portions.evaluation:
                self._finished(slot, message)
            elif self._portions is not None:
                self._portions.release(slot)
        self._hand_out()

    def _objection(self, message: m.TakePortion, workers: int) -> str:
        if self._mode.name != "lbfgs":
            return f"downpour.minimize belongs to mode lbfgs, and this job's is {self._mode}"
        if message.run == self._run + 1 and (self._run in self._results or not self._run):
            try:
                self._options = Options.from_document(message.options)
            except ConfigError as error:
                return str(error)
            self._run, self._document = message.run, message.options
            self._count = int(self._mode.option("portions")) * max(1, workers)
            self._progress, self._logged, self._backups = Progress(), 0, 0
            self._anew()
        elif not 0 < message.run <= self._run:
            return f"call {message.run} of downpour.minimize comes before call {self._run + 1} has been made"
        elif message.run == self._run and message.options and message.options != self._document:
            mine, theirs = message.options, self._document
            name = next(n for n in [*theirs, *mine] if mine.get(n) != theirs.get(n))
            return (
                "downpour.minimize is called by all workers in the same way, but here with "
                f"{name}={mine.get(name)}, elsewhere with {name}={theirs.get(name)}"
            )
        return ""

    def release(self, slot: int) -> None:
        """The worker in ``slot`` is gone, or another one: what it computed is somebody else's."""
        self._waiting.pop(slot, None)
        if self._portions is not None:
            self._portions.release(slot)
            self._hand_out()

    def _finished(self, slot: int, message: m.TakePortion) -> None:
        portions = self._portions
        assert portions is not None
        for other in portions.finished(message.portion, message.loss):
            if other != slot:
                self.notices.append((other, m.PortionOver(message.evaluation, message.portion)))
        portions.release(slot)
        if portions.complete:
            for other, portion in portions.at_work():
                self.notices.append((other, m.PortionOver(message.evaluation, portion)))
            self._portions = None
            self._backups += portions.given
            self._go_on([portions.total])

    def _hand_out(self) -> None:
        for slot, (peer, request, run) in list(self._waiting.items()):
            if run in self._results:
                answer: Message = m.Minimised(request, self._results[run])
            elif self._portions is None or (portion := self._portions.take(slot)) < 0:
                continue
            else:
                place = self._portions.ranges[portion]
                number = self._portions.evaluation
                answer = m.Portion(request, number, portion, *place, self._clock)
            del self._waiting[slot]
            self.answers.append((slot, peer, answer))

    # ------------------------------------------------------------ shards

    def heard(self, shard: int) -> None:
        """A shard has reported: it is reminded of what it has not answered."""
        if self.command is not None and shard not in self._parts:
            self._say([shard])

    def done(self, shard: int, message: m.VectorsDone) -> None:
        """A shard has carried a command out, or cannot. Raises :class:`ProtocolError` for nonsense."""
        command = self.command
        if command is None or (message.attempt, message.number) != (command.attempt, command.number):
            return
        self._bytes += _size(message)
        if message.gone:
            self._anew()
            return
        self._parts[shard] = unpacked(message.results)
        if len(self._parts) == self._shards:
            results = together(command.ops, [self._parts[i] for i in range(self._shards)])
            self.command = None
            self._go_on(results)

    def _order(self, commands: Commands) -> None:
        self._number += 1
        self.command = m.VectorOps(self._attempt, self._number, tuple(commands.ops), packed(commands.scalars))
        self._parts = {}
        self._say(range(self._shards))

    def _say(self, shards: range | list[int]) -> None:
        assert self.command is not None
        self.commands += shards
        self._bytes += _size(self.command) * len(shards)

    # ------------------------------------------------------------ the algorithm

    def _anew(self) -> None:
        self._attempt += 1
        self._number, self._portions = 0, None
        first, history = self._attempt << ATTEMPT_BITS, int(self._mode.option("history"))
        self._algorithm = minimise(self._options, self._progress, history, first)
        self._go_on(None)

    def _go_on(self, results: list[float] | None) -> None:
        assert self._algorithm is not None
        try:
            ask = next(self._algorithm) if results is None else self._algorithm.send(results)
        except StopIteration as end:
            self._log()
            self._end(end.value)
            return
        self._log()
        if isinstance(ask, Evaluate):
            ranges = cut(self._options.samples, self._options.unit, self._count)
            self._portions = Portions(ask.number, ranges, bool(self._mode.option("backup")))
            self._hand_out()
        else:
            self._order(ask)

    def _end(self, reason: str) -> None:
        result = {**asdict(self._progress), "reason": reason, "backups": self._backups, "clock": self._clock}
        self._results[self._run] = result
        self._algorithm = None
        self.rows.append({"minimized": self._run, **result})
        self._hand_out()

    def _log(self) -> None:
        progress = self._progress
        if progress.iterations > self._logged:
            self._logged = progress.iterations
            size = round(self._bytes / self._shards)
            self.rows.append({**asdict(progress), "bytes_per_shard": size, "clock": self._clock})
            self._bytes = 0

    @property
    def _clock(self) -> int:
        """Iterations of all runs, and of the job before."""
        others = sum(result["iterations"] for run, result in self._results.items() if run != self._run)
        return int(self._first_clock + others + self._progress.iterations)

    # ------------------------------------------------------------ what is said, and what is kept

    def said(self) -> None:
        """All that there was to be sent has been."""
        self.answers, self.notices, self.commands, self.rows = [], [], [], []

    def latest(self) -> Iterator[tuple[str, float]]:
        """What people want to see of the iterations that :attr:`rows` tell of."""
        for row in self.rows:
            yield from ((name, row[name]) for name in ("loss", "gradient", "step", "evaluations") if name in row)

    def document(self) -> dict[str, Any]:
        """What survives the process, as plain values: how far it is, and not how it got there."""
        return {
            "run": self._run,
            "options": self._document,
            "count": self._count,
            "attempt": self._attempt,
            "progress": asdict(self._progress),
            "results": list(self._results.items()),
        }

    def restore(self, document: dict[str, Any]) -> None:
        """The inverse of :meth:`document`, in a new process: a run under way begins a new attempt."""
        if not document:
            return
        self._run, self._document, self._count = document["run"], document["options"], document["count"]
        self._attempt, self._progress = document["attempt"], Progress(**document["progress"])
        self._results = {int(run): result for run, result in document["results"]}
        self._logged = self._progress.iterations
        if self._run and self._run not in self._results:
            self._options = Options.from_document(self._document)
            self._anew()
            self.said()  # nobody's address is known yet; shards are told when they report


def _size(message: Message) -> int:
    return len(wire.encode(message)[0])
