"""What shards and their backups say: how far they are, and their reports.

Functions over a :class:`Training`, whose work they do. What is decided between leader and backup stands in
:mod:`downpour_coordinator.replicas`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from downpour_common import messages as m
from downpour_common.transport import Peer
from downpour_coordinator.answers import minimise
from downpour_coordinator.effects import LogRow, Send, TrainingEffect
from downpour_coordinator.membership import answer_waiting, members_message, set_members
from downpour_coordinator.participants import ShardEntry, Worker
from downpour_coordinator.replicas import Backup, ask_again, caught_up, introduce
from downpour_coordinator.reports import check_report

if TYPE_CHECKING:
    from downpour_coordinator.training import Training


def heard(
    training: Training,
    shard: ShardEntry,
    effects: list[TrainingEffect],
    ready: bool = False,
    error: str = "",
    members: int = 0,
) -> None:
    """A shard has said how far it is, in an answer or a report."""
    served, had = shard.serves, (shard.ready, shard.members)
    if error and not shard.ready:
        if shard.recovers:
            shard.error = error
        else:
            training.setup_error = training.setup_error or f"{training.name_of(shard.process)}: {error}"
    shard.ready = shard.ready or ready
    shard.members = max(shard.members, members)
    if shard.moved and shard.serves and not served:
        moved = m.ShardMoved(shard.index, shard.term, shard.address)
        effects.extend(Send(w.peer, moved) for w in training.workers.values() if w.answered and not w.gone and w.peer)
    if error or had != (shard.ready, shard.members):
        answer_waiting(training, effects)


def moved_since(training: Training, worker: Worker, known: tuple[int, ...], effects: list[TrainingEffect]) -> None:
    """What a worker has not learned of shards that have come back."""
    for shard, epoch in zip(training.shards.values(), known, strict=False):
        if shard.moved and shard.serves and epoch < shard.term and worker.answered and not worker.gone:
            effects.append(Send(worker.peer, m.ShardMoved(shard.index, shard.term, shard.address)))


def take_report(training: Training, shard: ShardEntry, report: dict[str, Any], effects: list[TrainingEffect]) -> None:
    """A leader's report, and what it shows that it has not heard."""
    check_report(report)
    replica = report.get("replica", {})
    if shard.promoting:
        if replica.get("role") == "leader":
            promoted(training, shard, replica.get("term", -1), "", effects)
        effects.extend(ask_again(shard))
    shard.replica = replica
    shard.report = report
    shard.reports += training.begun
    if not shard.address:
        shard.address, shard.pid = str(report.get("address", "")), int(report.get("pid", 0))
    in_force = report.get("members", 0)
    error = str(report.get("error") or "")
    heard(training, shard, effects, ready=bool(report.get("ready")), error=error, members=in_force)
    if shard.members < training._version and shard.ready and not shard.promoting:
        effects.append(Send(shard.peer, members_message(training)))
    effects.extend(introduce(shard, training.backups.get(shard.index)))
    training._minimiser.heard(shard.index)
    minimise(training, effects)


def from_backup(
    training: Training,
    shard: ShardEntry,
    backup: Backup,
    peer: Peer,
    message: m.FromShard | m.SnapshotPart,
    effects: list[TrainingEffect],
) -> None:
    """A message of a process that follows."""
    backup.peer = peer
    match message:
        case m.RegisterShard():
            backup.address, backup.pid = message.address, message.pid
            if training.model is not None:
                effects.append(Send(peer, m.SetUpShard(training.model.to_wire(), "")))
        case m.ShardReady():
            backup.ready, backup.error = not message.error, message.error
        case m.ShardReport():
            check_report(message.document)
            backup.replica = message.document.get("replica", {})
            backup.ready = backup.ready or bool(message.document.get("ready"))
            if not backup.address:
                backup.address = str(message.document.get("address", ""))
                backup.pid = int(message.document.get("pid", 0))
            if caught_up(shard, backup):
                effects.append(LogRow({"backup": training.name_of(backup.process), "term": shard.term}))
                answer_waiting(training, effects)
    effects.extend(introduce(shard, backup))


def promoted(training: Training, shard: ShardEntry, term: int, error: str, effects: list[TrainingEffect]) -> None:
    """A process that has followed leads now, or says why not; the workers hear of it once it has the members."""
    if not shard.promoting or (error == "" and term != shard.term):
        return
    if error:
        shard.error = error
        return
    shard.promoting, shard.since = False, training._version + 1
    set_members(training, effects)
    effects.extend(introduce(shard, training.backups.get(shard.index)))
