"""``--chaos``: what can be said, what is refused, and what becomes of it as time passes."""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

from downpour_common import failpoints
from downpour_common.errors import ConfigError
from downpour_deploy.chaos import Act, Chaos, Plan, parse


@dataclass
class Fake:
    """A process that notes what it is sent."""

    name: str
    pid: int = 100
    running: bool = True
    signals: list[tuple[signal.Signals, bool]] = field(default_factory=list)

    def send_signal(self, number: signal.Signals, alone: bool = False) -> None:
        self.signals.append((number, alone))
        if number == signal.SIGKILL:
            self.running = False


class Job:
    """Two workers and two shards under a plan; time is turned by hand."""

    def __init__(self, text: str, seed: int = 0) -> None:
        self.told: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.chaos = Chaos(parse(text, 2, 2), seed, self.told.append, self.rows.append)
        self.children = {(role, i): Fake(f"{role}/{i}") for role in ("server", "worker") for i in (0, 1)}

    def turn(self, now_s: float, clock: int = 0, training: bool = True) -> None:
        self.chaos.turn(now_s, training, clock, self.children)

    def revive(self) -> None:
        for key, child in list(self.children.items()):
            if not child.running:
                self.children[key] = Fake(child.name)

    @property
    def victims(self) -> list[str]:
        return [row["chaos"].split()[-1] for row in self.rows]


# ---------------------------------------------------------------- what can be said


@pytest.mark.parametrize(
    ("item", "act"),
    [
        ("kill:server/0@30s", Act("", "kill", "server", 0, 30.0)),
        ("kill:server/0@500ms", Act("", "kill", "server", 0, 0.5)),
        ("kill:any@2m", Act("", "kill", "", None, 120.0)),
        ("kill:worker@10s±5", Act("", "kill", "worker", None, 10.0, jitter_s=5.0)),
        ("kill:worker@10s~500ms", Act("", "kill", "worker", None, 10.0, jitter_s=0.5)),
        ("stop:worker/1@20s+5s", Act("", "stop", "worker", 1, 20.0, lasts_s=5.0)),
        ("stop:worker/1@20", Act("", "stop", "worker", 1, 20.0)),
        ("term:worker/0@15s", Act("", "term", "worker", 0, 15.0)),
        ("kill:server@every:20s", Act("", "kill", "server", None, 20.0, every=True)),
        ("kill:server@every:20s±5s", Act("", "kill", "server", None, 20.0, jitter_s=5.0, every=True)),
        ("kill:server/1@step:100", Act("", "kill", "server", 1, 100, True)),
        ("stop:server@every:step:50+1s", Act("", "stop", "server", None, 50, True, every=True, lasts_s=1.0)),
    ],
)
def test_an_act(item: str, act: Act) -> None:
    [found] = parse(item, 2, 2).acts
    assert found == Act(item, *[getattr(act, name) for name in list(Act.__slots__)[1:]])


def test_delays_become_failpoints_and_are_added_to_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse("delay:50ms, delay:worker/1:1s ,delay:server/0:1.5ms, seed:9", 2, 2)
    assert plan.delays == (
        "shard.reply.before[server]=delay:50",
        "worker.push.before[worker/1]=delay:1000",
        "shard.reply.before[server/0]=delay:1.5",
    )
    assert plan.seed == 9
    monkeypatch.setenv(failpoints.VARIABLE, "shard.receive=delay:1")
    [(name, text)] = plan.environment().items()
    assert name == failpoints.VARIABLE
    assert [f.point for f in failpoints.parse(text)] == ["shard.receive", *(d.partition("[")[0] for d in plan.delays)]
    assert Plan().environment() == {}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("kil:server/0@3s", r"--chaos kil:server/0@3s: expected kill:…, term:…, stop:…, delay:… or seed:…"),
        ("kill:server/0", r"when\? add @30s"),
        ("kill:server/2@3s", r"there is no server/2; the job's last is server/1"),
        ("kill:worker/7@3s", r"there is no worker/7; the job's last is worker/1"),
        ("kill:shard/0@3s", r"shard/0 is no process of a job"),
        ("kill:@3s", r"nothing is no process of a job"),
        ("kill:worker/-1@3s", r"worker/-1 is no process"),
        ("kill:coordinator@3s", r"the coordinator of `downpour run` is the command itself"),
        ("kill:server@soon", r"soon is no time; expected 30s"),
        ("kill:server@3h", r"3h is no time"),
        ("kill:server@3s+5s", r"only stop has an end"),
        ("kill:server@step:many", r"many is no whole number"),
        ("kill:server@every:0s", r"every 0 seconds\?"),
        ("kill:server@every:step:0", r"every 0 steps\?"),
        ("term:server/0@3s", r"only workers are asked to leave"),
        ("delay:50ms@3s", r"holds for the whole job"),
        ("delay:any:50ms", r"expected delay:50ms"),
        ("delay:", r"nothing is no time"),
        ("seed:x", r"x is no whole number"),
    ],
)
def test_nonsense_is_named(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(item, 2, 2)


def test_all_problems_are_told_together_and_nothing_is_a_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("kill:server/9@3s,kill:worker/0@1s,wait", 2, 2)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="there is nothing in it"):
        parse(" , ", 2, 2)


