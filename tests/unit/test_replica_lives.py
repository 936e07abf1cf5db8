"""Replicas that are groups of workers, in a job's life: they join, fail, leave and take samples as one."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_kit import MODEL, OTHER, Job, World

from downpour_common import messages as m
from downpour_common.errors import ConfigError, ProtocolError
from downpour_coordinator.agreements import LARGEST_VALUE, LONGEST_KEY, MOST_BYTES
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.roster import DRAIN_S

FREE = ["async", "ssp:2"]


def pairs(workers: int = 4, mode: str = "async", **fields: Any) -> Job:
    """A training of replicas of two."""
    return Job(workers, 1, mode, ranks=2, **fields)


def world(workers: int = 4, mode: str = "async", **fields: Any) -> World:
    """A job of replicas of two."""
    return World(workers, 1, mode, tensor=2, **fields)


def agree(job: Job, slot: int, key: str, value: bytes | None = None) -> int:
    request = job.number()
    job.say(b"worker %d" % slot, m.Agree(request, *job.me(slot), key, value or b"", value is not None))
    return request


def agreed(job: Job, request: int) -> bytes | None:
    answer = job.answer(request)
    return answer.value if isinstance(answer, m.Agreed) else None


# ---------------------------------------------------------------- agreements


def test_the_first_proposal_is_everybodys() -> None:
    job = pairs()
    waits = agree(job, 1, "plan")
    assert agreed(job, waits) is None
    first, second = agree(job, 0, "plan", b"a"), agree(job, 2, "plan", b"b")
    assert [agreed(job, n) for n in (waits, first, second, agree(job, 3, "plan"))] == [b"a"] * 4


def test_what_is_agreed_outlives_the_coordinators_process_and_who_waits_asks_again() -> None:
    job = pairs()
    agree(job, 0, "plan", b"\x00\xff")
    waits = m.Agree(job.number(), *job.me(1), "other", b"", False)
    job.say(b"worker 1", waits)
    job.restarted()
    assert agreed(job, agree(job, 3, "plan")) == b"\x00\xff"
    agree(job, 0, "other", b"c")
    assert job.answer(waits.request) is None, "where it can be reached is not known"
    job.say(b"moved", waits)
    assert job.told(b"moved") == [m.Agreed(waits.request, b"c")]


def test_a_repeat_moves_the_answer() -> None:
    job = pairs()
    waits = m.Agree(job.number(), *job.me(1), "plan", b"", False)
    job.say(b"worker 1", waits)
    job.say(b"moved", waits)
    agree(job, 0, "plan", b"a")
    assert job.told(b"moved") == [m.Agreed(waits.request, b"a")]
    assert job.told(b"worker 1") == []


def test_what_a_replica_agreed_on_is_forgotten_with_its_processes() -> None:
    job = pairs().start()
    for key in ("group/0/0", "group/1/0", "plan", "group/none/0"):
        agree(job, 0, key, b"old")
    waits = agree(job, 3, "never")
    for slot in (2, 3):
        job.replaced(slot)
    agree(job, 0, "never", b"a")
    assert agreed(job, waits) is None, "its process is no more"
    assert agreed(job, agree(job, 2, "group/1/0", b"new")) == b"new"
    assert agreed(job, agree(job, 2, "group/1/1", b"of 1")) == b"of 1"
    assert {agreed(job, agree(job, 2, k)) for k in ("group/0/0", "plan", "group/none/0")} == {b"old"}


@pytest.mark.parametrize(("key", "value"), [("k" * (LONGEST_KEY + 1), b"a"), ("key", b"a" * (LARGEST_VALUE + 1))])
def test_too_much_to_agree_on(key: str, value: bytes) -> None:
    job = pairs()
    with pytest.raises(ProtocolError, match="agree"):
        agree(job, 0, key, value)
    if len(key) > LONGEST_KEY:
        with pytest.raises(ProtocolError, match="agrees"):
            agree(job, 0, key)


def test_all_that_is_agreed_has_a_limit_too() -> None:
    job = pairs()
    for number in range(MOST_BYTES // LARGEST_VALUE - 1):
        agree(job, 0, f"key {number}", b"a" * LARGEST_VALUE)
    with pytest.raises(ProtocolError, match="too much"):
        agree(job, 0, "another", b"a" * LARGEST_VALUE)


# ---------------------------------------------------------------- samples and members


def test_samples_are_shared_among_leads() -> None:
    job, alone = pairs().start(), Job(2, 1).start()
    assert job.lease(0, total=640) == m.Lease(job._request, *_span(alone.lease(0, total=640)))
    assert job.lease(2, total=640) == m.Lease(job._request, *_span(alone.lease(1, total=640)))


def _span(lease: m.Message) -> tuple[int, int]:
    assert isinstance(lease, m.Lease)
    return lease.start, lease.stop


def test_other_ranks_have_no_samples_of_their_own() -> None:
    for job in (pairs().start(), pairs(mode="sync").start()):
        assert isinstance(job.lease(1), m.Refused)
        assert isinstance(job.answer(job.begin_pass(3, 0)), m.Refused)


def test_in_sync_a_pass_is_split_among_leads() -> None:
    job = pairs(6, "sync").start()
    parts = [job.answer(job.begin_pass(slot, 0)) for slot in (4, 0, 2)]
    assert [(p.workers, p.index) for p in parts if isinstance(p, m.PassBegins)] == [(3, 2), (3, 0), (3, 1)]


def test_where_the_data_is_depends_on_leads_and_so_do_samples() -> None:
    job = pairs().start()
    for slot, epoch in enumerate((3, 0, 2, 0)):
        job.progress(slot, 9, epoch, samples=10)
    assert job.state.data_position()[0] == 2
    job.goodbye(1, torn=7)
    assert job.state.torn == 0
    job.goodbye(0, torn=5)
    assert job.state.torn == 5


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_replica_joins_whole(mode: str) -> None:
    job = pairs(2, mode).start()
    for slot in (2, 3):
        job.state.expect(slot, 0)
    job.register_worker(3)
    if mode == "sync":
        assert isinstance(job.answer(job.begin_pass(0, 1, 5)), m.PassBegins), "nobody waits for half a replica"
    assert job.told(b"shard 0") == []
    job.register_worker(2)
    if mode == "sync":
        job.begin_pass(0, 2, 9)
    assert job.told(b"shard 0")[-1] == m.SetMembers(1, (0, 0, 1, 0, 2, 0, 3, 0))
    job.members_set(1)
    welcomes = [w for slot in (2, 3) for w in job.told(b"worker %d" % slot) if isinstance(w, m.Welcome)]
    assert [w.slots for w in welcomes] == [(0, 1, 2, 3)] * 2
    assert m.MembersChanged((0, 1, 2, 3)) in job.told(b"worker 1")


def test_one_of_another_model_keeps_its_replica_out() -> None:
    job = pairs(2).start()
    for slot in (2, 3):
        job.state.expect(slot, 0)
    job.register_worker(2)
    job.register_worker(3, OTHER)
    assert isinstance(job.told(b"worker 3")[0], m.Refused)
    assert job.told(b"shard 0") == []


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("mode", FREE)
def test_a_dead_rank_takes_its_replica_along_and_both_begin_again(mode: str) -> None:
    there = world(mode=mode, restarts=3).start()
    there.end(("worker", 3), -9)
    assert there.life.stopping() == [there.process("worker", 2)]
    assert there.process("worker", 2).stop == 0.0
    members = [t for t in there.told["server", 0] if isinstance(t, m.SetMembers)]
    assert members[-1].slots == (0, 0, 1, 0), "nobody waits for them"
    assert there.life.pending() == []
    there.end(("worker", 2), -15)
    assert [(p.key, p.epoch) for p in there.life.pending()] == [(("worker", 2), 1), (("worker", 3), 1)]
    there.place()
    assert there.life.training.live() == [0, 1, 2, 3]
    assert there.life.restarts == 1, "it is one failure"
    title = "worker/3 (replica 1, rank 1)"
    assert there.life.warnings == [f"{title} killed by signal 9 (SIGKILL); its replica is started again"]
    assert there.life.last_failure is not None
    assert there.life.last_failure.who == title


def test_a_replica_that_dies_again_and_again_is_started_later_and_later_and_as_one() -> None:
    there = world(restarts=9).start()
    for _ in range(3):
        there.end(("worker", 2), 1)
        there.obey()
        there.tick(0.0)
        after = [there.process("worker", slot) for slot in (2, 3)]
        assert len({(p.epoch, p.wait_s, p.quick) for p in after}) == 1
        there.wait(after[0].wait_s + 0.5, 0.5)
    assert after[0].wait_s > 0.0


def test_the_script_that_raised_first_is_to_blame_though_its_mate_ends_first() -> None:
    there = world(restarts=1).start()
    there.hear(("worker", 3), m.ReportFailure(*there.me(3), "ValueError: no", "Traceback of 3"))
    there.fails(2, "RuntimeError: connection closed by peer")
    there.end(("worker", 3), 1)
    failure = there.life.last_failure
    assert failure is not None
    assert (failure.who, failure.details) == ("worker/3 (replica 1, rank 1)", "Traceback of 3")
    assert there.life.warnings == [f"{failure.who} ValueError: no; its replica is started again"]
    there.place()
    there.end(("worker", 3), -9)
    assert there.life.failure is not None
    assert there.life.failure.message == "killed by signal 9 (SIGKILL)", "what was reported before is not this one's"


def test_a_lost_host_costs_one_restart() -> None:
    there = world(restarts=3).start()
    there.end(("worker", 2), None, "lost with its host")
    there.end(("worker", 3), None, "lost with its host")
    assert (there.life.restarts, len(there.life.pending())) == (1, 2)


def test_without_restarts_the_others_go_on() -> None:
    there = world(min_workers=2).start()
    there.fails(0)
    there.obey()
    assert there.life.pending() == []
    assert (there.phase, there.life.training.live()) == (Phase.TRAINING, [2, 3])
    assert there.life.warnings == ["worker/0 (replica 0, rank 0) ValueError: no; the others go on without its replica"]
    for slot in (2, 3):
        there.leave(slot)
    there.wait_for(Phase.OVER)
    assert there.life.state == "SUCCEEDED"


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_with_too_few_left_the_job_fails_and_says_which_rank(mode: str) -> None:
    there = world(mode=mode).start()
    there.fails(3, code=7)
    there.wait_for(Phase.OVER)
    assert there.life.state == "FAILED"
    failure = outcome_of(there.life, "", there.now_s).failure
    assert failure is not None
    assert (failure.who, failure.exit_code) == ("worker/3 (replica 1, rank 1)", 7)


def test_in_sync_a_replica_is_taken_over_in_its_round() -> None:
    there = world(mode="sync", restarts=1).start()
    for _ in range(3):
        there.speak()
    there.end(("worker", 1), -9)
    assert (there.life.restarts, there.life.warnings[-1]) == (
        1,
        "worker/1 (replica 0, rank 1) killed by signal 9 (SIGKILL); others take over its replica",
    )
    assert there.life.pending() == []
    there.obey()
    assert {p.index: p.epoch for p in there.life.roster.workers()} == {0: 1, 1: 1, 2: 0, 3: 0}
    assert [w.takes_over for w in there.life.training.workers.values()] == [True, True, False, False]


def test_in_sync_the_whole_job_begins_again_if_a_rank_had_said_goodbye() -> None:
    there = world(mode="sync", restarts=1).start()
    for _ in range(3):
        there.speak()
    there.wait(30.0)
    assert there.committed
    there.leave(0)
    there.end(("worker", 1), -9)
    there.wait(20.0)
    assert (there.phase, there.life.restarts, there.life.training.facts.clock) == (Phase.TRAINING, 1, 5)
    assert "started again from its last checkpoint" in there.life.warnings[-1]


def test_a_rank_that_crashes_after_its_mate_has_ended_well() -> None:
    there = world(restarts=1).start()
    there.leave(2)
    there.end(("worker", 3), -11)
    assert [(p.key, p.epoch) for p in there.life.pending()] == [(("worker", 2), 1), (("worker", 3), 1)]


def test_a_replica_that_fell_is_remembered_by_the_journal() -> None:
    there = world(restarts=1).start()
    there.end(("worker", 0), -9)
    there.restarted()
    there.speak()
    there.end(("worker", 1), -15)
    assert [p.epoch for p in there.life.pending()] == [1, 1]


def test_one_that_does_not_join_takes_its_replica_along() -> None:
    there = world(min_workers=2)
    there.deaf.add(("worker", 3))
    there.begin(2)
    there.place()
    there.wait(70.0)
    assert there.life.warnings[0] == "worker/3 has not joined within 60 s"
    there.end(("worker", 3), -9)
    there.obey()
    assert (there.phase, there.life.training.live(), there.life.pending()) == (Phase.TRAINING, [0, 1], [])


# ---------------------------------------------------------------- leaving, growing, shrinking


def test_a_drained_rank_moves_its_replica() -> None:
    there = world().start()
    there.drain(3)
    assert [(p.index, p.stop) for p in there.life.stopping()] == [(2, DRAIN_S), (3, DRAIN_S)]
    there.obey()
    assert [(p.key, p.epoch) for p in there.life.pending()] == [(("worker", 2), 1), (("worker", 3), 1)]
    there.place()
    assert (there.life.training.live(), there.life.restarts) == ([0, 1, 2, 3], 0)


def test_somebody_else_asks_a_replica_to_leave() -> None:
    there = world(restarts=1).start()
    there.leave(2, drained=True)
    assert there.process("worker", 3).stop == DRAIN_S, "it is leaving in good order, too"
    assert not there.life.training.workers[3].gone
    there.leave(3, drained=True)
    there.place()
    assert (there.life.training.live(), there.life.restarts) == ([0, 1, 2, 3], 1)
    assert there.life.last_failure is not None
    assert there.life.last_failure.reason == "PREEMPTED"


def test_scaling_is_by_whole_replicas() -> None:
    there = world().start()
    with pytest.raises(ConfigError, match="give a multiple of it, such as 2"):
        there.scale(3)
    there.scale(2)
    there.obey()
    assert there.life.training.live() == [0, 1]
    there.scale(6)
    assert [p.index for p in there.life.pending()] == [2, 3, 4, 5]
    there.place()
    assert there.life.training.live() == [0, 1, 2, 3, 4, 5]


def test_a_replica_that_falls_while_the_job_shrinks_does_not_come_back() -> None:
    there = world(restarts=2).start()
    there.end(("worker", 3), -9)
    there.scale(2)
    there.obey()
    assert there.life.pending() == []
    assert there.life.training.live() == [0, 1]


def test_quarantine_lets_the_replica_go() -> None:
    there = world(settings={"on_nan": "quarantine"}).start()
    there.hear(
        ("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "initialised": True, "non_finite": {"3": 2}})
    )
    there.settle()
    there.tick()
    assert [p.index for p in there.life.stopping()] == [2, 3]
    assert there.life.wanted == 2
    assert "worker/3 (replica 1, rank 1) sent NaN or Inf; its replica leaves" in there.life.warnings[0]
    there.obey()
    there.hear(
        ("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "initialised": True, "non_finite": {"0": 2}})
    )
    there.settle()
    there.tick()
    assert there.life.failure is not None, "nobody would be left"


def test_a_job_ends_when_all_ranks_have() -> None:
    there = world(2).start()
    there.leave(0)
    assert there.phase is Phase.TRAINING
    there.leave(1)
    assert there.phase is not Phase.TRAINING
    there.wait_for(Phase.OVER)
    outcome = outcome_of(there.life, "", there.now_s).document()
    assert (outcome["state"], outcome["replicas"], outcome["ranks"]) == ("SUCCEEDED", 1, 2)


def test_samples_are_counted_once() -> None:
    there = world().start()
    for slot in range(4):
        there.progress(slot, 3, samples=10)
    assert outcome_of(there.life, "", there.now_s).samples == 20


def test_the_model_is_the_first_workers() -> None:
    job = Job(2, 1, ranks=2)
    job.register_shard(0)
    job.register_worker(1)
    assert job.told(b"shard 0") == []
    job.register_worker(0)
    assert job.told(b"shard 0") == [m.SetUpShard(MODEL.to_wire(), "")]
