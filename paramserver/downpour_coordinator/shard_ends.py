"""What the end of a shard's process means: its backup leads, it comes back alone, or the whole job begins again.

Functions over a :class:`Lifecycle`, whose work they do. What is decided between leader and backup stands in
:mod:`downpour_coordinator.standby`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from downpour_common import exitcodes
from downpour_coordinator.checkpointing import RETRY_S
from downpour_coordinator.effects import Effect, FindShardCheckpoint, ForgetSnapshot
from downpour_coordinator.phases import REPLICATED, Phase
from downpour_coordinator.processes import Failure, Process, explain

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle


def judge_shard(life: Lifecycle, process: Process, now_s: float, effects: list[Effect]) -> None:
    """What the end of a shard's process means."""
    failure = explain(process, False, None, life.spec.script)
    if life.spec.replication > 1 and life.phase in REPLICATED:
        if was := life.standby.ended(life.training, process, failure.message, now_s, effects):
            if was == "leader":
                _give_up_snapshot(life, process, now_s, effects)
            return
        failure = replace(failure, index=process.index % life.spec.shards)
    saving = life.phase is Phase.SAVING and not life._committed and not life._keep
    if life.phase in (Phase.STARTING, Phase.TRAINING) or (saving and life._can_spend(failure, now_s)):
        alone = not life.training.facts.mode.synchronous and life.training.begun and life._newest > life._floor
        if alone and life._can_spend(failure, now_s):
            _recover(life, process, failure, now_s, effects)
        else:
            life._begin_again(failure, now_s)


def _recover(life: Lifecycle, process: Process, failure: Failure, now_s: float, effects: list[Effect]) -> None:
    """A shard alone comes back from the last checkpoint; the others go on."""
    life._spend(process, failure, "it comes back from the last checkpoint", now_s)
    _give_up_snapshot(life, process, now_s, effects)
    life.training.shard_lost(process.index % life.spec.shards, life.roster.succeed(process, now_s).epoch)
    life._sought_s = float("-inf")


def _give_up_snapshot(life: Lifecycle, process: Process, now_s: float, effects: list[Effect]) -> None:
    """It has ended with a part of the snapshot under way."""
    if drop_snapshot(life, effects):
        life.checkpoints.wait_from(now_s)
        life.checkpoints.wish(f"after {process.name} {process.epoch}")
        life._awaited = 0
    if life.phase is Phase.SAVING:
        life._since_s = now_s


def drop_snapshot(life: Lifecycle, effects: list[Effect]) -> bool:
    """The snapshot under way, if there is one, is not to count."""
    number = life.training.snapshot
    if number:
        life.training.abandon_snapshot()
        effects.append(ForgetSnapshot(number))
    return bool(number)


def seek(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """See to it that shards come back."""
    for shard in life.training.recovering():
        process = life.processes["server", shard.process]
        limit_s = life.spec.settings.start_timeout_s
        late = process.waited_s(now_s) > limit_s
        if shard.error or (late and process.state == "pending"):
            message = shard.error or f"has had no place for {limit_s:g} s"
            reason = "NOT_STARTED" if shard.error else "START_TIMEOUT"
            failure = Failure("server", shard.index, exitcodes.FAILED, message, reason=reason)
            life._begin_again(failure, now_s, paid=True)
            return
        if late and process.running and process.stop is None:
            process.stop = life.spec.settings.grace_s
            life.warnings.append(f"{process.name} has not come back within {limit_s:g} s")
    waiting = tuple(s.index for s in life.training.recovering() if not s.checkpoint)
    if waiting and not life._committing and now_s - life._sought_s > RETRY_S:
        life._sought_s = now_s
        effects.append(FindShardCheckpoint(life._floor, waiting))
