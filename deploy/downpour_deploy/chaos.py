"""``downpour run --chaos``: processes of a user's own job are killed, stopped or slowed down, to see what it survives.

::

    kill:server/0@30s, kill:worker@10s±5, stop:worker/1@20s+5s, term:worker/0@step:100, kill:server@every:20s

is a list of ``ACTION:TARGET@WHEN``. *ACTION*: ``kill`` (SIGKILL), ``term`` (SIGTERM: the worker is asked to leave),
``stop`` (SIGSTOP; with ``+5s`` it goes on after that). *TARGET*: ``server/0``, ``worker/1``; ``server``, ``worker`` or
``any``: one of these by lot; with replication also ``server/0b``, the second process of shard 0, ``leader/0`` and
``backup/0``, that one of the two which is it then, and ``leader`` and ``backup``: of any shard, as long as the backup
could take over. *WHEN*: ``30s`` after training has begun, ``10s±5`` or ``10s~5`` a moment by lot within 5 s of that,
``step:100`` once a worker has reported that many steps, ``every:20s``, ``every:20s±5`` and ``every:step:50`` again and
again. What is not running then is waited for. ``delay:50ms``, ``delay:worker/1:50ms``, without a time: each answer of
the shards, or each push of the worker, comes so much later. ``seed:7`` seeds the lots instead of the job's seed.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from downpour_common import failpoints
from downpour_common.errors import ConfigError
from downpour_common.names import server_index

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_DONE = {"kill": "killed", "term": "asked to leave:", "stop": "stopped"}
_PARTS = ("leader", "backup")
_SECOND = "server/…b"
_SLOWED = {"server": "shard.reply.before", "worker": "worker.push.before"}


class Target(Protocol):
    """A process as :class:`downpour_deploy.child.Child` has it."""

    pid: int

    @property
    def name(self) -> str:
        """``role/index``."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""

    def send_signal(self, number: signal.Signals, alone: bool = False) -> None:
        """To it, or also to what it has started."""


@dataclass(frozen=True, slots=True)
class Act:
    """One item. ``at``: seconds, or steps with ``by_step``. ``index`` None: by lot; ``role`` "" either."""

    text: str
    action: str
    role: str
    index: int | None
    at: float
    by_step: bool = False
    jitter_s: float = 0.0
    every: bool = False
    lasts_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole ``--chaos``. ``delays``: failpoints of the job's processes. ``seed`` None: the job's."""

    acts: tuple[Act, ...] = ()
    delays: tuple[str, ...] = ()
    seed: int | None = None

    def environment(self) -> dict[str, str]:
        """What the job's processes must have in theirs."""
        there = os.environ.get(failpoints.VARIABLE, "")
        return {failpoints.VARIABLE: ";".join(filter(None, (there, *self.delays)))} if self.delays else {}


class Chaos:
    """Carries out a plan. ``tell`` takes a line for the user, ``log`` a row for the metrics."""

    def __init__(
        self, plan: Plan, seed: int, tell: Callable[[str], None], log: Callable[[dict[str, Any]], None]
    ) -> None:
        self._draw = random.Random(seed if plan.seed is None else plan.seed)
        self._tell, self._log = tell, log
        self._begun_s: float | None = None
        self._due = [(self._drawn(act), act) for act in plan.acts]
        self._stopped: list[tuple[float, Target]] = []

    def turn(
        self,
        now_s: float,
        training: bool,
        clock: int,
        children: Mapping[tuple[str, int], Target],
        parts: Mapping[tuple[str, int], tuple[str, int]] | None = None,
    ) -> None:
        """Call it often. ``training``: whether the job trains now; ``clock``: its largest; ``parts``: which child is
        the leader, or the backup, of a shard."""
        if training and self._begun_s is None:
            self._begun_s = now_s
        if self._begun_s is None:
            return
        after_s = now_s - self._begun_s
        for entry in [entry for entry in self._stopped if entry[0] <= after_s]:
            self._stopped.remove(entry)
            if entry[1].running:
                entry[1].send_signal(signal.SIGCONT)
                self._note(f"{entry[1].name} goes on", entry[1], after_s, clock)
        if not training:
            return
        for number, (at, act) in enumerate(self._due):
            if (clock if act.by_step else after_s) < at:
                continue
            target = self._pick(act, children, parts or {})
            if target is not None:
                self._carry_out(act, target, after_s, clock)
                since = clock if act.by_step else after_s
                self._due[number] = (self._drawn(act, since) if act.every else math.inf, act)
        self._due = [(at, act) for at, act in self._due if at < math.inf]

    def _drawn(self, act: Act, since: float = 0.0) -> float:
        """When the act is due, counted from ``since``."""
        return since + max(0.0, act.at + self._draw.uniform(-act.jitter_s, act.jitter_s))

    def _pick(
        self,
        act: Act,
        children: Mapping[tuple[str, int], Target],
        parts: Mapping[tuple[str, int], tuple[str, int]],
    ) -> Target | None:
        stopped = [target for _, target in self._stopped]
        if act.role in _PARTS:
            children = {part: children[key] for part, key in parts.items() if key in children}
        fit = [
            child
            for (role, index), child in sorted(children.items())
            if child.running and act.role in ("", role) and act.index in (None, index) and child not in stopped
        ]
        return self._draw.choice(fit) if fit else None

    def _carry_out(self, act: Act, target: Target, after_s: float, clock: int) -> None:
        target.send_signal(_SIGNALS[act.action], alone=act.action != "stop")
        self._note(f"{_DONE[act.action]} {target.name}", target, after_s, clock)
        if act.lasts_s is not None:
            self._stopped.append((after_s + act.lasts_s, target))

    def _note(self, what: str, target: Target, after_s: float, clock: int) -> None:
        self._tell(f"chaos: {what} (pid {target.pid}) {after_s:.1f} s into the training, step {clock}")
        self._log({"chaos": what, "clock": clock, "after_s": round(after_s, 3)})


