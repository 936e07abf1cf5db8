"""How a job stands, in words for people: its state, why it is in it, what goes wrong. Reads a :class:`Lifecycle`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour_common.replicas import titled
from downpour_coordinator.beginnings import takes_back, will_restart
from downpour_coordinator.phases import Phase
from downpour_coordinator.recovery import troubles

if TYPE_CHECKING:
    from downpour_coordinator.lifecycle import Lifecycle


def state(life: Lifecycle) -> str:
    """The job's state, for people."""
    phase = life.phase
    if phase is Phase.OVER:
        return "FAILED" if life.failure else "CANCELLED" if life.interrupted and not life._ended_well else "SUCCEEDED"
    if phase is Phase.QUEUED:
        return "PENDING" if life.begun_s is None else "RESTARTING"
    if phase is Phase.STARTING:
        return "RESTARTING" if life.restarts or life.changes.before is not None else "STARTING"
    if life.changes.leaving and not life.interrupted:
        return "RESTARTING"
    if phase is Phase.WAITING or (phase is Phase.ENDING and (will_restart(life) or takes_back(life))):
        return "RESTARTING"
    if phase is Phase.TRAINING:
        return "RUNNING" if life.training.live() else "RESTARTING"
    return "STOPPING"


def reason(life: Lifecycle) -> str:
    """Why it is in this state, one word; see docs/cluster.md."""
    if life.failure is not None:
        return life.failure.reason
    if life.interrupted and not life._ended_well:
        return life.interrupted
    if life.state == "RESTARTING" and (life.changes.leaving or life.changes.before is not None):
        return "CHANGED"
    if life.state == "RESTARTING" and life.last_failure is not None:
        return life.last_failure.reason
    return {"PENDING": "QUEUED", "STARTING": "STARTING"}.get(life.state, "")


def degraded(life: Lifecycle) -> str:
    """What goes wrong without ending the job, or ""."""
    found = [life.checkpoints.degraded]
    if life.phase in (Phase.TRAINING, Phase.SAVING, Phase.KEEPING) and life.training.begun:
        found += troubles(life.training, life.processes, life._signs, life._now_s)
    return "; ".join(filter(None, found))


def remarks(life: Lifecycle) -> list[str]:
    """The warnings, and what is counted: pushes that were lost, contributions that were left out."""
    found = list(life.warnings)
    for index, lost in sorted(life.training.lost().items()):
        found.append(f"{number_of(lost.pushes, 'push', 'es')} {_were(lost.pushes)} lost with server/{index}")
    for slot, count in sorted(life.training.non_finite().items()):
        text = f"{titled('worker', slot, life.spec.ranks)} sent NaN or Inf in {number_of(count, 'contribution', 's')}"
        found.append(f"{text}, which {_were(count)} left out")
    return found


def waiting_for(life: Lifecycle) -> list[str]:
    """What the job waits for at its start: processes without a place, not joined, or a model not taken."""
    if life.phase is Phase.TRAINING and life.training.live():
        return []
    if life.phase not in (Phase.STARTING, Phase.TRAINING):
        return []
    return life.training.waiting_for() or ["the servers to take the model"]


def number_of(number: int, noun: str, plural: str) -> str:
    """``1 push``, ``1,024 pushes``."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
