"""An agent's decisions: registration, processes, logs, reports, and its end. No sockets, no processes, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from downpour_common import messages as m
from downpour_deploy.agent.effects import (
    AgentFacts,
    CancelFetch,
    Effect,
    Exit,
    Fetch,
    Numbers,
    ProcessId,
    ReadLog,
    Reconnect,
    RemoveFolder,
    Send,
    Signal,
    Spawn,
    Tell,
)
from downpour_deploy.agent.logs import PART_BYTES
from downpour_deploy.agent.state import AgentState

E = TypeVar("E")
M = TypeVar("M", bound=m.Message)
JOB = "digits-3f2a9c"
ZERO = ProcessId(JOB, "worker", 0, 0)


def worker(index: int = 0, epoch: int = 0, job: str = JOB) -> ProcessId:
    """A worker's id."""
    return ProcessId(job, "worker", index, epoch)


class Agent:
    """An agent's state, a clock, and what it wanted done since it was last looked at."""

    def __init__(self, registered: bool = True, orphan_s: float = 900.0) -> None:
        self.now_s = 1000.0
        facts = AgentFacts("w1", "worker", "abc", {"cores": 4}, orphan_s, 30.0)
        self.state = AgentState(facts, Numbers(), self.now_s)
        self.effects: list[Effect] = []
        if registered:
            self.tick()
            [register] = self.sent(m.RegisterNode)
            self.receive(m.Ack(register.request, 0))
            self.effects = []

    def do(self, effects: Iterable[Effect]) -> list[Effect]:
        """Note these effects."""
        new = list(effects)
        self.effects += new
        return new

    def receive(self, message: m.Message) -> list[Effect]:
        """A message of the coordinator."""
        return self.do(self.state.received(message, self.now_s))

    def tick(self, seconds: float = 0.0) -> list[Effect]:
        """Time passes, in one go."""
        self.now_s += seconds
        return self.do(self.state.tick(self.now_s))

    def pass_time(self, seconds: float, answering: bool = True) -> None:
        """Time passes, as the service's loop sees it, while the coordinator answers pings, or does not."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            for effect in self.tick(0.25):
                if answering and isinstance(effect, Send) and isinstance(effect.message, m.Ping):
                    self.receive(m.Pong(effect.message.request, {}, b""))

    def take(self, kind: type[E]) -> list[E]:
        """The effects of this kind so far, which are then forgotten."""
        found = [e for e in self.effects if isinstance(e, kind)]
        self.effects = [e for e in self.effects if not isinstance(e, kind)]
        return found

    def sent(self, kind: type[M]) -> list[M]:
        """The messages of this kind sent so far, which are then forgotten."""
        found = [e.message for e in self.effects if isinstance(e, Send) and isinstance(e.message, kind)]
        self.effects = [e for e in self.effects if not (isinstance(e, Send) and isinstance(e.message, kind))]
        return found

    def order(self, process: ProcessId = ZERO, grace_s: float = 5.0) -> list[Effect]:
        """The coordinator wants this process."""
        document: dict[str, Any] = {"spec": {"settings": {"grace_s": grace_s}}}
        return self.receive(m.StartProcess(*process.parts, document))

    def stop(self, process: ProcessId = ZERO, grace_s: float = 3.0) -> list[Effect]:
        """The coordinator does not want it any more."""
        return self.receive(m.StopProcess(*process.parts, grace_s))

    def run(self, process: ProcessId = ZERO, pid: int = 77) -> None:
        """Order, fetch, start."""
        self.order(process)
        assert self.take(Fetch)[-1].process == process
        self.do(self.state.fetched(process, "", self.now_s))
        assert [e.process for e in self.take(Spawn)] == [process]
        self.state.started(process, pid)

    def end(self, process: ProcessId = ZERO, code: int = 0, size: int = 0, tail: tuple[str, ...] = ()) -> None:
        """The process has ended."""
        self.do(self.state.ended(process, code, tail, size, self.now_s))

    def lines(self) -> dict[tuple[str, str, int, int], str]:
        """The processes of the next heartbeat, with their states."""
        self.sent(m.Heartbeat)
        self.pass_time(1.0)
        beat = self.sent(m.Heartbeat)[-1]
        return {(p["job"], p["role"], p["index"], p["epoch"]): p["state"] for p in beat.document["processes"]}


# ---------------------------------------------------------------- registration and silence


def test_registration_is_repeated_with_the_same_number_until_it_is_answered() -> None:
    agent = Agent(registered=False)
    agent.pass_time(5.0)
    sent = agent.sent(m.RegisterNode)
    assert len(sent) == 3  # at once, and every two seconds
    assert sent == [m.RegisterNode(1, "w1", "worker", "abc", {"cores": 4})] * 3
    assert not agent.sent(m.Heartbeat)
    agent.receive(m.Ack(99, 0))  # an answer to nothing
    agent.pass_time(2.0)
    assert agent.sent(m.RegisterNode)
    agent.receive(m.Ack(1, 0))
    assert agent.sent(m.Heartbeat) == [m.Heartbeat("w1", "abc", {"processes": [], "jobs": [], "draining": False})]
    agent.pass_time(4.0)
    assert not agent.sent(m.RegisterNode)
    assert len(agent.sent(m.Heartbeat)) == 4


def test_a_refused_registration_is_the_end_unless_it_may_be_tried_again() -> None:
    agent = Agent(registered=False)
    agent.tick()
    agent.receive(m.Refused(1, m.Refusal.NOT_READY, "the name is taken"))
    agent.pass_time(2.0)
    agent.receive(m.Refused(1, m.Refusal.NOT_READY, "the name is taken"))
    assert agent.take(Tell) == [Tell("not registered yet: the name is taken")]  # once
    assert not agent.take(Exit)
    agent.receive(m.Refused(1, m.Refusal.FORBIDDEN, "not with this key"))
    assert agent.take(Exit) == [Exit("not with this key")]


def test_an_agent_that_is_not_known_any_more_registers_again_and_keeps_its_processes() -> None:
    agent = Agent()
    agent.run()
    agent.receive(m.WhoAreYou())
    agent.receive(m.WhoAreYou())  # to the next heartbeat, which was under way
    [again] = agent.sent(m.RegisterNode)
    assert again.instance == "abc"
    agent.pass_time(1.5)
    assert not agent.sent(m.Heartbeat)
    agent.receive(m.Ack(again.request, 0))
    [beat] = agent.sent(m.Heartbeat)
    assert [(p["state"], p["pid"]) for p in beat.document["processes"]] == [("running", 77)]
    assert not agent.take(Signal)


def test_a_silent_coordinator_gets_nothing_but_pings_and_all_that_waited_when_it_is_back() -> None:
    agent = Agent()
    agent.run()
    agent.run(worker(1))
    agent.end(worker(1))
    agent.state.grew(ZERO, 100)
    agent.pass_time(10.0, answering=False)
    agent.effects = []
    agent.pass_time(40.0, answering=False)
    kinds = {type(e.message) for e in agent.effects if isinstance(e, Send)}
    assert kinds == {m.Ping}
    assert len(agent.sent(m.Ping)) == 20
    assert not agent.effects
    agent.receive(m.Pong(5, {}, b""))
    agent.tick()
    assert len(agent.sent(m.Heartbeat)) == 1
    assert [e.process for e in agent.take(ReadLog)] == [ZERO]
    assert [e.index for e in agent.sent(m.ProcessEnded)] == [1]


def test_the_connection_is_made_anew_every_minute_of_silence() -> None:
    agent = Agent()
    agent.pass_time(59.0, answering=False)
    assert not agent.take(Reconnect)
    agent.pass_time(2.0, answering=False)
    assert len(agent.take(Reconnect)) == 1
    agent.pass_time(58.5, answering=False)
    assert not agent.take(Reconnect)
    agent.pass_time(120.0, answering=False)
    assert len(agent.take(Reconnect)) == 2


def test_a_coordinator_that_answers_pings_is_never_silent() -> None:
    agent = Agent(orphan_s=20.0)
    agent.run()
    agent.pass_time(300.0)
    assert not agent.take(Signal)
    assert not agent.take(Reconnect)
    assert len(agent.sent(m.Heartbeat)) == 300


# ---------------------------------------------------------------- starting


def test_a_process_is_fetched_for_started_and_reported() -> None:
    agent = Agent()
    [fetch] = agent.order()
    assert isinstance(fetch, Fetch)
    assert fetch.process == ZERO
    assert agent.lines() == {ZERO.parts: "fetching"}
    [spawn] = agent.do(agent.state.fetched(ZERO, "", agent.now_s))
    assert isinstance(spawn, Spawn)
    agent.state.started(ZERO, 77)
    agent.tick()
    assert agent.sent(m.Heartbeat)[-1].document["processes"] == [
        {"job": JOB, "role": "worker", "index": 0, "epoch": 0, "state": "running", "pid": 77}
    ]


def test_the_same_order_again_changes_nothing_whatever_has_become_of_the_process() -> None:
    agent = Agent()
    agent.run()
    assert agent.order() == []
    agent.end()
    assert agent.order() == []
    [ended] = agent.sent(m.ProcessEnded)
    agent.receive(m.Ack(ended.request, 0))
    assert agent.lines() == {}
    assert agent.order() == []  # acknowledged, and yet ordered again: the acknowledgement's sender has forgotten
    assert agent.lines() == {ZERO.parts: "ended"}
    agent.pass_time(2.0)
    assert agent.sent(m.ProcessEnded)[-1] == ended
    assert not agent.take(Spawn)


def test_an_order_of_an_older_epoch_is_ignored() -> None:
    agent = Agent()
    agent.run(worker(0, 2))
    assert agent.order(worker(0, 1)) == []
    assert list(agent.lines()) == [worker(0, 2).parts]


def test_a_newer_epoch_ends_the_older_and_waits_for_that() -> None:
    agent = Agent()
    agent.run()
    agent.order(worker(0, 1))
    assert agent.take(Signal) == [Signal(ZERO, kill=False)]
    agent.do(agent.state.fetched(worker(0, 1), "", agent.now_s))
    assert not agent.take(Spawn)
    agent.tick(5.0)
    assert agent.take(Signal) == [Signal(ZERO, kill=True)]
    agent.end(code=-9)
    assert [e.process for e in agent.take(Spawn)] == [worker(0, 1)]
    agent.state.started(worker(0, 1), 78)
    [ended] = agent.sent(m.ProcessEnded)
    assert (ended.epoch, ended.document["code"], ended.document["stopped"]) == (0, -9, "superseded")


def test_a_newer_epoch_cancels_an_older_one_that_is_still_being_fetched() -> None:
    agent = Agent()
    agent.order()
    agent.effects = []
    agent.order(worker(0, 1))
    assert agent.take(CancelFetch) == [CancelFetch(ZERO)]
    agent.do(agent.state.fetched(ZERO, "", agent.now_s))  # too late
    assert not agent.take(Spawn)
    agent.do(agent.state.fetched(worker(0, 1), "", agent.now_s))
    assert [e.process for e in agent.take(Spawn)] == [worker(0, 1)]


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (ProcessId(JOB, "server", 0, 0), "runs worker processes"),
        (ProcessId("../etc", "worker", 0, 0), "do not name a process"),
        (ProcessId("", "worker", 0, 0), "do not name a process"),
        (ProcessId(JOB, "worker", -1, 0), "do not name a process"),
    ],
)
def test_an_order_that_makes_no_sense_is_answered_with_an_error(process: ProcessId, reason: str) -> None:
    agent = Agent()
    agent.order(process)
    assert not agent.take(Fetch)
    [ended] = agent.sent(m.ProcessEnded)
    assert reason in ended.document["error"]


def test_what_cannot_be_fetched_or_started_is_reported_with_the_reason() -> None:
    agent = Agent()
    agent.order()
    agent.do(agent.state.fetched(ZERO, "no such file", agent.now_s))
    agent.order(worker(1))
    agent.do(agent.state.fetched(worker(1), "", agent.now_s))
    agent.do(agent.state.not_started(worker(1), "no such program", agent.now_s))
    ended = agent.sent(m.ProcessEnded)
    assert [(e.index, e.document["error"], e.document["code"], e.document["pid"]) for e in ended] == [
        (0, "no such file", -15, 0),
        (1, "no such program", -15, 0),
    ]


# ---------------------------------------------------------------- stopping


def test_stopping_is_sigterm_once_and_sigkill_after_the_grace() -> None:
    agent = Agent()
    agent.run()
    agent.stop(grace_s=3.0)
    agent.stop(grace_s=3.0)
    assert agent.take(Signal) == [Signal(ZERO, kill=False)]
    agent.pass_time(2.5)
    agent.stop(grace_s=30.0)  # a repeat cannot make it longer
    assert not agent.take(Signal)
    agent.pass_time(0.5)
    agent.pass_time(5.0)
    assert agent.take(Signal) == [Signal(ZERO, kill=True)]
    agent.end(code=-9)
    [ended] = agent.sent(m.ProcessEnded)
    assert (ended.document["code"], ended.document["stopped"], ended.document["error"]) == (-9, "asked", "")


def test_a_repeat_with_a_shorter_grace_shortens_it() -> None:
    agent = Agent()
    agent.run()
    agent.stop(grace_s=60.0)
    agent.stop(grace_s=0.0)
    agent.tick(0.05)
    assert agent.take(Signal) == [Signal(ZERO, kill=False), Signal(ZERO, kill=True)]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_process_that_was_not_started_yet_is_cancelled_and_reported(ordered: bool) -> None:
    agent = Agent()
    if ordered:
        agent.order()
    agent.stop()
    assert agent.take(CancelFetch) == [CancelFetch(ZERO)]
    [ended] = agent.sent(m.ProcessEnded)
    assert (ended.document["code"], ended.document["stopped"]) == (-15, "asked")
    assert ended.document["error"] == "stopped before it was started"
    assert agent.order() == []  # an order that was overtaken
    agent.do(agent.state.fetched(ZERO, "", agent.now_s))
    assert not agent.take(Spawn)


# ---------------------------------------------------------------- logs and reports


class Log:
    """What the coordinator holds of one process' output, and a network that can lose."""

    def __init__(self, agent: Agent, process: ProcessId = ZERO) -> None:
        self.agent, self.process, self.held = agent, process, 0

    def deliver(self, lose: bool = False) -> int:
        """Carry what the agent has sent; the number of parts."""
        parts = [e for e in self.agent.take(ReadLog) if e.process == self.process]
        for part in parts:
            assert part.length <= PART_BYTES
            if lose:
                continue
            if part.offset <= self.held:
                self.held = max(self.held, part.offset + part.length)
            self.agent.receive(m.Ack(part.request, self.held))
        return len(parts)

    def deliver_all(self) -> None:
        """Until nothing more comes."""
        while self.deliver():
            pass