# ---------------------------------------------------------------- what the user has typed


def parse(text: str, workers: int, shards: int, replication: int = 1) -> Plan:
    """See the module. Raises :class:`ConfigError` with everything that makes no sense."""
    acts: list[Act] = []
    delays: list[str] = []
    problems: list[str] = []
    seed: int | None = None
    counts = {"worker": workers, "server": shards}
    if replication > 1:
        counts |= dict.fromkeys((*_PARTS, _SECOND), shards)
    for item in filter(None, (part.strip() for part in text.split(","))):
        action, _, rest = item.partition(":")
        try:
            if action == "seed":
                seed = _whole(rest)
            elif action == "delay":
                delays.append(_delay(rest, counts))
            elif action in _SIGNALS:
                acts.append(_act(item, action, rest, counts))
            else:
                raise ValueError("expected kill:…, term:…, stop:…, delay:… or seed:…")
        except ValueError as error:
            problems.append(f"--chaos {item}: {error}")
    if not (acts or delays or problems):
        problems.append("--chaos: there is nothing in it; try --chaos kill:server/0@30s")
    if problems:
        raise ConfigError(*problems)
    return Plan(tuple(acts), tuple(delays), seed)


def _act(item: str, action: str, rest: str, counts: Mapping[str, int]) -> Act:
    target, at, when = rest.partition("@")
    role, index = _target(target, counts)
    if not at:
        raise ValueError("when? add @30s, @10s±5, @step:100 or @every:20s")
    if action == "term" and role != "worker":
        raise ValueError("only workers are asked to leave; expected term:worker or term:worker/0")
    when, plus, lasts = when.partition("+")
    if plus and action != "stop":
        raise ValueError("only stop has an end; expected stop:worker/1@20s+5s")
    every = when.startswith("every:")
    when = when.removeprefix("every:")
    lasts_s = _seconds(lasts) if plus else None
    if when.startswith("step:"):
        steps = _whole(when.removeprefix("step:"))
        if every and not steps:
            raise ValueError("every 0 steps?")
        return Act(item, action, role, index, steps, True, every=every, lasts_s=lasts_s)
    moment, _, jitter = when.replace("~", "±").partition("±")
    at_s = _seconds(moment)
    if every and not at_s:
        raise ValueError("every 0 seconds?")
    return Act(item, action, role, index, at_s, False, _seconds(jitter) if jitter else 0.0, every, lasts_s)


def _delay(rest: str, counts: Mapping[str, int]) -> str:
    if "@" in rest:
        raise ValueError("a delay holds for the whole job; leave out what begins with @")
    target, _, duration = rest.rpartition(":")
    role, index = _target(target or "server", counts)
    if role not in _SLOWED:
        raise ValueError("expected delay:50ms, delay:server/0:50ms or delay:worker:50ms")
    who = role if index is None else f"{role}/{index}"
    return f"{_SLOWED[role]}[{who}]=delay:{_seconds(duration) * 1e3:g}"


def _target(text: str, counts: Mapping[str, int]) -> tuple[str, int | None]:
    role, slash, index = text.partition("/")
    if role == "server" and _SECOND in counts and slash:
        try:
            return role, _below(server_index(index, counts["server"]), 2 * counts["server"])
        except ValueError:
            raise ValueError(f"there is no {text}; the job's last is server/{counts['server'] - 1}b") from None
    if role == "coordinator":
        raise ValueError("the coordinator of `downpour run` is the command itself; expected server, worker or any")
    if text == "any":
        return "", None
    if role not in counts or (slash and not index.isdecimal()):
        raise ValueError(
            f"{text or 'nothing'} is no process of a job; expected server/0, server, worker/1, worker or any"
        )
    if slash and int(index) >= counts[role]:
        raise ValueError(f"there is no {text}; the job's last is {role}/{counts[role] - 1}")
    return role, int(index) if slash else None


def _below(number: int, limit: int) -> int:
    if number >= limit:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", text.strip())
    if parts is None:
        raise ValueError(f"{text or 'nothing'} is no time; expected 30s, 500ms or 2m")
    return float(parts[1]) * {"ms": 1e-3, "m": 60.0}.get(parts[2], 1.0)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text or 'nothing'} is no whole number")
    return int(text)
