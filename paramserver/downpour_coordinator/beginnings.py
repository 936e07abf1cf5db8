"""Where a job's processes end, and whether it begins again: after a failure, or with another description.

What a :class:`Lifecycle` does in the phases ENDING and WAITING, as functions over it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from downpour_common.config import JobSpec
from downpour_coordinator.changes import differences
from downpour_coordinator.checkpointing import RETRY_S
from downpour_coordinator.effects import Effect, FindCheckpoint, LogRow, SpecChanged
from downpour_coordinator.ending import grace_s
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure
from downpour_coordinator.recovery import LONG_S, whole_backoff_s

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle


def end(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """All processes end; then the job is over, or waits to begin again."""
    if not life.roster.stop(list(life.processes.values()), grace_s(life)):
        return
    if life.changes.leaving and not life.interrupted:
        _go_on_with(life, life.changes.take(life.spec), now_s, effects)
    elif takes_back(life):
        assert life.failure is not None
        told = _in_words(life.failure)
        before = life.changes.take_back(told)
        life.warnings.append(f"{told}: the change was taken back, and the job goes on as it was")
        life.last_failure, life.failure = life.failure, None
        _go_on_with(life, before, now_s, effects)
    elif will_restart(life):
        assert life.failure is not None
        life.restarts += 1
        life.warnings.append(f"{_in_words(life.failure)}; the job was started again from its last checkpoint")
        life.last_failure, life.failure = life.failure, None
        soon = life.training.begun and now_s - (life._trains_s or now_s) < LONG_S
        life._begun_again = life._begun_again + 1 if soon or not life.training.begun else 1
        life.training = life.training.anew(life.training.facts)
        life._committing = 0
        life._enter(Phase.WAITING, now_s)
    else:
        if life.changes.leaving:
            life.warnings.append(f"interrupted; go on with --resume {life.spec.out or life.job}")
        life._enter(Phase.OVER, now_s)


def takes_back(life: Lifecycle) -> bool:
    """Whether the job ends because of the change that it is on trial with."""
    if life.changes.before is None or life.failure is None or life.interrupted:
        return False
    return life.failure.reason != "NODE_LOST" or not will_restart(life)


def _go_on_with(life: Lifecycle, spec: JobSpec, now_s: float, effects: list[Effect]) -> None:
    """From the newest checkpoint on, with this description."""
    effects.append(LogRow({"changed": differences(life.spec, spec), "checkpoint": life.changes.number}))
    effects.append(SpecChanged())
    life.recorder.change(spec)
    life.spec = spec
    life.origin = replace(life.origin, mode=spec.parsed_mode)
    life.checkpoints.settings(spec.settings)
    life.training = life.training.anew(replace(life.training.facts, mode=spec.parsed_mode))
    life._committing = life._begun_again = 0
    life._enter(Phase.WAITING, now_s)


def wait(life: Lifecycle, now_s: float, effects: list[Effect]) -> None:
    """Ask for the checkpoint to begin again from, later and later after failures that came soon."""
    if now_s - life._since_s >= whole_backoff_s(life._begun_again) and now_s - life._asked_s > RETRY_S:
        life._asked_s = now_s
        effects.append(FindCheckpoint())


def will_restart(life: Lifecycle) -> bool:
    """Whether the job, once all has ended, begins again from its last checkpoint."""
    lost = life.failure is not None and life.failure.reason not in ("RESULT_NOT_WRITTEN", "NO_PREPARE")
    return lost and not life.interrupted and life.restarts < life.spec.restarts


def _in_words(failure: Failure) -> str:
    return f"{failure.who} {failure.message}".strip()
