"""What the end of a worker's process means while a job starts or trains: others in its place, or the job's end.

Functions over a :class:`Lifecycle`, whose work they do. A worker takes its replica along; see :attr:`Process.fallen`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from downpour_common import exitcodes
from downpour_coordinator.effects import Effect
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure, Process, explain
from downpour_coordinator.recovery import STUCK_S
from downpour_coordinator.roster import DRAIN_S
from downpour_coordinator.standing import number_of

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle


def judge_worker(life: Lifecycle, process: Process, now_s: float, effects: list[Effect]) -> None:
    """What the end of a worker's process means while the job starts or trains. It takes its replica along."""
    worker = life.training.workers.get(process.index)
    mates = life.roster.mates(process)
    if worker is not None and worker.gone and process.code == 0 and not worker.drained:
        if process.fallen:
            replica_over(life, mates, now_s)
        return
    mine = (process.index, process.epoch)
    reported = next((f for f in life.training.failures if worker and (f.slot, f.worker_epoch) == mine), None)
    failure = explain(process, worker is not None and bool(worker.pid), reported, life.spec.script)
    failure = _cause(life, failure, process, mates)
    left = worker is not None and worker.gone and worker.drained
    synchronous = life.training.facts.mode.synchronous
    in_round = synchronous and worker is not None and not left and (worker.answered or worker.takes_over)
    training = life.phase is Phase.TRAINING and life.training.begun
    alone = len(mates) == 1
    if process.fallen == "over":
        replica_over(life, mates, now_s)
        return
    keeps = not life.spec.compression.remembers  # else what it owed, or had, is lost with it
    in_place = in_round and training and keeps and not any(life.training.workers[p.index].gone for p in mates)
    if in_place and not process.fallen and life._can_spend(failure, now_s):
        _take_over(life, process, mates, failure, now_s)
        return
    if (life.training.begun and not synchronous) or (worker is not None and not left and not in_round):
        for mate in [process] if left else mates:
            effects.extend(life.training.worker_lost(mate.index))  # in sync: it never counted
    if process.fallen or (process.leaving and (left or not process.replace or process.code in (None, 143, -15, -9))):
        if in_round:
            life._begin_again(failure, now_s, paid=process.fallen == "again")
        elif life.roster.stop(mates, DRAIN_S if left else 0.0):
            replica_over(life, mates, now_s)
        return
    replaceable = training and not in_round
    if left:
        failure = replace(failure, message="was asked to leave (SIGTERM) by somebody else", reason="PREEMPTED")
        if life.fewest >= life.wanted:
            failure = replace(failure, details=f"fewer than {life.fewest} workers are left (see --min-workers)")
    others = [p for p in life.roster.staying() if p not in mates]
    if replaceable and life._can_spend(failure, now_s):
        life._spend(process, failure, "it is being replaced" if alone else "its replica is started again", now_s)
        _fell(mates, "again")
    elif replaceable and len(others) >= life.fewest and life.fewest < life.wanted:
        without = "it" if alone else "its replica"
        life.warnings.append(f"{failure.who} {failure.message}; the others go on without {without}")
        _fell(mates, "out")
    else:
        life._fail(failure, now_s)
        return
    if life.roster.stop(mates, DRAIN_S if left else 0.0):
        replica_over(life, mates, now_s)


def _cause(life: Lifecycle, failure: Failure, process: Process, mates: list[Process]) -> Failure:
    """In a replica the end of one rank makes the others raise, and it need not be the first that has ended."""
    epochs = {p.index: p.epoch for p in mates}
    reported = [f for f in life.training.failures if epochs.get(f.slot) == f.worker_epoch]
    lost = {f.slot for f in reported if f.consequence}
    first = next((f for f in reported if not f.consequence), None)
    if failure.reason != "SCRIPT_FAILED" or (first is None and process.index not in lost):
        return failure
    if first is None:
        others = [p for p in mates if p.index not in lost]
        dead = next((p for p in others if p.state == "ended" and p.code != 0), None)
        if dead is not None:
            return explain(dead, True, None, life.spec.script)
        silence = {p.index: life._signs.quiet_s(p, life._now_s) for p in others if p.running}
        stuck = max(silence, key=silence.__getitem__, default=-1)
        if silence.get(stuck, 0.0) > STUCK_S:
            message = f"has not been heard of for {silence[stuck]:.0f} s, and {process.title} waited for it in vain"
            return replace(failure, index=stuck, message=message)
        first = next((f for f in reported if f.consequence == "late"), None)
    if first is None:
        return failure
    return replace(failure, index=first.slot, message=first.error, details=first.traceback.rstrip())


def _fell(mates: list[Process], fate: Literal["again", "out", "over"]) -> None:
    for mate in mates:
        mate.fallen = fate


def replica_over(life: Lifecycle, mates: list[Process], now_s: float) -> None:
    """Once all workers of a replica have ended: others in their places, if they are wanted."""
    if any(p.state != "ended" for p in mates):
        return
    if any(p.fallen == "over" for p in mates):
        for before, after in zip(mates, life.roster.succeed_together(mates, now_s), strict=True):
            after.leaving = before.leaving and not before.replace
            life.training.take_over(after.index, after.epoch)
    elif any(p.fallen == "again" for p in mates):
        for process in life.roster.succeed_together(mates, now_s):
            life.training.expect(process.index, process.epoch)
    elif any(p.leaving and p.replace and not p.fallen for p in mates):
        for process in mates:
            life._want_worker(process.index, now_s)


def _take_over(life: Lifecycle, process: Process, mates: list[Process], failure: Failure, now_s: float) -> None:
    """sync: another process goes on in the round that this worker has died in, or others in the places of its
    replica once all of that have ended; they leave then if they were to."""
    meaning = "another process takes over" if len(mates) == 1 else "others take over its replica"
    life._spend(process, failure, meaning, now_s)
    _fell(mates, "over")
    if life.roster.stop(mates, 0.0):
        replica_over(life, mates, now_s)


def consequences(life: Lifecycle, now_s: float) -> None:
    """What ``on_nan`` says of workers that have sent NaN or Inf."""
    way = life.spec.settings.on_nan
    counts = life.training.non_finite() if way in ("quarantine", "rollback") else {}
    for slot, count in counts.items():
        process = life.processes.get(("worker", slot))
        if count <= life._non_finite.get(slot, 0) or process is None or process.state == "ended" or process.fallen:
            continue
        life._non_finite[slot] = count
        words = "sent NaN or Inf"
        failure = Failure(
            *("worker", slot, exitcodes.FAILED, words), reason="NON_FINITE", host=process.node, ranks=process.ranks
        )
        if way == "rollback":
            life._fail(failure, now_s)
        elif not process.leaving:
            least = life.spec.min_workers or 1
            if len(life.roster.staying()) - process.ranks < least:
                details = f"without it fewer than {number_of(least, 'worker', 's')} would be left"
                life._fail(replace(failure, details=details), now_s)
            else:
                life.wanted -= process.ranks
                life.fewest = min(life.fewest, life.wanted)
                who = "it" if process.ranks == 1 else "its replica"
                life.warnings.append(f"{process.title} {words}; {who} leaves the job (on_nan=quarantine)")
                life._let_go(process, replace=False)
