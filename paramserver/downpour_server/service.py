"""The shard's process: a thin loop around :class:`downpour_server.shard.Shard`."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from downpour_common import failpoints, sharing
from downpour_common import messages as m
from downpour_common.compensation import parse_compensation
from downpour_common.compression import parse_compression
from downpour_common.errors import DownpourError, PeerTimeout, ProtocolError
from downpour_common.layout import ModelSpec, plan
from downpour_common.modes import parse_mode
from downpour_common.process import keep_freed_memory
from downpour_common.quick_start import defer_compiler
from downpour_common.transport import ClientTransport, ServerTransport
from downpour_server.config import ShardConfig
from downpour_server.effects import Attach, Effect, Reply, SendKept, SendWeights, Tell
from downpour_server.keeper import SnapshotKeeper
from downpour_server.recover import recover
from downpour_server.replication import Replication
from downpour_server.restore import restore
from downpour_server.rules import check_rule
from downpour_server.shard import Identity, Shard
from downpour_server.snapshot import WriteSnapshot

IDLE_S = 0.02
"""Longest wait for data before everything else gets its turn."""
CONTROL_S = 0.005
"""While data keep coming: time between two looks at everything else, each of which costs as much as a small update."""
NEXT_S, COMMANDS_S = 0.001, 0.1
"""Mode lbfgs: commands come one after the other, so for so long after one the wait for data is as short as this."""
REPORT_S = 0.5
REGISTER_S = 2.0
"""Time between two registrations, until the set-up comes."""
TICK_S = 1.0
ONE_THREAD_BYTES = 512 << 10
"""Where all chunks are smaller, starting further threads takes longer than the arithmetic."""


class ShardService:
    """Serves one shard until told to stop. ``clock`` gives seconds and is only compared with itself.
    ``set_up``: told the shard once it is there. ``connect``: gives a transport to another replica. ``computed``:
    seconds that this process has computed, if it is a shard and nothing else.

    The coordinator may be away for any time: what it must learn is in every report, and what it asks twice is
    answered twice and done once.
    """

    def __init__(
        self,
        config: ShardConfig,
        data: ServerTransport,
        control: ClientTransport,
        clock: Callable[[], float] = time.monotonic,
        set_up: Callable[[Shard], None] = lambda _: None,
        connect: Callable[[], ClientTransport] | None = None,
        computed: Callable[[], float] | None = None,
    ) -> None:
        self._config = config
        self._announce = set_up
        self._data = data
        self._control = control
        self._clock = clock
        self._keeper = SnapshotKeeper(config, self._tell)
        self._connect = connect or (lambda: control)
        self._replication: Replication | None = None
        self._computed = computed
        self._began: tuple[float, float] | None = None
        """what it had computed, and when, at its first report with a model"""
        self._error = ""
        self._members: m.SetMembers | None = None
        self._commanded_s = float("-inf")
        self._stop = False

    def run(self) -> None:
        """Register, take the set-up, serve; returns when the coordinator says stop.

        Raises :class:`PeerTimeout` when the set-up does not come in time.
        """
        config = self._config
        started_s = last_tick_s = last_report_s = registered_s = looked_s = self._clock()
        self._register()
        try:
            while not self._stop:
                replication = self._replication
                follows = replication is not None and replication.follows
                busy = replication.take(IDLE_S) if replication is not None and follows else self._take_data()
                now_s = self._clock()
                if busy and self._shard is not None and now_s - looked_s < CONTROL_S:
                    continue
                looked_s = now_s
                self._take_control()
                if self._shard is None and not self._error:
                    if now_s - started_s > config.start_timeout_s:
                        raise PeerTimeout("coordinator", "the model of worker/0", config.start_timeout_s)
                    if now_s - registered_s > REGISTER_S:
                        registered_s = now_s
                        self._register()
                    continue
                self._keeper.turn(now_s)
                if replication is not None:
                    replication.turn(now_s)
                    if replication.leader is not None and now_s - last_tick_s > TICK_S:
                        last_tick_s = now_s
                        self._carry_out(replication.after(replication.shard.tick(now_s)))
                if now_s - last_report_s > REPORT_S:
                    last_report_s = now_s
                    self._report()
        finally:
            self._keeper.close()
            if self._replication is not None:
                self._replication.close()

    @property
    def _shard(self) -> Shard | None:
        return None if self._replication is None else self._replication.shard

    def _tell(self, message: m.Message) -> None:
        self._control.send(self._config.coordinator, message)

    def _identity(self) -> tuple[str, int, int]:
        return self._config.job, self._config.index, self._config.shard_epoch

    def _register(self) -> None:
        self._tell(m.RegisterShard(*self._identity(), os.getpid(), self._data.address))

    def _take_data(self) -> bool:
        """Whether there was any."""
        arrived = self._data.poll(NEXT_S if self._clock() - self._commanded_s < COMMANDS_S else IDLE_S)
        replication = self._replication
        for peer, message in arrived:
            if replication is None or replication.leader is None:
                continue
            if failpoints.on:
                self._fail("shard.receive", "shard.apply.before", message)
            if isinstance(message, (m.Replicated, m.Fenced)):
                self._carry_out(replication.heard(peer, message))
                continue
            self._carry_out(replication.before(message))
            try:
                effects = replication.shard.handle(peer, message, self._clock())
            except ProtocolError:
                self._data.malformed += 1
            else:
                if failpoints.on:
                    self._fail("", "shard.apply.after", message)
                self._carry_out(replication.after(effects))
        return bool(arrived)

    @staticmethod
    def _fail(always: str, contributed: str, message: m.Message) -> None:
        failpoints.hit(always)
        if isinstance(message, m.Contribution):
            failpoints.hit(contributed)

    def _take_control(self) -> None:
        for _, message in self._control.poll(0):
            match message:
                case m.SetUpShard():
                    self._set_up(message)
                    self._tell(m.ShardReady(*self._identity(), self._error))
                case m.SetMembers():
                    self._set_members(message)
                case m.SetBackup() | m.Follow() | m.Promote() if self._replication is not None:
                    self._carry_out(self._replication.told(message))
                case m.TakeSnapshot() if self._replication is not None and self._replication.leader is not None:
                    if self._keeper.asked(message):
                        shard = self._replication.shard
                        self._carry_out(shard.snapshot(message.snapshot, message.folder, message.at_clock))
                case m.VectorOps() if self._shard is not None:
                    self._compute(self._shard, message)
                case m.Ack() | m.Refused():
                    self._keeper.received(message, self._clock())
                case m.StopShard():
                    if self._shard is not None or self._error:
                        self._report()
                    self._stop = True
                case _:
                    pass  # a snapshot of a shard that holds nothing yet: it is asked for again

    def _compute(self, shard: Shard, command: m.VectorOps) -> None:
        """Mode lbfgs: what the coordinator wants computed with vectors."""
        self._commanded_s = self._clock()
        try:
            done = None if shard.vectors is None else shard.vectors.execute(command)
        except ProtocolError:
            self._control.malformed += 1
            return
        if done is not None:
            attempt, number, gone, results = done
            self._tell(m.VectorsDone(*self._identity(), attempt, number, gone, results))

    def _set_up(self, message: m.SetUpShard) -> None:
        """Once: what comes again is only answered again."""
        config = self._config
        if self._shard is not None or self._error:
            return
        try:
            model = ModelSpec.from_wire(message.model)
            check_rule(model.rule, config.rule, config.script_folder)
            layout = plan(model, config.shards, config.chunk_bytes)
            compensation = parse_compensation(config.compensation)

            def make(term: int) -> Shard:
                identity = Identity(config.job, config.shard, term)
                return Shard(
                    identity,
                    layout,
                    parse_mode(config.mode),
                    config.workers,
                    config.timeout_s,
                    config.push_dtype,
                    config.keep_previous,
                    config.skip_non_finite,
                    measure_noise=config.measure_noise,
                    compensation=compensation,
                    bases=config.bases,
                    warm_start=config.warm_start,
                    compression=parse_compression(config.compress),
                )

            replication = Replication(config, make, self._connect, self._report)
            shard = replication.shard
            if message.recovers:
                clock = recover(config.path(message.resume), config.job, config.shard, layout, shard.chunks)
                shard.recovered(clock if message.clock < 0 else message.clock)
            elif message.resume:
                clock = restore(config.path(message.resume), layout, shard.chunks)
                shard.start_from(clock if message.clock < 0 else message.clock)
            self._replication = replication
            self._announce(shard)
        except DownpourError as problem:
            self._error = str(problem)
            if problem.__cause__ is not None:  # for this process' log
                traceback.print_exception(problem.__cause__)
            return
        if self._members is not None:
            self._set_members(self._members)

    def _set_members(self, message: m.SetMembers) -> None:
        """Before the set-up it is kept."""
        replication = self._replication
        if replication is None:
            if self._members is None or message.version > self._members.version:
                self._members = message
            return
        if replication.leader is None:
            return  # a follower hears of it from its leader
        self._carry_out(replication.before(message))
        try:
            effects = replication.shard.take_members(message)
        except ProtocolError:
            self._control.malformed += 1
            self._carry_out(replication.after([]))
            return
        effects.append(Tell(m.MembersSet(*self._identity(), replication.shard.members_version)))
        self._carry_out(replication.after(effects))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if failpoints.on and isinstance(effect, (Reply, SendKept, SendWeights)):
                passed_on = isinstance(effect, Reply) and isinstance(effect.message, m.Replicate)
                failpoints.hit("shard.replicate.before" if passed_on else "shard.reply.before")
            match effect:
                case Reply():
                    self._data.send(effect.peer, effect.message)
                case SendKept():
                    effect.kept.sent = self._data.send(effect.peer, effect.message)
                case Tell():
                    self._tell(effect.message)
                case SendWeights():
                    stored, previous = effect.stored, effect.previous
                    version = stored.previous_version if previous else stored.version
                    message = m.Weights(effect.request, stored.chunk.index, version, stored.payload(previous))
                    stored.being_read(self._data.send(effect.peer, message), previous)
                case WriteSnapshot():
                    self._keeper.write(effect)
                case Attach():
                    self._attach(effect)

    def _attach(self, effect: Attach) -> None:
        assert self._shard is not None
        offer = effect.offer
        memory = sharing.attach(self._shard.shared_layout(offer.slot), offer.pid, offer.fd, offer.nonce)
        assert self._replication is not None
        self._carry_out(self._replication.after(self._shard.attached(effect, memory)))

    def _load(self, shard: Shard) -> dict[str, Any]:
        """What the gradients are like, and how long this process computes; times in seconds since it has the model."""
        document: dict[str, Any] = {"noise": shard.noise.document()}
        if self._computed is not None:
            cpu_s, now_s = self._computed(), self._clock()
            self._began = self._began or (cpu_s, now_s)
            document |= {"cpu_s": round(cpu_s - self._began[0], 3), "up_s": round(now_s - self._began[1], 3)}
        return document

    def _report(self) -> None:
        """Counters, and all that the coordinator may have missed."""
        shard = self._shard
        document = {
            **(shard.stats.document() | self._load(shard) if shard is not None else {}),
            "ready": shard is not None,
            "error": self._error,
            "initialised": shard is not None and shard.initialised,
            "members": self._replication.members_version if self._replication is not None else 0,
            "snapshot": self._keeper.answered,
            "address": self._data.address,
            "pid": os.getpid(),
            "replica": self._replication.document() if self._replication is not None else {},
        }
        self._tell(m.ShardReport(*self._identity(), document))


def use_this_process(threads: int) -> None:
    """Settle memory and threads of a process that is a shard and nothing else."""
    keep_freed_memory()
    defer_compiler()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def spare_threads(shard: Shard) -> None:
    """Have this process compute with one thread if its chunks are too small for several."""
    if all(stored.chunk.nbytes < ONE_THREAD_BYTES for stored in shard.chunks.values()):
        torch.set_num_threads(1)
