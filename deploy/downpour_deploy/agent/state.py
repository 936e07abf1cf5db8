"""Which processes an agent runs, what it reports, and when it ends. I/O-free: events in, effects out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from downpour_common import messages as m
from downpour_deploy.agent.effects import (
    AgentFacts,
    Effect,
    Exit,
    Fetch,
    Numbers,
    ProcessId,
    ReadLog,
    RemoveFolder,
    Send,
    Signal,
    Spawn,
    Tell,
)
from downpour_deploy.agent.link import Link
from downpour_deploy.agent.process import NOT_STARTED, Record

REPEAT_S = 2.0
FORGET_GRACE_S = 5.0
DELIVER_S = 10.0
"""Longest wait of an agent that is being stopped for its last logs and reports to be taken."""
LEAVE_S = 3.0
HURRY_S = 1.0
"""The same two after a second signal."""
_JOB = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


class AgentState:
    """One agent. Effects are to be carried out in order, all of them before the next event.

    ``now_s`` is any clock's time in seconds; it is compared only with itself.
    """

    def __init__(self, facts: AgentFacts, numbers: Numbers, now_s: float) -> None:
        self._facts, self._numbers = facts, numbers
        self.link = Link(facts, numbers, now_s)
        self._records: dict[ProcessId, Record] = {}
        self._forgotten: set[str] = set()
        self._orphaned = False
        self.stopping = 0
        """signals to end that have come"""
        self._over_s = math.inf
        self._left_s = math.inf
        self._exited = False

    @property
    def running(self) -> int:
        """Processes that run."""
        return sum(r.phase == "running" for r in self._records.values())

    # ------------------------------------------------------------ the coordinator

    def received(self, message: m.Message, now_s: float) -> list[Effect]:
        """A message of the coordinator; what is not for this object only shows that the coordinator is there."""
        if self.link.silent(now_s):
            self._start_over()
        self.link.heard(now_s)
        self._orphaned = False
        match message:
            case m.StartProcess():
                return self._start(message, now_s)
            case m.StopProcess():
                return self._stop_process(message, now_s)
            case m.ForgetJob():
                return self._forget(message.job, now_s)
            case m.WhoAreYou():
                self.link.unknown()
                return self.link.tick(now_s)
            case m.Ack() | m.Refused():
                return self._answered(message, now_s)
            case _:
                return []

    def _start_over(self) -> None:
        """It was away: what was under way may be lost, and all that waited is due now."""
        for record in self._records.values():
            record.feed.start_over()
            record.reported_s = -math.inf

    def _start(self, order: m.StartProcess, now_s: float) -> list[Effect]:
        process = ProcessId(order.job, order.role, order.index, order.epoch)
        known = self._records.get(process)
        if known is not None:
            known.acknowledged = False  # should it have ended, and that have been lost
            return []
        record = Record(process, order.document)
        others = [r for r in self._records.values() if r.slot == record.slot]
        if any(r.id.epoch > process.epoch for r in others):
            return []
        self._records[process] = record
        self.link.hurry()
        if problem := self._problem(process):
            record.end(NOT_STARTED, error=problem)
            return self._flow(record, now_s)
        effects: list[Effect] = []
        for older in others:
            effects += self._stop_record(older, older.grace_s, "superseded", now_s)
        return [*effects, Fetch(process, order.document)]

    def _problem(self, process: ProcessId) -> str:
        if not _JOB.fullmatch(process.job) or process.index < 0 or process.epoch < 0:
            return f"{process.job!r:.80} {process.index} {process.epoch} do not name a process"
        if process.role != self._facts.role:
            return f"this agent runs {self._facts.role} processes, not {process.role!r:.40}"
        if self.stopping:
            return "the agent is being stopped"
        return ""

    def _stop_process(self, order: m.StopProcess, now_s: float) -> list[Effect]:
        process = ProcessId(order.job, order.role, order.index, order.epoch)
        record = self._records.get(process)
        if record is None:  # the order to start it was lost, or is still to come
            record = self._records[process] = Record(process, {})
        record.acknowledged = False
        return self._stop_record(record, order.grace_s, "asked", now_s)

    def _stop_record(self, record: Record, grace_s: float, why: str, now_s: float) -> list[Effect]:
        effects = record.stop(grace_s, why, now_s)
        if record.over:
            effects += self._flow(record, now_s)
        return effects

    def _forget(self, job: str, now_s: float) -> list[Effect]:
        if not _JOB.fullmatch(job):
            return []
        self._forgotten.add(job)
        effects: list[Effect] = []
        for record in self._of(job):
            effects += record.stop(FORGET_GRACE_S, "asked", now_s)
        return effects + self._clear(job)

    def _of(self, job: str) -> list[Record]:
        return [r for r in self._records.values() if r.id.job == job]

    def _clear(self, job: str) -> list[Effect]:
        """Drop a forgotten job once nothing of it runs."""
        if job not in self._forgotten or any(not r.over for r in self._of(job)):
            return []
        for record in self._of(job):
            del self._records[record.id]
        self._forgotten.discard(job)
        return [RemoveFolder(job)]

    def _answered(self, answer: m.Ack | m.Refused, now_s: float) -> list[Effect]:
        taken = self.link.answered(answer)
        if taken is not None:
            self._exited |= any(isinstance(e, Exit) for e in taken)
            return taken if self._exited else [*taken, *self.tick(now_s)]
        if isinstance(answer, m.Refused) and answer.code == m.Refusal.NOT_READY:
            return []  # repeated in due time
        for record in self._records.values():
            if record.feed.asked(answer.request):
                if isinstance(answer, m.Ack):
                    record.feed.answered(answer.request, answer.version)
                else:
                    record.feed.abandon()
                return self._flow(record, now_s)
            if record.report_request == answer.request and not record.acknowledged:
                record.acknowledged = True
                return self._closing(now_s)
        return []

    # ------------------------------------------------------------ processes

    def fetched(self, process: ProcessId, error: str, now_s: float) -> list[Effect]:
        """All that the process needs is here, or ``error`` says why not."""
        record = self._records.get(process)
        if record is None or record.phase != "fetching":
            return []
        if error:
            record.end(NOT_STARTED, error=error)
            return [*self._flow(record, now_s), *self._clear(process.job)]
        record.phase = "ready"
        return self._spawn(record)

    def _spawn(self, record: Record) -> list[Effect]:
        older = (r for r in self._records.values() if r.slot == record.slot and r.id.epoch < record.id.epoch)
        if record.phase != "ready" or any(not r.over for r in older):
            return []
        record.phase = "running"
        return [Spawn(record.id, record.document)]

    def started(self, process: ProcessId, pid: int) -> None:
        """It runs."""
        self._records[process].pid = pid
        self.link.hurry()

    def not_started(self, process: ProcessId, error: str, now_s: float) -> list[Effect]:
        """The operating system did not start it."""
        return self.ended(process, NOT_STARTED, (), 0, now_s, error)

    def grew(self, process: ProcessId, size: int) -> None:
        """Its log has ``size`` bytes by now."""
        self._records[process].feed.grew(size)

    def unreadable(self, process: ProcessId) -> None:
        """Its log cannot be read back."""
        self._records[process].feed.abandon()

    def ended(
        self, process: ProcessId, code: int, tail: Sequence[str], size: int, now_s: float, error: str = ""
    ) -> list[Effect]:
        """It has ended with ``code`` (negative: by that signal); its log has ``size`` bytes and gets no more."""
        record = self._records[process]
        record.feed.grew(size)
        record.end(code, tail, error)
        self.link.hurry()
        effects = self._flow(record, now_s)
        for other in self._records.values():
            effects += self._spawn(other)
        return [*effects, *self._clear(process.job), *self._closing(now_s)]

    def _flow(self, record: Record, now_s: float, flush: bool = False) -> list[Effect]:
        """Send what is due of a process' log, then the report of its end."""
        if not self.link.open(now_s) or record.id.job in self._forgotten:
            return []
        parts = record.feed.due(self._numbers, now_s, flush)
        effects: list[Effect] = [ReadLog(record.id, p.request, p.offset, p.length) for p in parts]
        if record.over and record.feed.delivered and not record.acknowledged and now_s - record.reported_s >= REPEAT_S:
            record.reported_s = now_s
            record.report_request = record.report_request or self._numbers.new()
            facts = self._facts
            ended = m.ProcessEnded(record.report_request, facts.node, facts.instance, *record.id.parts, record.report)
            effects.append(Send(ended))
        return effects

    # ------------------------------------------------------------ time

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed. Called at least every 50 ms."""
        if self._exited:
            return []
        effects = self.link.tick(now_s)
        for record in self._records.values():
            if record.kill_due(now_s):
                effects.append(Signal(record.id, kill=True))
            if not record.acknowledged:
                effects += self._flow(record, now_s, flush=True)
        if self.link.heartbeat_due(now_s):
            lines = [r.line() for r in self._records.values() if not r.acknowledged]
            jobs = sorted({r.id.job for r in self._records.values()})
            document = {"processes": lines, "jobs": jobs, "draining": self.stopping > 0}
            effects.append(Send(m.Heartbeat(self._facts.node, self._facts.instance, document)))
        return [*effects, *self._orphan(now_s), *self._closing(now_s)]

    def _orphan(self, now_s: float) -> list[Effect]:
        silence_s = now_s - self.link.heard_s
        if self._orphaned or silence_s < self._facts.orphan_s:
            return []
        self._orphaned = True
        live = sum(not r.over for r in self._records.values())
        if not live:
            return []
        text = f"ending {live} processes: the coordinator was not heard of for {silence_s:.0f} s"
        return [Tell(text), *self._stop_all("orphaned", self._facts.grace_s, now_s)]

    def _stop_all(self, why: str, grace_s: float, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        for record in list(self._records.values()):
            effects += self._stop_record(record, grace_s, why, now_s)
        return effects

    # ------------------------------------------------------------ the agent's own end

    def stop(self, now_s: float) -> list[Effect]:
        """End all processes in good order, deliver what is left, leave. Said again: kill them, and do not wait long."""
        self.stopping += 1
        self.link.hurry()
        hurry = self.stopping > 1
        effects = self._stop_all("agent", 0.0 if hurry else self._facts.grace_s, now_s)
        return [*effects, *self.tick(now_s)]

    def _closing(self, now_s: float) -> list[Effect]:
        records = self._records.values()
        if not self.stopping or self._exited or any(not r.over for r in records):
            return []
        self._over_s = min(self._over_s, now_s)
        hurry = self.stopping > 1
        if self._left_s == math.inf:
            waited_s = now_s - self._over_s
            pending = any(not r.acknowledged and r.id.job not in self._forgotten for r in records)
            there = self.link.known and not self.link.silent(now_s)
            if pending and there and waited_s < (HURRY_S if hurry else DELIVER_S):
                return []
            self._left_s = now_s
            if self.link.open(now_s):
                return self.link.leave("the agent was stopped", now_s)
        elif not self.link.left and now_s - self._left_s < (HURRY_S if hurry else LEAVE_S):
            return []
        self._exited = True
        return [Exit("")]