def test_output_goes_out_in_parts_two_at_a_time() -> None:
    agent = Agent()
    agent.run()
    agent.state.grew(ZERO, 5 * PART_BYTES + 7)
    agent.tick()
    parts = agent.take(ReadLog)
    assert [(p.offset, p.length) for p in parts] == [(0, PART_BYTES), (PART_BYTES, PART_BYTES)]
    agent.receive(m.Ack(parts[0].request, PART_BYTES))
    assert [p.offset for p in agent.take(ReadLog)] == [2 * PART_BYTES]
    agent.receive(m.Ack(parts[0].request, PART_BYTES))  # twice
    assert not agent.take(ReadLog)


def test_little_output_waits_for_the_next_tick_only() -> None:
    agent = Agent()
    agent.run()
    agent.tick()
    agent.state.grew(ZERO, 10)
    agent.receive(m.Pong(1, {}, b""))
    assert not agent.take(ReadLog)
    agent.tick()
    assert [(p.offset, p.length) for p in agent.take(ReadLog)] == [(0, 10)]


def test_lost_parts_are_sent_again_from_where_the_coordinator_is() -> None:
    agent, size = Agent(), 7 * PART_BYTES + 3
    agent.run()
    log = Log(agent)
    agent.state.grew(ZERO, size)
    agent.tick()
    assert log.deliver() == 2
    log.deliver(lose=True)
    assert log.held == 2 * PART_BYTES
    agent.pass_time(2.5)
    assert [p.offset for p in agent.effects if isinstance(p, ReadLog)] == [2 * PART_BYTES, 3 * PART_BYTES]
    log.deliver_all()
    agent.tick()
    log.deliver_all()
    assert log.held == size


