"""A job that starts and trains: who has joined, who is late, when a checkpoint is due.

What a :class:`Lifecycle` does in the phases STARTING and TRAINING, as functions over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour_common import exitcodes
from downpour_coordinator.effects import Effect
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure
from downpour_coordinator.shard_ends import seek
from downpour_coordinator.spares import silent_spares
from downpour_coordinator.worker_ends import consequences

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle

NO_PLACE_S = 10.0
"""Time that a worker which is to take over waits for a place, before a job that can do with fewer does so."""


def start(life: Lifecycle, now_s: float) -> None:
    """Until the first step, or until somebody has been missing for too long."""
    if life.training.begun:
        life.first_step_s = life.first_step_s or now_s
        life.checkpoints.wait_from(now_s)
        life._trains_s = now_s
        life._have_one_soon()
        life._enter(Phase.TRAINING, now_s)
        for slot in range(life.training.facts.workers, life.wanted):
            life._want_worker(slot, now_s)
    elif not life.pending() and now_s - life._since_s > life.spec.settings.start_timeout_s:
        names = ", ".join(life.training.waiting_for()) or "the servers to take the model"
        message = f"after {now_s - life._since_s:.0f} s still waiting for {names}"
        life._fail(Failure("run", -1, exitcodes.FAILED, message, reason="START_TIMEOUT"), now_s)


def train(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """One look: whether the job is done or changed, who is late or missing, whether a checkpoint is due."""
    settings = life.spec.settings
    if life.training.clock() > life.training.facts.clock:
        life.changes.settled()
    if life.changes.wish and (wish := life.checkpoints.wish(life.changes.wish)).committed:
        life.changes.leave(wish.number)
        life._to_tell = "changed"
        life._enter(Phase.LEAVING, now_s)
        return
    life.checkpoints.failures_seen(life.restarts, now_s - (life.first_step_s or now_s))
    consequences(life, now_s)
    seek(life, now_s, effects)
    if life.phase is not Phase.TRAINING:
        return
    joined = {w.slot for w in life.training.workers.values() if w.answered}
    taking_over = {w.slot for w in life.training.workers.values() if w.takes_over and not w.answered}
    if not any(p.state != "ended" and p.index in joined | taking_over for p in life.roster.workers()):
        if any(all(mate.code == 0 for mate in life.roster.mates(p)) for p in life.roster.workers()):
            life.trained_s = now_s
            life.changes.settled()
            life.training.turn_away()
            life._enter(Phase.SAVING, now_s)
            return
        if not any(p.state != "ended" for p in life.roster.workers()):
            life._fail(Failure("run", -1, exitcodes.FAILED, "no worker is left", reason="BELOW_MIN"), now_s)
            return
    for process in silent_spares(life.training, life.roster, life._signs, now_s):
        words = "has not been heard of, and all others have ended: the job ends without it"
        life.warnings.append(f"{process.title} {words} (mode {life.spec.mode})")
        life._let_go(process, replace=False)
        life.roster.stop(life.roster.mates(process), settings.grace_s)
    for process in life.roster.workers():
        late = now_s - process.since_s > settings.start_timeout_s
        if process.leaving and process.stop is None and process.index in joined and process.running:
            life._let_go(process, replace=False)  # it has taken over from one that was to leave
        if process.running and process.index not in joined and late and process.stop is None:
            mates = life.roster.mates(process)
            absent = [p.name for p in mates if life.training.workers[p.index].pid == 0] or [process.title]
            life.roster.stop(mates, settings.grace_s)
            life.warnings.append(f"{', '.join(absent)} has not joined within {settings.start_timeout_s:g} s")
    waiting_s = max((now_s - p.since_s for p in life.roster.workers() if p.state == "pending"), default=0.0)
    enough = len(joined & {p.index for p in life.roster.staying()}) >= life.fewest
    stranded_s = max((p.waited_s(now_s) for p in life.roster.pending() if p.index in taking_over), default=0.0)
    if stranded_s > (NO_PLACE_S if life.fewest < life.wanted else settings.start_timeout_s) and life.last_failure:
        life._begin_again(life.last_failure, now_s, paid=True)
    elif waiting_s > settings.start_timeout_s and not enough and not taking_over:
        message = f"fewer than {life.fewest} workers, and no place for more within {settings.start_timeout_s:g} s"
        life._fail(Failure("run", -1, exitcodes.FAILED, message, reason="BELOW_MIN"), now_s)
    elif life.checkpoints.due(now_s) and life.training.paced and not life.training.snapshot:
        life.checkpoints.begin(life.training, now_s, effects)
    else:
        life.checkpoints.repeat(life.training, now_s, effects)
