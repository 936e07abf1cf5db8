"""Shards with two processes each: which one leads, whether the other one may be promoted, and what both are told.

Pure: messages and decisions in, messages out. Server processes have indices 0 to 2S-1 on the control plane, i and S+i
are those of shard i, and either may lead. What a worker sees is the *term*, which grows with each leader of a shard.

::

    started ── ready ── named to the leader (SetBackup, Follow) ── complete: promotable
                                                                       ↓ the leader has ended
                                            leads ←── Promoted ←── Promote(term + 1)

A backup that was promotable stays so until the leader is told to go on alone, and then never is again: what it holds
since is not all that was acknowledged. So ``promotable`` must be durable before anybody hears of it, as all of this.
Reports come twice a second and say what was heard; whatever they do not show is told again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.transport import Peer
from downpour_coordinator.effects import Send
from downpour_coordinator.participants import ShardEntry

NOBODY = (-1, -1)


@dataclass(slots=True)
class Backup:
    """A shard's second process, which follows the one that leads."""

    process: int
    epoch: int = 0
    peer: Peer = b""
    address: str = ""
    pid: int = 0
    ready: bool = False
    """it has been set up, and waits to be told whom to follow"""
    promotable: bool = False
    """it holds all that is acknowledged"""
    given_up: bool = False
    """it has ended or is being ended, and is never promoted"""
    error: str = ""
    """why it cannot be a backup"""
    replica: dict[str, Any] = field(default_factory=dict)
    """what it says of itself, see ``Follower.document``"""

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        names = ("process", "epoch", "address", "pid", "ready", "promotable", "given_up", "error")
        return {name: getattr(self, name) for name in names}

    def give_up(self, shard: ShardEntry) -> list[Send]:
        """It is not one any more: the leader goes on alone, at once."""
        self.promotable, self.given_up = False, True
        if not shard.peer or not shard.ready or shard.promoting:
            return []
        return [Send(shard.peer, m.SetBackup(shard.term, *NOBODY))]


def introduce(shard: ShardEntry, backup: Backup | None) -> list[Send]:
    """What leader and follower do not know of each other yet, as far as their reports tell."""
    told: list[Send] = []
    if not shard.ready or shard.promoting or shard.replica.get("role") == "follower":
        return told
    follows = backup is not None and backup.ready and not backup.given_up
    if shard.peer:
        named = tuple(shard.replica.get("backup", ()))
        if follows and backup is not None and named != (backup.process, backup.epoch):
            told.append(Send(shard.peer, m.SetBackup(shard.term, backup.process, backup.epoch)))
        elif not follows and named and (backup is None or backup.given_up or named != (backup.process, backup.epoch)):
            told.append(Send(shard.peer, m.SetBackup(shard.term, *NOBODY)))
    if follows and backup is not None and backup.peer and shard.address and backup.replica.get("term") != shard.term:
        told.append(Send(backup.peer, m.Follow(shard.term, shard.address)))
    return told


def caught_up(shard: ShardEntry, backup: Backup) -> bool:
    """Whether a report has just made the backup promotable."""
    says = backup.replica
    complete = says.get("role") == "follower" and says.get("complete") is True and says.get("term") == shard.term
    if backup.promotable or backup.given_up or shard.promoting or not complete:
        return False
    backup.promotable = True
    return True


def promote(shard: ShardEntry, backup: Backup) -> list[Send]:
    """The leader is no more: its backup leads from now on."""
    shard.process, shard.epoch, shard.term = backup.process, backup.epoch, shard.term + 1
    shard.peer, shard.address, shard.pid = backup.peer, backup.address, backup.pid
    shard.ready, shard.members, shard.since, shard.error = True, 0, 0, ""
    shard.recovers, shard.checkpoint, shard.reports = False, 0, 0
    shard.promoting, shard.moved, shard.replica = True, True, {}
    return ask_again(shard)


def ask_again(shard: ShardEntry) -> list[Send]:
    """The request to lead, until it is answered."""
    return [Send(shard.peer, m.Promote(shard.term))] if shard.promoting and shard.peer and not shard.error else []


def check_replica(document: dict[str, Any]) -> None:
    """What a report says of leading and following. Raises :class:`ProtocolError`."""
    replica = document.get("replica", {})
    if not isinstance(replica, dict):
        raise ProtocolError("a report's replica is no document")
    backup, numbers = replica.get("backup", []), [replica.get("term", 0), replica.get("held", 0)]
    if not isinstance(backup, (list, tuple)) or len(backup) not in (0, 2):
        raise ProtocolError("a report's backup is not who it is")
    if any(type(n) is not int for n in (*numbers, *backup)):
        raise ProtocolError("a report's replica has counts that are not counts")