# ---------------------------------------------------------------- what becomes of it


def test_time_counts_from_the_beginning_of_training_and_each_act_comes_once() -> None:
    job = Job("kill:server/0@2s")
    job.turn(100.0, training=False)
    job.turn(103.0)
    job.turn(104.9)
    assert not job.told
    job.turn(105.0, clock=7)
    job.revive()
    job.turn(109.0)
    assert job.told == ["chaos: killed server/0 (pid 100) 2.0 s into the training, step 7"]
    assert job.rows == [{"chaos": "killed server/0", "clock": 7, "after_s": 2.0}]


def test_a_kill_reaches_the_process_alone_and_a_stop_all_that_it_has_started() -> None:
    job = Job("kill:server/0@0s,term:worker/0@0s,stop:worker/1@0s+2s")
    kill, term, stop = (job.children[key] for key in (("server", 0), ("worker", 0), ("worker", 1)))
    job.turn(0.0)
    assert (kill.signals, term.signals) == ([(signal.SIGKILL, True)], [(signal.SIGTERM, True)])
    assert stop.signals == [(signal.SIGSTOP, False)]
    job.turn(1.9)
    job.turn(2.0)
    job.turn(3.0)
    assert [number for number, _ in stop.signals] == [signal.SIGSTOP, signal.SIGCONT]
    assert job.told[-1].startswith("chaos: worker/1 goes on")


def test_what_was_stopped_goes_on_though_the_job_does_not_train_any_more() -> None:
    job = Job("stop:server/0@0s+1s")
    job.turn(0.0)
    job.turn(5.0, training=False)
    assert [number for number, _ in job.children["server", 0].signals] == [signal.SIGSTOP, signal.SIGCONT]


def test_what_is_not_running_is_waited_for() -> None:
    job = Job("kill:worker/1@1s")
    job.turn(0.0)
    job.children["worker", 1].running = False
    job.turn(2.0)
    job.turn(3.0, training=False)
    assert not job.told
    job.revive()
    job.turn(4.0)
    assert job.victims == ["worker/1"]


def test_steps_and_repetition() -> None:
    job = Job("kill:server/0@step:100,kill:worker/1@every:step:40,kill:server/1@every:10s")
    for now_s in range(31):
        job.turn(now_s, clock=now_s * 5)
        job.revive()
    killed = [(row["chaos"].split()[1], row["after_s"], row["clock"]) for row in job.rows]
    assert [entry for entry in killed if entry[0] == "server/0"] == [("server/0", 20, 100)]
    assert [clock for name, _, clock in killed if name == "worker/1"] == [40, 80, 120]
    assert [after for name, after, _ in killed if name == "server/1"] == [10, 20, 30]


def test_lots_follow_from_the_seed() -> None:
    def victims(text: str, seed: int) -> list[tuple[str, float]]:
        job = Job(text, seed)
        for tenth in range(1000):
            job.turn(tenth / 10)
            job.revive()
        return [(row["chaos"].split()[-1], row["after_s"]) for row in job.rows]

    text = "kill:any@every:10s±5"
    first = victims(text, 1)
    assert first == victims(text, 1) != victims(text, 2)
    assert len({name for name, _ in first}) > 2
    gaps = [later - sooner for (_, sooner), (_, later) in itertools.pairwise(first)]
    assert all(4.9 <= gap <= 15.2 for gap in gaps)
    assert victims("kill:any@every:10s±5,seed:2", 1) == victims(text, 2)


def test_a_stopped_process_is_not_chosen_again_before_it_goes_on() -> None:
    job = Job("stop:worker@every:1s+10s")
    for now_s in range(5):
        job.turn(float(now_s))
    assert sorted(job.victims) == ["worker/0", "worker/1"]
