"""From the training to its end: the last checkpoint, the workers that leave, the shards that close.

What a :class:`Lifecycle` does in the phases KEEPING, LEAVING, SAVING and CLOSING, as functions over it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from downpour_common import exitcodes
from downpour_coordinator.effects import Effect, Export
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure
from downpour_coordinator.shard_ends import drop_snapshot, seek

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle

KEEP_S = 5.0
"""Time that an interrupted job is given for its last checkpoint: with ``grace_s`` it has ended in 10 s."""
SAVES = 3
"""Attempts to write the last checkpoint, which holds the result."""
CLOSE_S = 5.0
"""Time that shards are given to end by themselves."""
TELL_S = 0.1
"""Time between telling workers that the job ends and ending them."""
CANCEL_GRACE_S = 3.0
"""Most time between SIGTERM and SIGKILL in a job that is cancelled."""


def keep_position(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """Interrupted: a checkpoint while the workers still run, so that in sync all shards are at one clock."""
    running = any(p.running for p in life.roster.workers())
    if life._kept:
        life.warnings.append(f"interrupted; go on with --resume {life.spec.out or life.job}")
        life._enter(Phase.LEAVING, now_s)
    elif not running and all(p.code == 0 for p in life.roster.workers()):
        life.warnings.append("interrupted, but every script had ended well by then")
        life.trained_s = life.trained_s or now_s
        life._keep = False
        life._enter(Phase.SAVING, now_s)
    elif not running or now_s - life._since_s > KEEP_S or _leaderless(life):
        life._enter(Phase.LEAVING, now_s)
    elif life._awaited:
        life.checkpoints.repeat(life.training, now_s, effects)
    elif life.checkpoints.may_retry(now_s):
        life._awaited = life.checkpoints.begin(life.training, now_s, effects)


def leave(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """The workers end; then comes the last checkpoint of an interrupted job, if there is none yet."""
    if life.failure is not None:
        drop_snapshot(life, effects)  # workers leave in the middle of rounds, which must not be gone back to
    if life._to_tell:  # so that a script which gets SIGTERM does not try to leave a job that ends in good order
        effects.extend(life.training.ask_to_stop(life._to_tell))
        life._to_tell, life._told_s = "", now_s
    if now_s - life._told_s < TELL_S:
        return
    if not life.roster.stop(life.roster.workers(), grace_s(life)):
        return
    keep = life._keep and not life._kept and life.failure is None and life.training.begun
    life._enter(Phase.SAVING if keep else Phase.CLOSING, now_s)


def save(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """The last checkpoint, of what the workers have left at the shards."""
    limit_s = KEEP_S if life._keep else life.spec.settings.timeout_s
    error = ""
    coming = {s.index for s in life.training.away()}
    if coming and not life._committed:
        seek(life, now_s, effects)
        if life.phase is not Phase.SAVING:
            return
    if not life._committed and _leaderless(life, coming):
        error = "a shard is gone"
    elif not life._committed and now_s - life._since_s > limit_s:
        error = f"the shards did not answer within {limit_s:g} s"
    elif (coming and not life._committed) or not (life._awaited or life.checkpoints.may_retry(now_s)):
        pass  # soon
    elif not life._awaited:
        life._awaited = life.checkpoints.begin(life.training, now_s, effects, final=True)
        if not life._awaited:
            life._ended_well = not life._keep
            life._enter(Phase.LEAVING if not life._keep else Phase.CLOSING, now_s)
            return
    else:
        life.checkpoints.repeat(life.training, now_s, effects)
    if error:
        life.training.abandon_snapshot()
        snapshot_over(life, error, now_s, effects)


def _leaderless(life: Lifecycle, coming: Collection[int] = ()) -> bool:
    """Whether a shard is gone for good."""
    shards = life.training.shards.values()
    return any(not life.processes["server", s.process].running and s.index not in coming for s in shards)


def snapshot_over(life: Lifecycle, error: str, now_s: float, effects: list[Effect]) -> None:
    """The snapshot that the phase waits for has been committed, or will not be."""
    number, life._awaited = life._awaited, 0
    if life.phase is Phase.KEEPING:
        life._kept = not error
    elif life.phase is Phase.SAVING and life._keep:
        told = f"no checkpoint was made at the interruption: {error}"
        life.warnings.append(told if error else f"interrupted; go on with --resume {life.spec.out or life.job}")
        life._kept = not error
        life._enter(Phase.CLOSING, now_s)
    elif life.phase is Phase.SAVING:
        if error and number and life._saves < SAVES:
            life._saves, life._committed = life._saves + 1, False  # and again, after a moment
        elif error:
            result_lost(life, error)
            life._enter(Phase.LEAVING, now_s)
        else:
            life._enter(Phase.EXPORTING, now_s)
            effects.append(Export(number))


def result_lost(life: Lifecycle, error: str) -> None:
    """The job fails: there is no result of a training that was done."""
    message = f"training ended well, but its result could not be written: {error}"
    life.failure = Failure("run", -1, exitcodes.IO_ERROR, message, reason="RESULT_NOT_WRITTEN")


def close(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """The shards end by themselves, with a last report."""
    ready = life.training.servers_ready()
    waited_for = [p for p in life.roster.servers() if p.running and p.index in ready]
    if now_s - life._asked_s > 1.0:
        life._asked_s = now_s
        effects.extend(life.training.stop_shards())
    hasty = life.failure is not None or life.interrupted == "CANCELLED"
    if not waited_for or hasty or now_s - life._since_s > CLOSE_S:
        life._enter(Phase.ENDING, now_s)


def grace_s(life: Lifecycle) -> float:
    """Time between SIGTERM and SIGKILL for what is ended now."""
    if life._hurry:
        return 0.0
    grace_s = life.spec.settings.grace_s
    return min(grace_s, CANCEL_GRACE_S) if life.interrupted == "CANCELLED" else grace_s
