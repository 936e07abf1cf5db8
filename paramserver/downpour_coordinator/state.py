"""The coordinator as a state machine: messages in, effects out. No sockets, no clock, no files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Message, Refusal
from downpour_common.modes import Mode
from downpour_common.transport import Peer
from downpour_coordinator.leases import PassLedger, Span, merge
from downpour_coordinator.snapshots import CommitSnapshot, Round, SnapshotFailed

LARGEST_MARGIN = 4096
"""Clocks that a synchronous snapshot is put ahead of the shards' last report at most."""


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What the coordinator must know of the job. ``resume`` is a checkpoint folder or ""."""

    job: str
    workers: int
    shards: int
    mode: Mode
    seed: int
    chunk_bytes: int
    resume: str = ""
    clock: int = 0
    epoch: int = 0
    done: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send ``message`` to ``peer``."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class LogRow:
    """Effect: append ``row`` to the run's metrics."""

    row: dict[str, Any]


Effect = Send | LogRow | CommitSnapshot | SnapshotFailed


@dataclass(slots=True)
class Worker:
    """One slot. ``answered``: it has been welcomed."""

    slot: int
    peer: Peer = b""
    request: int = 0
    epoch: int = 0
    pid: int = 0
    answered: bool = False
    gone: bool = False
    progress: m.Progress | None = None


@dataclass(slots=True)
class ShardEntry:
    """One shard process."""

    index: int
    peer: Peer = b""
    address: str = ""
    pid: int = 0
    ready: bool = False
    report: dict[str, Any] = field(default_factory=dict)


