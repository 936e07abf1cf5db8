"""The shard's process: a thin loop around :class:`downpour_server.shard.Shard`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from downpour_common import messages as m
from downpour_common import sharing
from downpour_common.errors import ConfigError, DownpourError, PeerTimeout, ProtocolError
from downpour_common.layout import ModelSpec, plan
from downpour_common.modes import parse_mode
from downpour_common.process import keep_freed_memory
from downpour_common.quick_start import defer_compiler
from downpour_common.transport import ClientTransport, ServerTransport
from downpour_server.config import ShardConfig
from downpour_server.restore import restore
from downpour_server.rules import RULES
from downpour_server.shard import Attach, Effect, Identity, Reply, SendWeights, Shard
from downpour_server.snapshot import WriteSnapshot, write

IDLE_S = 0.02
"""Longest wait for data before the control channel is looked at."""
REPORT_S = 0.5
TICK_S = 1.0


class ShardService:
    """Serves one shard until told to stop. ``clock`` gives seconds and is only compared with itself."""

    def __init__(
        self,
        config: ShardConfig,
        data: ServerTransport,
        control: ClientTransport,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._data = data
        self._control = control
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, "snapshot")
        self._writing: list[tuple[WriteSnapshot, Future[dict[str, Any]]]] = []
        self._shard: Shard | None = None
        self._stop = False

    def run(self) -> None:
        """Register, take the set-up, serve; returns when the coordinator says stop.

        Raises :class:`PeerTimeout` when the set-up does not come in time.
        """
        config = self._config
        register = m.RegisterShard(config.job, config.shard, config.shard_epoch, os.getpid(), self._data.address)
        self._control.send(config.coordinator, register)
        started_s = last_tick_s = last_report_s = self._clock()
        try:
            while not self._stop:
                self._take_data()
                self._take_control()
                self._report_written()
                now_s = self._clock()
                if self._shard is None:
                    if now_s - started_s > config.start_timeout_s:
                        raise PeerTimeout("coordinator", "the model of worker/0", config.start_timeout_s)
                    continue
                if now_s - last_tick_s > TICK_S:
                    last_tick_s = now_s
                    self._carry_out(self._shard.tick(now_s))
                if now_s - last_report_s > REPORT_S:
                    last_report_s = now_s
                    self._report()
        finally:
            self._writer.shutdown()

    def _take_data(self) -> None:
        for peer, message in self._data.poll(IDLE_S):
            if self._shard is None:
                continue
            try:
                effects = self._shard.handle(peer, message, self._clock())
            except ProtocolError:
                self._data.malformed += 1
            else:
                self._carry_out(effects)

    def _take_control(self) -> None:
        for _, message in self._control.poll(0):
            match message:
                case m.SetUpShard():
                    self._set_up(message)
                case m.TakeSnapshot() if self._shard is not None:
                    self._carry_out(self._shard.snapshot(message.snapshot, message.folder, message.at_clock))
                case m.StopShard():
                    self._report()
                    self._stop = True
                case _:
                    pass  # repeats of what was said before the shard was ready

    def _set_up(self, message: m.SetUpShard) -> None:
        config = self._config
        if self._shard is not None:
            return
        error = ""
        try:
            model = ModelSpec.from_wire(message.model)
            if model.rule and model.rule not in RULES:
                raise ConfigError(f"no update rule is called {model.rule!r}; known: {', '.join(RULES)}")
            layout = plan(model, config.shards, config.chunk_bytes)
            identity = Identity(config.job, config.shard, config.shard_epoch)
            shard = Shard(identity, layout, parse_mode(config.mode), config.workers, config.timeout_s)
            if message.resume:
                shard.start_from(restore(message.resume, layout, shard.chunks))
            self._shard = shard
        except DownpourError as problem:
            error = str(problem)
        self._control.send(config.coordinator, m.ShardReady(config.shard, error))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply():
                    self._data.send(effect.peer, effect.message)
                case SendWeights():
                    stored = effect.stored
                    message = m.Weights(effect.request, stored.chunk.index, stored.version, stored.payload())
                    stored.being_read(self._data.send(effect.peer, message))
                case WriteSnapshot():
                    self._begin_writing(effect)
                case Attach():
                    self._attach(effect)

    def _attach(self, effect: Attach) -> None:
        assert self._shard is not None
        offer = effect.offer
        memory = sharing.attach(self._shard.shared_layout, offer.pid, offer.fd, offer.nonce)
        self._carry_out(self._shard.attached(effect, memory))

    def _begin_writing(self, effect: WriteSnapshot) -> None:
        if effect.error:
            taken = m.SnapshotTaken(effect.shard, effect.snapshot, effect.error, {})
            self._control.send(self._config.coordinator, taken)
        else:
            self._writing.append((effect, self._writer.submit(write, effect)))

    def _report_written(self) -> None:
        for effect, future in [pair for pair in self._writing if pair[1].done()]:
            self._writing.remove((effect, future))
            error, document = "", {}
            try:
                document = future.result()
            except (DownpourError, OSError) as problem:
                error = str(problem)
            taken = m.SnapshotTaken(effect.shard, effect.snapshot, error, document)
            self._control.send(self._config.coordinator, taken)

    def _report(self) -> None:
        if self._shard is not None:
            report = m.ShardReport(self._config.shard, self._shard.stats.document())
            self._control.send(self._config.coordinator, report)


def use_this_process(threads: int) -> None:
    """Settle memory and threads of a process that is a shard and nothing else."""
    keep_freed_memory()
    defer_compiler()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
