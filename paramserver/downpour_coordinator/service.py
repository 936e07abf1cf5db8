"""What a job asks of the world, carried out: messages sent, metrics and checkpoints written, the model exported."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, TextIO

from downpour_common import failpoints
from downpour_common import messages as m
from downpour_common.config import to_toml
from downpour_common.errors import CheckpointError, ConfigError, DownpourError
from downpour_common.messages import Message
from downpour_common.tensorfile import write_atomically
from downpour_common.transport import Peer
from downpour_coordinator import checkpoints
from downpour_coordinator.copies import Copies
from downpour_coordinator.effects import (
    Effect,
    Export,
    FindCheckpoint,
    FindShardCheckpoint,
    ForgetSnapshot,
    LogRow,
    Prune,
    Send,
    SpecChanged,
    StorePart,
    StoreSpans,
)
from downpour_coordinator.export import export_model
from downpour_coordinator.facts import facts_for
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.spans import SpanFile

SendMessage = Callable[[Peer, Message], object]
Later = Callable[[Callable[[], Any], Callable[[Any], None]], None]
"""``later(work, done)``: run ``work`` where it may take its time, then ``done(result)`` in the loop's thread."""


def at_once(work: Callable[[], Any], done: Callable[[Any], None]) -> None:
    """The simplest :data:`Later`."""
    done(work())


class JobService:
    """Carries out what one job's :class:`Lifecycle` decides. ``metrics`` takes one JSON object per line.

    ``out`` is the job's folder. Sends go through ``send``; file work that may take long through ``later``.
    """

    def __init__(
        self,
        job: Lifecycle,
        out: str,
        send: SendMessage,
        metrics: TextIO,
        clock: Callable[[], float] = time.monotonic,
        later: Later = at_once,
    ) -> None:
        self.job = job
        self.out = out
        self.problems: list[str] = []
        self._send = send
        self._metrics = metrics
        self._clock = clock
        self._later = later
        self._spans = SpanFile(out)
        self.copies: Copies | None = None
        """at the job's ``checkpoint_url``"""
        settings = job.spec.settings
        if settings.checkpoint_url:
            self.copies = Copies(out, settings.checkpoint_url, settings.keep_checkpoints, job.job)
            job.checkpoints.copies = self.copies.state
            if not job.over and (held := checkpoints.committed(out)):
                self.copies.offer(held[-1])

    def take(self, peer: Peer, message: Message) -> bool:
        """A message of one of the job's processes, or of a user; False when it makes no sense."""
        if isinstance(message, m.CheckpointNow | m.SetJob):
            self._send(peer, self._wished(message))
            return True
        try:
            effects = self.job.handle(peer, message, self._clock())
        except DownpourError:
            return False
        self.carry_out(effects)
        return True

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the job asked for."""
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect.peer, effect.message)
                case LogRow():
                    self._log(effect)
                case CommitSnapshot():
                    self._commit(effect)
                case SnapshotFailed():
                    self.carry_out(self.job.snapshot_done(effect.number, effect.reason, self._clock()))
                case StorePart():
                    self._store(effect)
                case StoreSpans():
                    self._send(effect.peer, self._spans.answer(effect.spans, self.problems))
                case Export():
                    self._export(effect)
                case ForgetSnapshot():
                    checkpoints.remove(self.out, effect.number)
                case Prune():
                    checkpoints.prune(self.out, effect.keep)
                case FindCheckpoint():
                    self._later(
                        self._newest, lambda facts: self.carry_out(self.job.checkpoint_found(facts, self._clock()))
                    )
                case FindShardCheckpoint():
                    self._find_for(effect)
                case SpecChanged():
                    self._describe()

    def _wished(self, message: m.CheckpointNow | m.SetJob) -> Message:
        if message.job != self.job.job:
            return m.Refused(message.request, m.Refusal.WRONG_JOB.value, f"there is no job {message.job}")
        try:
            if isinstance(message, m.SetJob):
                return m.Reply(message.request, self.job.change(message.token, message.assignments))
            return m.Reply(message.request, self.job.checkpoint_now(message.token))
        except ConfigError as error:
            return m.Refused(message.request, m.Refusal.UNUSABLE.value, str(error))

    def _describe(self) -> None:
        """``job.toml``, as one could submit it again: relative paths in a job file are below its own folder."""
        spec = self.job.spec
        if self.job.checkpoints.base:  # of `downpour run`; a cluster's job has its code in a bundle
            spec = spec.model_copy(update={"script": os.path.abspath(spec.script)})
        path = os.path.join(self.out, "job.toml")
        try:
            write_atomically(path, lambda file: file.write(to_toml(spec).encode()))
        except OSError as error:
            self.problems.append(f"{path} was not written: {error.strerror or error}")

    def _find_for(self, effect: FindShardCheckpoint) -> None:
        def done(found: tuple[int, tuple[str, ...]]) -> None:
            self.carry_out(self.job.shard_checkpoint_found(found[0], effect.shards, found[1], self._clock()))

        self._later(lambda: checkpoints.newest_for(self.out, effect.after, effect.shards), done)

    def _log(self, effect: LogRow) -> None:
        try:
            self._metrics.write(json.dumps(_plain(effect.row), allow_nan=False) + "\n")
        except OSError as error:
            if not self.problems:  # a full disk does not stop the training
                self.problems.append(f"metrics were lost: {error.strerror or error}")

    def _commit(self, effect: CommitSnapshot) -> None:
        def work() -> str:
            try:
                failpoints.hit("coordinator.commit.before")
                checkpoints.commit(os.path.join(self.out, effect.folder), effect.manifest)
                failpoints.hit("coordinator.commit.after")
            except (DownpourError, OSError) as error:
                return str(error)
            return ""

        def done(error: str) -> None:
            if self.copies is not None and not error:
                self.copies.offer(effect.number)
            self.carry_out(self.job.snapshot_done(effect.number, error, self._clock()))

        self._later(work, done)

    def _export(self, effect: Export) -> None:
        path = os.path.join(self.out, "model.safetensors")
        folder = checkpoints.folder_of(self.out, effect.number)

        def work() -> str:
            try:
                export_model(checkpoints.load(folder), path)
            except CheckpointError as problem:
                return f"{problem}. The weights are safe in {folder}; make room and run again with --resume"
            return ""

        def done(error: str) -> None:
            self.carry_out(self.job.exported("" if error else path, error, self._clock()))

        self._later(work, done)

    def _newest(self) -> Any:
        """The facts of a job that goes on from its newest sound checkpoint, or begins again."""
        job = self.job
        try:
            found, _ = checkpoints.newest(self.out)
        except CheckpointError:
            return job.origin
        folder = job.checkpoints.folder(int(os.path.basename(found.folder)))
        return facts_for(job.job, job.spec, found.manifest, folder)

    def _store(self, effect: StorePart) -> None:
        """Part of a shard's file; what is held is the answer, so a gap or a repeat heals itself."""
        part = effect.part
        folder = checkpoints.folder_of(self.out, part.snapshot)
        path = os.path.join(folder, f"shard-{part.shard}.safetensors")
        answer: Message
        try:
            failpoints.hit("coordinator.part.before")
            os.makedirs(folder, exist_ok=True)
            with open(path, "ab") as file:
                held = file.tell()
                if held == part.offset:
                    file.write(part.payload)
                    held = file.tell()
            answer = m.Ack(part.request, held)
        except OSError as error:
            answer = m.Refused(part.request, m.Refusal.CHECKPOINT.value, f"{path}: {error.strerror or error}")
        self._send(effect.peer, answer)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity; they become strings."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
