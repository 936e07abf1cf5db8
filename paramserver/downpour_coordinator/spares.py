"""``sync,backup=b``: workers that a job does without, at its end too.

Rounds do not wait for the slowest ``b`` workers. Neither does the end of the job, if they are not slow but silent, as
a process that was stopped (SIGSTOP) or a host that hangs is: once all others have ended well, they are ended. One that
is slow and speaks is waited for, as it holds samples of the last pass that nobody else has.
"""

from __future__ import annotations

from downpour_coordinator.processes import Process
from downpour_coordinator.recovery import WORKER_SILENT_S, Signs
from downpour_coordinator.roster import Roster
from downpour_coordinator.training import Training


def silent_spares(training: Training, roster: Roster, signs: Signs, now_s: float) -> list[Process]:
    """One worker of each replica that the end of the job need not wait for."""
    backup = training.facts.mode.backup
    left = [p for p in roster.workers() if p.state != "ended"]
    done = any(all(mate.code == 0 for mate in roster.mates(p)) for p in roster.workers())
    if not backup or not done or not left or any(p.leaving or not p.running for p in left):
        return []
    replicas = {p.index // roster.ranks: p for p in left}
    if len(replicas) > backup or any(signs.quiet_s(p, now_s) <= WORKER_SILENT_S for p in left):
        return []
    return list(replicas.values())
