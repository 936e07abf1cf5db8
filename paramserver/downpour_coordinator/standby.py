"""Jobs with replication: what the end, or the silence, of a shard's leader or backup leads to.

Nothing of it costs a restart, since nothing is lost: a backup takes over from a leader that has ended, and another
process becomes the backup. One that could not even catch up is started again later and later.
"""

from __future__ import annotations

from downpour_coordinator.effects import Effect
from downpour_coordinator.processes import Process
from downpour_coordinator.recovery import Signs
from downpour_coordinator.roster import Roster
from downpour_coordinator.training import Training

LEADER_FROZEN_S = 5.0
"""Silence after which a leader is ended and its backup promoted. Too early costs no data."""
BACKUP_FROZEN_S = 3.0
"""Silence after which a backup that answers wait for is not waited for any longer."""
WITHOUT_S = 10.0
"""Time that all others wait at the start for backups to catch up, before they begin without."""


class Standby:
    """Of one job; its state is the roster's and the training's."""

    def __init__(self, roster: Roster, signs: Signs, warnings: list[str]) -> None:
        self._roster, self._signs, self._warnings = roster, signs, warnings
        self._complete_but_backups_s: float | None = None

    def ended(self, training: Training, process: Process, why: str, now_s: float, effects: list[Effect]) -> str:
        """A server process has ended: "leader" or "backup" if its shard goes on, "" if it was the last that could."""
        index = process.index % training.facts.shards
        shard, backup = training.shards[index], training.backups.get(index)
        if shard.process != process.index:
            proven = backup is not None and backup.promotable
            effects += training.backup_lost(index)
            meaning, was = "another one is started", "backup"
        elif backup is not None and backup.promotable:
            effects += training.promote(index)
            meaning, was, proven = f"{training.name_of(shard.process)} leads now", "leader", True
        else:
            return ""
        self._warnings.append(f"{process.name} {why}; {meaning}")
        after = self._roster.succeed(process, now_s, proven)
        training.expect_server(process.index, after.epoch)
        return was

    def begins(self, training: Training, now_s: float, effects: list[Effect]) -> None:
        """Before the first step: whether it is time to begin without backups."""
        if not training.waits_for_backups():
            self._complete_but_backups_s = None
        elif self._complete_but_backups_s is None:
            self._complete_but_backups_s = now_s
        elif now_s - self._complete_but_backups_s > WITHOUT_S:
            effects += training.begin_without_backups()

    def look(self, training: Training, start_timeout_s: float, now_s: float, effects: list[Effect]) -> None:
        """Now and then: end what has stopped to answer, and what cannot do its part."""
        for index, backup in list(training.backups.items()):
            shard = training.shards[index]
            leader = self._roster.all["server", shard.process]
            follower = self._roster.all["server", backup.process]
            quiet_s = self._signs.quiet_s(leader, now_s) if shard.ready else 0.0
            if shard.promoting and shard.error:
                self._end(leader, f"cannot lead: {shard.error}")
            elif quiet_s > LEADER_FROZEN_S and (backup.promotable or shard.promoting):
                self._end(leader, f"has not been heard of for {quiet_s:.0f} s")
            if not follower.running or backup.given_up or follower.stop is not None:
                continue
            quiet_s = self._signs.quiet_s(follower, now_s) if backup.ready else 0.0
            if backup.error:
                self._end(follower, f"cannot be a backup: {backup.error}")
            elif not backup.ready and training.begun and follower.waited_s(now_s) > start_timeout_s:
                self._end(follower, f"has not joined within {start_timeout_s:g} s")
            elif quiet_s > BACKUP_FROZEN_S and shard.replica.get("held", 0) > 0:
                effects += training.backup_lost(index)
                self._end(follower, f"has not been heard of for {quiet_s:.0f} s")

    def _end(self, process: Process, why: str) -> None:
        if process.running and process.stop is None:
            process.stop = 0.0
            self._warnings.append(f"{process.name} {why}; it is ended")