def test_a_coordinator_that_lost_some_of_it_gets_it_again() -> None:
    agent = Agent()
    agent.run()
    log = Log(agent)
    agent.state.grew(ZERO, 1000)
    agent.tick()
    log.deliver_all()
    log.held = 400
    agent.state.grew(ZERO, 1010)
    agent.tick()
    log.deliver_all()
    agent.tick()
    assert [(p.offset, p.length) for p in agent.effects if isinstance(p, ReadLog)] == [(400, 610)]
    log.deliver_all()
    assert log.held == 1010


def test_the_end_is_reported_only_when_every_byte_is_held() -> None:
    agent = Agent()
    agent.run()
    log = Log(agent)
    agent.end(code=3, size=2 * PART_BYTES + 5, tail=("Traceback", "no newline at the end"))
    assert not agent.sent(m.ProcessEnded)
    log.deliver()
    assert not agent.sent(m.ProcessEnded)
    assert agent.lines() == {ZERO.parts: "ended"}
    log.deliver()
    assert log.held == 2 * PART_BYTES + 5
    [ended] = agent.sent(m.ProcessEnded)
    assert ended.document == {
        "code": 3,
        "tail": ["Traceback", "no newline at the end"],
        "error": "",
        "stopped": "",
        "log_bytes": 2 * PART_BYTES + 5,
        "pid": 77,
    }
    agent.pass_time(4.25)
    assert agent.sent(m.ProcessEnded) == [ended, ended]  # every two seconds, the same number
    agent.receive(m.Ack(ended.request, 0))
    agent.pass_time(4.0)
    assert not agent.sent(m.ProcessEnded)
    assert agent.lines() == {}


