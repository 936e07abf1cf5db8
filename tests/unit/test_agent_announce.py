"""What an agent tells people while it waits, and when it need not any more."""

from __future__ import annotations

import pytest

from downpour_common import messages as m
from downpour_deploy.agent.announce import Announcer
from downpour_deploy.agent.effects import AgentFacts, Numbers
from downpour_deploy.agent.state import AgentState


class Watched:
    """An agent's state, its announcer, and a clock."""

    def __init__(self) -> None:
        self.now_s = 500.0
        facts = AgentFacts("w1", "worker", "abc", {}, 900.0, 30.0)
        self.state = AgentState(facts, Numbers(), self.now_s)
        self.announcer = Announcer("worker", "w1", "head:7077", {"slots": 4}, False)

    def pass_time(self, seconds: int, trouble: str = "") -> None:
        """As the service's loop does."""
        for _ in range(seconds * 4):
            self.now_s += 0.25
            self.state.tick(self.now_s)
            self.announcer.update(self.state, trouble, self.now_s)

    def hear(self, message: m.Message) -> None:
        """The coordinator says something."""
        self.state.received(message, self.now_s)
        self.announcer.update(self.state, "", self.now_s)


def test_waiting_is_told_every_ten_seconds_with_its_reason_and_readiness_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    agent = Watched()
    agent.pass_time(25, "unreachable")
    agent.pass_time(10, "refused")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "downpour worker w1: waiting for the coordinator at head:7077 (10 s); nobody answers there",
        "downpour worker w1: waiting for the coordinator at head:7077 (20 s); nobody answers there",
        "downpour worker w1: waiting for the coordinator at head:7077 (30 s); it does not accept our key",
    ]
    agent.hear(m.Ack(1, 0))
    agent.pass_time(5)
    told = capsys.readouterr()
    assert told.out == "downpour worker ready: node w1, joined head:7077, slots 4\n"
    assert told.err == "downpour worker w1: the coordinator at head:7077 is there\n"


def test_a_coordinator_that_goes_away_and_comes_back_is_told_of_but_not_of_a_short_absence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    agent = Watched()
    agent.pass_time(1)
    agent.hear(m.Ack(1, 0))
    capsys.readouterr()
    agent.pass_time(9)
    agent.hear(m.Pong(9, {}, b""))
    agent.pass_time(1)
    assert capsys.readouterr() == ("", "")
    agent.pass_time(10, "unreachable")
    agent.hear(m.Pong(9, {}, b""))
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "downpour worker w1: waiting for the coordinator at head:7077 (10 s); nobody answers there",
        "downpour worker w1: the coordinator at head:7077 is there",
    ]