class Coordinator:
    """State of one job; see the module. ``failures`` collects what scripts reported, the first first."""

    def __init__(self, facts: JobFacts) -> None:
        self.facts = facts
        self.workers = {slot: Worker(slot) for slot in range(facts.workers)}
        self.shards = {index: ShardEntry(index) for index in range(facts.shards)}
        self.failures: list[m.ReportFailure] = []
        self.setup_error = ""
        self.latest: dict[str, float] = {}
        self.model: ModelSpec | None = None
        self._waiting: dict[int, ModelSpec] = {}
        self._ledgers: dict[tuple[int, int], PassLedger] = {}
        self._passes: dict[int, int] = {}  # slot → its newest pass over the first loader
        self._barriers: dict[str, dict[int, tuple[Peer, int]]] = {}
        self._round: Round | None = None
        self._margin = 2

    # ------------------------------------------------------------ events

    def handle(self, peer: Peer, message: Message) -> list[Effect]:
        """Take one message; returns what is to be done, in order."""
        effects: list[Effect] = []
        match message:
            case m.TakeLease():
                self._take_lease(peer, message, effects)
            case m.Progress():
                if (worker := self.workers.get(message.slot)) is not None:
                    worker.progress = message
            case m.LogMetrics():
                self._log(message, effects)
            case m.ShardReport():
                if (shard := self.shards.get(message.shard)) is not None:
                    shard.report = message.document
            case m.EnterBarrier():
                self._barriers.setdefault(message.name, {})[message.slot] = (peer, message.request)
                self._release_barriers(effects)
            case m.RegisterShard():
                self._register_shard(peer, message, effects)
            case m.ShardReady():
                self._shard_ready(message, effects)
            case m.RegisterWorker():
                self._register_worker(peer, message, effects)
            case m.SnapshotTaken():
                if self._round is not None and (outcome := self._round.taken(message)) is not None:
                    self._round = None
                    if isinstance(outcome, SnapshotFailed):
                        self._margin = min(self._margin * 4, LARGEST_MARGIN)
                    effects.append(outcome)
            case m.ReportFailure():
                self.failures.append(message)
            case m.Goodbye():
                effects.append(Send(peer, m.Ack(message.request, 0)))
                self.worker_gone(message.slot, effects)
            case _:
                raise ProtocolError(f"the coordinator does not take {type(message).__name__}")
        return effects

    def worker_gone(self, slot: int, effects: list[Effect]) -> None:
        """The worker of ``slot`` has ended: what it held is free, and nobody waits for it."""
        if (worker := self.workers.get(slot)) is not None and not worker.gone:
            worker.gone = True
            for ledger in self._ledgers.values():
                ledger.release(slot)
            self._release_barriers(effects)

    def begin_snapshot(self, number: int, folder: str, final: bool = False) -> list[Effect]:
        """Ask every shard for a snapshot; nothing while one is under way or the model is unknown.

        In the synchronous mode all shards take it at one clock a little ahead of what the workers reported last.
        """
        if self.model is None or not all(s.ready for s in self.shards.values()):
            return []
        if self._round is not None and not final:
            return []
        at_clock = -1
        if self.facts.mode.synchronous and not final:
            at_clock = self._clock_ahead()
        self._round = Round(number, folder, len(self.shards), self._manifest())
        return [Send(s.peer, m.TakeSnapshot(number, folder, at_clock)) for s in self.shards.values()]

    def ask_to_stop(self, reason: str) -> list[Effect]:
        """Tell every worker's script that it should end."""
        return [Send(w.peer, m.ShouldStop(reason)) for w in self.workers.values() if w.peer and not w.gone]

    def stop_shards(self) -> list[Effect]:
        """Tell every shard that the job is over."""
        return [Send(s.peer, m.StopShard()) for s in self.shards.values() if s.peer]

    # ------------------------------------------------------------ what it knows

    @property
    def training(self) -> bool:
        """Whether every worker has been welcomed."""
        return all(w.answered for w in self.workers.values())

    def waiting_for(self) -> list[str]:
        """The processes that are still to join, by name."""
        missing = [f"server/{s.index}" for s in self.shards.values() if not s.peer]
        missing += [f"worker/{w.slot}" for w in self.workers.values() if not w.pid and not w.gone]
        return missing

    def staleness(self) -> Counter[int]:
        """Contributions by staleness, over all shards."""
        total: Counter[int] = Counter()
        for shard in self.shards.values():
            total.update({int(k): n for k, n in shard.report.get("staleness", {}).items()})
        return total

    def data_position(self) -> tuple[int, list[Span]]:
        """The pass over the first loader that the last worker is in, and what of it is done."""
        if not self._passes:
            finished = [w.progress.epoch for w in self.workers.values() if w.progress is not None]
            epoch = min(finished, default=self.facts.epoch)
            return epoch, list(self.facts.done) if epoch == self.facts.epoch else []
        live = [epoch for slot, epoch in self._passes.items() if not self.workers[slot].gone]
        epoch = min(live) if live else max(self._passes.values())
        ledger = self._ledgers[0, epoch]
        return (epoch + 1, []) if ledger.closed else (epoch, ledger.done)

    # ------------------------------------------------------------ joining

    def _register_shard(self, peer: Peer, message: m.RegisterShard, effects: list[Effect]) -> None:
        shard = self.shards.get(message.shard)
        if shard is None or message.job != self.facts.job:
            return
        shard.peer, shard.address, shard.pid = peer, message.address, message.pid
        if self.model is not None:
            effects.append(Send(peer, m.SetUpShard(self.model.to_wire(), self.facts.resume)))

    def _shard_ready(self, message: m.ShardReady, effects: list[Effect]) -> None:
        if message.shard not in self.shards:
            raise ProtocolError(f"there is no server/{message.shard} in this job")
        if message.error:
            self.setup_error = self.setup_error or f"server/{message.shard}: {message.error}"
        else:
            self.shards[message.shard].ready = True
        self._welcome(effects)

    def _register_worker(self, peer: Peer, message: m.RegisterWorker, effects: list[Effect]) -> None:
        worker = self.workers.get(message.slot)
        if worker is None or message.job != self.facts.job:
            reason = f"job {message.job!r}, slot {message.slot} does not belong here (job {self.facts.job!r})"
            effects.append(Send(peer, m.Refused(message.request, Refusal.WRONG_JOB.value, reason)))
            return
        model = ModelSpec.from_wire(message.model)
        worker.peer, worker.request = peer, message.request
        worker.pid, worker.epoch = message.pid, message.worker_epoch
        self._waiting[message.slot] = model
        if self.model is None and message.slot == 0:
            self.model = model
            for shard in self.shards.values():
                if shard.peer:
                    effects.append(Send(shard.peer, m.SetUpShard(message.model, self.facts.resume)))
        self._welcome(effects)

    def _welcome(self, effects: list[Effect]) -> None:
        """Answer the workers that wait: refusals at once, welcomes when all are there and the shards hold the model."""
        if self.model is None:
            return
        ready = all(s.ready for s in self.shards.values()) and all(w.pid or w.gone for w in self.workers.values())
        facts = self.facts
        for slot, model in list(self._waiting.items()):
            worker = self.workers[slot]
            difference = self.model.first_difference(model)
            if difference is not None:
                refused = m.Refused(worker.request, Refusal.MODEL_DIFFERS.value, difference)
            elif self.setup_error:
                refused = m.Refused(worker.request, Refusal.CHECKPOINT.value, self.setup_error)
            elif ready:
                worker.answered = True
                addresses = tuple(self.shards[i].address for i in range(facts.shards))
                offset = facts.done[0][1] if facts.done and facts.done[0][0] == 0 and facts.mode.synchronous else 0
                position = (facts.epoch, offset)
                welcome = m.Welcome(worker.request, addresses, bool(facts.resume), facts.clock, position)
                effects.append(Send(worker.peer, welcome))
                del self._waiting[slot]
                continue
            else:
                continue
            effects.append(Send(worker.peer, refused))
            del self._waiting[slot]

    # ------------------------------------------------------------ data, barriers, metrics

    def _take_lease(self, peer: Peer, message: m.TakeLease, effects: list[Effect]) -> None:
        key = (message.loader, message.epoch)
        for other, ledger in self._ledgers.items():
            if other[0] == message.loader and other[1] < message.epoch:
                ledger.release(message.slot)  # the script left that pass early
        found = self._ledgers.get(key)
        if found is None:
            resumed = list(self.facts.done) if key == (0, self.facts.epoch) and self.facts.resume else []
            found = self._ledgers[key] = PassLedger.begin(message.total, message.order, resumed)
        if message.loader == 0 and message.slot in self.workers:
            self._passes[message.slot] = max(message.epoch, self._passes.get(message.slot, 0))
        for start, stop in zip(message.done[::2], message.done[1::2], strict=False):
            found.finish(message.slot, (start, stop))
        if not message.unit:
            effects.append(Send(peer, m.Lease(message.request, found.total, found.total)))
            return
        if (found.total, found.order) != (message.total, message.order):
            reason = (
                f"worker/{message.slot} has {message.total} samples in pass {message.epoch} of loader {message.loader} "
                f"in the order {message.order}, the others {found.total} in the order {found.order}; "
                "every worker must see the same dataset in the same order (seed what is random in it)"
            )
            effects.append(Send(peer, m.Refused(message.request, Refusal.DATA_DIFFERS.value, reason)))
            return
        start, stop = found.grant(message.slot, message.unit, self.facts.workers)
        effects.append(Send(peer, m.Lease(message.request, start, stop)))

    def _release_barriers(self, effects: list[Effect]) -> None:
        live = {w.slot for w in self.workers.values() if not w.gone}
        for name, entered in list(self._barriers.items()):
            if live <= set(entered):
                effects.extend(Send(peer, m.Ack(request, 0)) for peer, request in entered.values())
                del self._barriers[name]

    def _log(self, message: m.LogMetrics, effects: list[Effect]) -> None:
        numbers = {k: float(v) for k, v in message.values.items() if isinstance(v, (int, float))}
        self.latest.update(numbers)
        effects.append(LogRow({**numbers, "worker": message.slot, "clock": message.clock}))

    # ------------------------------------------------------------ snapshots

    def _clock_ahead(self) -> int:
        """A clock that no shard should have reached when the request arrives.

        It is a few reports' pace away, and farther after each attempt that came too late.
        """
        clocks = [s.report.get("round", 0) for s in self.shards.values()]
        pace = max((s.report.get("rounds_per_report", 0) for s in self.shards.values()), default=0)
        return int(max(clocks, default=0) + 3 * pace + self._margin)

    def _manifest(self) -> dict[str, Any]:
        assert self.model is not None
        facts = self.facts
        epoch, done = self.data_position()
        clocks = [w.progress.clock for w in self.workers.values() if w.progress]
        return {
            "format": 1,
            "job": facts.job,
            "mode": str(facts.mode),
            "seed": facts.seed,
            "clock": max(clocks, default=facts.clock),
            "shards": facts.shards,
            "chunk_bytes": facts.chunk_bytes,
            "model": self.model.to_wire(),
            "data": {"epoch": epoch, "done": [list(span) for span in merge(done)]},
            "synchronous": facts.mode.synchronous,
        }