def test_a_report_is_not_lost_with_the_registration() -> None:
    agent = Agent()
    agent.run()
    agent.receive(m.WhoAreYou())
    [again] = agent.sent(m.RegisterNode)
    agent.end()
    agent.pass_time(4.0)
    assert not agent.sent(m.ProcessEnded)
    agent.receive(m.Ack(again.request, 0))
    assert len(agent.sent(m.ProcessEnded)) == 1


def test_a_log_that_nobody_wants_is_dropped_and_the_end_still_reported() -> None:
    agent = Agent()
    agent.run()
    agent.state.grew(ZERO, 100)
    agent.tick()
    [part] = agent.take(ReadLog)
    agent.receive(m.Refused(part.request, m.Refusal.UNKNOWN, "no such job"))
    agent.end(size=5000)
    agent.pass_time(3.0)
    assert not agent.take(ReadLog)
    assert len(agent.sent(m.ProcessEnded)) == 2


def test_not_ready_is_no_refusal() -> None:
    agent = Agent()
    agent.run()
    agent.end(size=100)
    [part] = agent.take(ReadLog)
    agent.receive(m.Refused(part.request, m.Refusal.NOT_READY, "a moment"))
    agent.pass_time(2.5)
    assert agent.take(ReadLog)


def test_a_log_that_cannot_be_read_back_does_not_hold_the_report_up() -> None:
    agent = Agent()
    agent.run()
    agent.end(size=100)
    agent.take(ReadLog)
    agent.state.unreadable(ZERO)
    agent.tick()
    assert len(agent.sent(m.ProcessEnded)) == 1


