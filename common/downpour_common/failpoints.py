"""Failpoints: named places in the real processes where a test, or a curious user, has something go wrong.

``DOWNPOUR_FAILPOINTS`` switches them on::

    shard.apply.after[server/0#0]=kill@17; shard.reply.before=delay:5@p0.1; file.rename.before=error:ENOSPC; seed=7

is a list of ``POINT[PROCESS]=ACTION@WHEN``. *POINT*: one of :data:`POINTS`. *[PROCESS]*: whom it is for, ``server/0``,
``server`` (all of them), ``worker/1``, ``coordinator``, with ``#0`` only the process of that epoch, so that its
replacement is spared; left out: everybody. *ACTION*: ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP to itself),
``delay:MS``, ``error`` or ``error:ENOSPC`` (an :class:`OSError`; EIO if not said). *@WHEN*: ``17`` only the 17th time,
``17+`` from then on, ``p0.1`` each time with that probability; left out: each time. ``seed=N``: of the probabilities.

Where nothing is switched on a place costs the look at :data:`on`. Not for threads that meet at one point: counts are
not locked.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import time
from dataclasses import dataclass, field

from downpour_common.errors import ConfigError

VARIABLE = "DOWNPOUR_FAILPOINTS"

POINTS = {
    "shard.receive": "a shard has received a message, and not looked at it",
    "shard.apply.before": "a shard is about to take a contribution",
    "shard.apply.after": "a shard has taken a contribution, and answered nothing",
    "shard.reply.before": "a shard is about to send an answer to a worker",
    "shard.replicate.before": "a shard is about to pass a message on to its backup",
    "shard.acknowledge.before": "a backup has what its shard passed on, and has not said so",
    "shard.snapshot.before": "a shard is about to write what it has captured",
    "shard.snapshot.after": "a shard has written its file, and not said so",
    "file.write.before": "a file that counts as a whole is about to be written: snapshots, manifests, models",
    "file.write.after": "it is written under its temporary name, and not made durable",
    "file.rename.before": "it is durable under its temporary name",
    "file.rename.after": "it has its name, which is not durable yet",
    "coordinator.commit.before": "the coordinator is about to commit a checkpoint",
    "coordinator.commit.after": "the coordinator has committed a checkpoint, and acted on nothing",
    "coordinator.part.before": "the coordinator is about to store part of a snapshot that was sent to it",
    "coordinator.journal.before": "a cluster's coordinator is about to commit what it has decided",
    "coordinator.journal.after": "a cluster's coordinator has committed it, and sent nothing",
    "worker.push.before": "a worker has its gradients, and has sent nothing by this step",
    "worker.push.sent": "a worker's push-pull is on its way",
    "worker.push.after": "a worker has its new weights",
    "worker.end_epoch.before": "a worker is about to tell the shards that its pass is over",
    "worker.end_epoch.after": "the shards have answered that",
    "worker.leave.before": "a worker is about to leave the shards",
    "worker.goodbye.before": "a worker has left the shards, and not the coordinator",
}
"""What has happened when a process comes to the point."""

on = False
"""Whether this process has any: ``if failpoints.on: failpoints.hit(POINT)``."""


@dataclass(slots=True)
class _Failpoint:
    """What is to happen at one point. ``first``, ``last``: the times that count; 0: no end."""

    point: str
    process: str
    action: str
    delay_s: float = 0.0
    number: int = errno.EIO
    first: int = 1
    last: int = 0
    chance: float = 1.0
    times: int = 0
    draw: random.Random = field(default_factory=random.Random)

    def is_for(self, name: str, epoch: int) -> bool:
        process, _, only = self.process.partition("#")
        return process in ("", name, name.partition("/")[0]) and only in ("", str(epoch))

    def due(self) -> bool:
        self.times += 1
        if self.times < self.first or (self.last and self.times > self.last):
            return False
        return self.chance >= 1.0 or self.draw.random() < self.chance

    def fail(self) -> None:
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "delay":
                time.sleep(self.delay_s)
            case _:
                raise OSError(self.number, os.strerror(self.number), f"failpoint {self.point}")


_armed: dict[str, list[_Failpoint]] = {}


def arm(process: str, epoch: int = 0) -> None:
    """Switch on what the environment asks of this process (``server/0``, ``worker/1``, ``coordinator``) of ``epoch``.

    Raises :class:`ConfigError` for what it does not understand.
    """
    global on
    _armed.clear()
    for failpoint in parse(os.environ.get(VARIABLE, "")):
        if failpoint.is_for(process, epoch):
            failpoint.draw.seed(f"{failpoint.draw.random()} {process} {epoch}")
            _armed.setdefault(failpoint.point, []).append(failpoint)
    on = bool(_armed)


def hit(point: str) -> None:
    """The process has come to ``point``. May end or stop it, or wait; raises :class:`OSError` where that is asked."""
    for failpoint in [f for f in _armed.get(point, ()) if f.due()]:
        failpoint.fail()


def parse(text: str) -> list[_Failpoint]:
    """See the module. Raises :class:`ConfigError` with everything that makes no sense."""
    found: list[_Failpoint] = []
    problems: list[str] = []
    seed = 0
    for item in filter(None, (part.strip() for part in text.split(";"))):
        if re.fullmatch(r"seed=\d+", item):
            seed = int(item[5:])
            continue
        try:
            found.append(_parse(item))
        except ValueError as error:
            problems.append(f"{VARIABLE}: {item}: {error}")
    if problems:
        raise ConfigError(*problems)
    for number, failpoint in enumerate(found):
        failpoint.draw.seed(f"{seed} {number}")
    return found


_ITEM = re.compile(r"(?P<point>[a-z_.]+)(\[(?P<process>[^\]]*)\])?=(?P<action>[^@]+)(@(?P<when>.+))?")
_PROCESS = re.compile(r"(coordinator|(server|worker)(/\d+)?)(#\d+)?")


def _parse(item: str) -> _Failpoint:
    parts = _ITEM.fullmatch(item)
    if parts is None:
        raise ValueError("expected POINT[PROCESS]=ACTION@WHEN, as in shard.apply.after[server/0]=kill@17")
    point, process, when = parts["point"], parts["process"] or "", parts["when"] or ""
    if point not in POINTS:
        raise ValueError(f"there is no such point; known: {', '.join(POINTS)}")
    if process and not _PROCESS.fullmatch(process):
        raise ValueError(
            f"[{process}] is no process; expected server/0, worker, coordinator, or with an epoch server/0#1"
        )
    failpoint = _Failpoint(point, process, *_action(parts["action"]))
    if when.startswith("p"):
        failpoint.chance = _number(when[1:])
        if failpoint.chance > 1.0:
            raise ValueError(f"@{when}: a probability is at most 1")
    elif times := re.fullmatch(r"([1-9]\d*)(\+?)", when):
        failpoint.first = int(times[1])
        failpoint.last = 0 if times[2] else failpoint.first
    elif when:
        raise ValueError(f"@{when}: expected 17 (only the 17th time), 17+ (from then on) or p0.1 (a probability)")
    return failpoint


def _action(text: str) -> tuple[str, float, int]:
    """(action, seconds, errno)."""
    action, _, value = text.partition(":")
    if action in ("kill", "stop") and not value:
        return action, 0.0, 0
    if action == "delay":
        return action, _number(value) / 1e3, 0
    if action == "error":
        number = getattr(errno, value or "EIO", None)
        if not isinstance(number, int):
            raise ValueError(f"there is no error {value}; expected its name, as in error:ENOSPC")
        return action, 0.0, number
    raise ValueError(f"unknown action {text}; expected kill, stop, delay:MS or error:NAME")


def _number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"{text or 'nothing'} is not a number")
    return float(text)