def test_the_tail_is_the_last_of_a_long_output() -> None:
    agent = Agent()
    agent.run()
    agent.end(code=1, tail=("x" * 100_000, *(f"{n:04}" + "y" * 1000 for n in range(60))))
    [ended] = agent.sent(m.ProcessEnded)
    tail = ended.document["tail"]
    assert 10 <= len(tail) < 20
    assert tail[-1].startswith("0059")
    assert sum(map(len, tail)) < 20_000


# ---------------------------------------------------------------- a job's end


def test_forgetting_a_job_ends_what_is_left_of_it_then_removes_its_folder() -> None:
    agent = Agent()
    agent.run()
    agent.order(worker(1))
    agent.run(worker(0, job="other-1"))
    agent.effects = []
    agent.receive(m.ForgetJob(JOB))
    assert agent.take(Signal) == [Signal(ZERO, kill=False)]
    assert agent.take(CancelFetch) == [CancelFetch(worker(1))]
    assert not agent.take(RemoveFolder)
    agent.receive(m.ForgetJob(JOB))
    agent.pass_time(5.0)
    assert agent.take(Signal) == [Signal(ZERO, kill=True)]
    agent.end(code=-9, size=100)
    assert agent.take(RemoveFolder) == [RemoveFolder(JOB)]
    assert list(agent.lines()) == [worker(0, job="other-1").parts]
    assert not agent.take(ReadLog)
    assert not agent.sent(m.ProcessEnded)


def test_heartbeats_name_the_jobs_that_were_not_forgotten_yet() -> None:
    agent = Agent()
    agent.run()
    agent.end()
    [ended] = agent.sent(m.ProcessEnded)
    agent.receive(m.Ack(ended.request, 0))
    for jobs in ([JOB], []):
        agent.pass_time(1.0)
        beat = agent.sent(m.Heartbeat)[-1]
        assert (beat.document["processes"], beat.document["jobs"]) == ([], jobs)
        agent.receive(m.ForgetJob(JOB))


def test_forgetting_a_job_that_has_ended_or_is_not_known_removes_the_folder_at_once() -> None:
    agent = Agent()
    agent.run()
    agent.end()
    agent.receive(m.ForgetJob(JOB))
    agent.receive(m.ForgetJob("another"))
    agent.receive(m.ForgetJob("../../home"))
    assert agent.take(RemoveFolder) == [RemoveFolder(JOB), RemoveFolder("another")]


# ---------------------------------------------------------------- without a coordinator


def test_processes_go_on_without_a_coordinator_until_the_orphan_timeout() -> None:
    agent = Agent(orphan_s=100.0)
    agent.run()
    agent.order(worker(1))
    agent.effects = []
    agent.pass_time(99.0, answering=False)
    assert not agent.take(Signal)
    agent.pass_time(2.0, answering=False)
    assert agent.take(Signal) == [Signal(ZERO, kill=False)]
    assert agent.take(CancelFetch) == [CancelFetch(worker(1))]
    [told] = agent.take(Tell)
    assert "ending 2 processes" in told.text
    agent.pass_time(31.0, answering=False)
    assert agent.take(Signal) == [Signal(ZERO, kill=True)]
    agent.end(code=-9)
    agent.pass_time(300.0, answering=False)
    assert not agent.take(Exit)
    agent.receive(m.Pong(1, {}, b""))
    agent.tick()
    ended = agent.sent(m.ProcessEnded)
    assert {(e.index, e.document["stopped"]) for e in ended} == {(0, "orphaned"), (1, "orphaned")}


# ---------------------------------------------------------------- the agent's own end


def test_stopping_the_agent_ends_the_processes_delivers_and_says_goodbye() -> None:
    agent = Agent()
    agent.run()
    agent.order(worker(1))
    agent.effects = []
    agent.do(agent.state.stop(agent.now_s))
    assert agent.take(Signal) == [Signal(ZERO, kill=False)]
    assert agent.take(CancelFetch) == [CancelFetch(worker(1))]
    assert agent.sent(m.Heartbeat)[-1].document["draining"] is True
    agent.order(worker(2))
    reports = agent.sent(m.ProcessEnded)
    assert {(e.index, e.document["error"]) for e in reports} == {
        (1, "stopped before it was started"),
        (2, "the agent is being stopped"),
    }
    for report in reports:
        agent.receive(m.Ack(report.request, 0))
    agent.pass_time(29.0)
    assert not agent.take(Signal)
    agent.end(code=143, size=10)
    Log(agent).deliver_all()
    [ended] = agent.sent(m.ProcessEnded)
    assert (ended.document["code"], ended.document["stopped"]) == (143, "agent")
    assert not agent.sent(m.NodeLeaving)
    agent.receive(m.Ack(ended.request, 0))
    [leaving] = agent.sent(m.NodeLeaving)
    assert not agent.take(Exit)
    agent.receive(m.Ack(leaving.request, 0))
    assert agent.take(Exit) == [Exit("")]
    assert agent.tick(5.0) == []


def test_a_process_that_does_not_end_is_killed_after_the_grace_and_at_once_at_the_second_signal() -> None:
    patient, hurried = Agent(), Agent()
    for agent in (patient, hurried):
        agent.run()
        agent.do(agent.state.stop(agent.now_s))
        agent.take(Signal)
    patient.pass_time(30.0)
    assert patient.take(Signal) == [Signal(ZERO, kill=True)]
    hurried.do(hurried.state.stop(hurried.now_s))
    assert hurried.take(Signal) == [Signal(ZERO, kill=True)]


def test_an_agent_without_processes_leaves_at_once() -> None:
    agent = Agent()
    agent.do(agent.state.stop(agent.now_s))
    [leaving] = agent.sent(m.NodeLeaving)
    agent.receive(m.Ack(leaving.request, 0))
    assert agent.take(Exit) == [Exit("")]


def test_after_its_goodbye_an_agent_says_nothing_else_and_does_not_come_back() -> None:
    agent = Agent()
    agent.run()
    agent.do(agent.state.stop(agent.now_s))
    agent.end()
    [ended] = agent.sent(m.ProcessEnded)
    agent.receive(m.Ack(ended.request, 0))
    [leaving] = agent.sent(m.NodeLeaving)
    agent.effects = []
    agent.receive(m.WhoAreYou())  # to a heartbeat that was sent before
    agent.pass_time(2.0)
    assert agent.effects == [Send(leaving)]
    agent.receive(m.Ack(leaving.request, 0))
    assert agent.take(Exit) == [Exit("")]


def test_an_agent_that_never_joined_ends_at_once() -> None:
    agent = Agent(registered=False)
    agent.tick()
    agent.do(agent.state.stop(agent.now_s))
    assert agent.take(Exit) == [Exit("")]


@pytest.mark.parametrize(("signals", "longest_s"), [(1, 13.5), (2, 2.5)])
def test_an_agent_does_not_wait_long_for_a_coordinator_that_takes_nothing(signals: int, longest_s: float) -> None:
    agent = Agent()
    agent.run()
    for _ in range(signals):
        agent.do(agent.state.stop(agent.now_s))
    agent.end(size=10)
    ended_s = agent.now_s
    while not agent.take(Exit):
        agent.pass_time(0.25)
        assert agent.now_s - ended_s <= longest_s
    assert agent.sent(m.NodeLeaving)


def test_an_agent_whose_coordinator_is_away_waits_for_nothing() -> None:
    agent = Agent()
    agent.run()
    agent.pass_time(20.0, answering=False)
    agent.do(agent.state.stop(agent.now_s))
    agent.end(size=10)
    assert agent.take(Exit) == [Exit("")]
    assert not agent.sent(m.NodeLeaving)


def test_an_agent_that_has_to_register_again_while_it_stops_still_delivers() -> None:
    agent = Agent()
    agent.run()
    agent.do(agent.state.stop(agent.now_s))
    agent.receive(m.WhoAreYou())
    agent.end()
    assert not agent.take(Exit)
    [again] = agent.sent(m.RegisterNode)
    agent.receive(m.Ack(again.request, 0))
    [ended] = agent.sent(m.ProcessEnded)
    agent.receive(m.Ack(ended.request, 0))
    assert len(agent.sent(m.NodeLeaving)) == 1
