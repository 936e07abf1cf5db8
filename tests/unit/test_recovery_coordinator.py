"""The coordinator's side of recovery: shards that come back, workers that take over, what was lost, what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from coordinator_kit import MODEL, Hosts, Job, World, through_json
from test_checkpoints import save, train
from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_coordinator import checkpoints
from downpour_coordinator.losses import Lost
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.recovery import LONGEST_BACKOFF_S, SHARD_SILENT_S, WORKER_SILENT_S, whole_backoff_s

FREE = ["async", "ssp:2"]
free_modes = pytest.mark.parametrize("mode", FREE)


def moved(told: list[m.Message]) -> list[m.ShardMoved]:
    return [message for message in told if isinstance(message, m.ShardMoved)]


def back(job: Job, index: int, checkpoint: int = 3) -> None:
    """A shard that has died comes back."""
    job.carry_out(job.state.shard_resumes(index, checkpoint))
    job.register_shard(index)
    job.shard_ready(index)
    job.members_set(job.state.document()["version"], index)


# ---------------------------------------------------------------- a shard comes back


@pytest.mark.parametrize("registers_first", [True, False])
def test_a_shard_that_comes_back_is_set_up_then_told_the_members_then_the_workers_learn_of_it(
    registers_first: bool,
) -> None:
    job = Job(clock=7).start()
    job.shard_dies(1)
    if registers_first:
        job.register_shard(1)
        assert job.told(b"shard 1") == [], "where it begins is not known yet"
    job.carry_out(job.state.shard_resumes(1, 3))
    if not registers_first:
        job.register_shard(1)
    assert job.told(b"shard 1") == [m.SetUpShard(MODEL.to_wire(), "3", True, 7), m.SetMembers(1, (0, 0, 1, 0))]
    job.sent.clear()
    job.shard_ready(1)
    assert job.sent == {}, "it does not know the members yet"
    job.members_set(1, 1)
    for slot in (0, 1):
        assert job.told(b"worker %d" % slot) == [m.ShardMoved(1, 1, "address-1.1")]
    job.report(1, ready=True, members=1)
    assert job.sent == {}, "they are told once"
    assert job.state.recovering() == []


def test_the_former_process_is_not_heard_any_more() -> None:
    job = Job().start()
    job.shard_dies(1)
    for message in (m.RegisterShard(JOB, 1, 0, 1, "old"), m.ShardReport(JOB, 1, 0, {"ready": True, "members": 9})):
        job.say(b"old", message)
    assert (job.state.shards[1].address, job.state.shards[1].ready) == ("", False)
    job.report(0, ready=True)
    assert [s.index for s in job.state.recovering()] == [1]


def test_a_lost_notice_heals_with_what_the_worker_says_of_itself() -> None:
    job = Job().start()
    job.shard_dies(1)
    behind = m.Progress(*job.me(0), 1, 0, 0, 0, 0, 0, 0, 0.0, (0, 0))
    job.say(b"worker 0", behind)
    assert job.sent == {}, "there is nowhere to go yet"
    back(job, 1)
    job.sent.clear()
    job.say(b"worker 0", behind)
    assert job.told(b"worker 0") == [m.ShardMoved(1, 1, "address-1.1")]
    job.say(b"worker 0", m.Progress(*job.me(0), 1, 0, 0, 0, 0, 0, 0, 0.0, (0, 1)))
    job.say(b"worker 0", m.Progress(*job.me(0), 1, 0, 0, 0, 0, 0, 0, 0.0, ()))
    assert job.sent == {}


@free_modes
def test_who_joins_meanwhile_waits_and_is_sent_to_the_new_process(mode: str) -> None:
    job = Job(mode=mode).start()
    job.shard_dies(1)
    job.replaced(2)
    joins = job.register_worker(2)
    assert b"shard 0" not in job.sent
    back(job, 1)
    job.members_set(job.state.document()["version"])
    welcome = job.answer(joins)
    assert isinstance(welcome, m.Welcome)
    assert welcome.shards == ("address-0", "address-1.1")
    assert moved(job.told(b"worker 2")) == [], "it has just been told"
    job.shard_dies(0)
    back(job, 0)
    job.sent.clear()
    again = m.RegisterWorker(joins, *job.me(2), 202, MODEL.to_wire())
    answer = job.ask(b"worker 2", again)
    assert isinstance(answer, m.Welcome)
    assert answer.shards == ("address-0.1", "address-1.1"), "a repeat must not lead to where nobody is"


def test_leases_barriers_and_ends_go_on_meanwhile() -> None:
    job = Job().start()
    job.shard_dies(0)
    assert isinstance(job.lease(0), m.Lease)
    entered = job.enter(0)
    assert isinstance(job.goodbye(1), m.Ack)
    assert isinstance(job.answer(entered), m.Ack)
    back(job, 0)
    assert job.state.document()["members"] == [(0, 0)]
    told = job.told(b"shard 0")
    assert [t.slots for t in told if isinstance(t, m.SetMembers)] == [(0, 0)], "as they are, not as they were"
    assert moved(job.told(b"worker 1")) == [], "it has left"


def test_it_dies_again_while_it_comes_back_and_another_dies_too() -> None:
    job = Job().start()
    job.shard_dies(1)
    job.carry_out(job.state.shard_resumes(1, 3))
    job.register_shard(1)
    job.shard_dies(1)
    job.shard_dies(0)
    job.sent.clear()
    back(job, 1, 4)
    assert moved(job.told(b"worker 0")) == [m.ShardMoved(1, 2, "address-1.2")]
    back(job, 0, 4)
    assert moved(job.told(b"worker 0")) == [m.ShardMoved(0, 1, "address-0.1")]
    assert job.state.begin_snapshot(5, "folder")


def test_a_shard_that_comes_back_is_told_what_those_had_pushed_who_have_left() -> None:
    job = Job().start()
    job.ask(b"worker 1", m.Goodbye(job.number(), *job.me(1), False, 0, 3, 17))
    job.restarted()
    job.shard_dies(0)
    back(job, 0)
    told = [t for t in job.told(b"shard 0") if isinstance(t, m.SetMembers)]
    assert {t.left for t in told} == {(1, 0, 3, 17)}


def test_a_shard_that_has_come_back_is_told_again_of_each_that_leaves() -> None:
    job = Job().start()
    job.shard_dies(0)
    back(job, 0)
    job.sent.clear()
    job.ask(b"worker 1", m.Goodbye(job.number(), *job.me(1), False, 0, 0, 8))
    told = job.told(b"shard 0")
    assert [(t.slots, t.left) for t in told if isinstance(t, m.SetMembers)] == [((0, 0), (1, 0, 0, 8))]


def test_no_snapshot_while_a_shard_is_away() -> None:
    job = Job().start()
    job.shard_dies(1)
    assert job.state.begin_snapshot(1, "folder") == []
    job.carry_out(job.state.shard_resumes(1, 3))
    job.register_shard(1)
    job.shard_ready(1)
    assert job.state.begin_snapshot(1, "folder") == []
    job.members_set(1)
    assert job.state.begin_snapshot(1, "folder")


@pytest.mark.parametrize("when", ["lost", "found", "registered", "ready", "back"])
def test_the_coordinator_is_another_process_in_the_middle_of_it(when: str) -> None:
    job = Job().start()
    job.shard_dies(1)
    steps: dict[str, Any] = {
        "lost": lambda: None,
        "found": lambda: job.carry_out(job.state.shard_resumes(1, 3)),
        "registered": lambda: job.register_shard(1),
        "ready": lambda: job.shard_ready(1),
        "back": lambda: job.members_set(job.state.document()["version"], 1),
    }
    for name, step in steps.items():
        step()
        if name == when:
            job.restarted()
            break
    if not job.state.shards[1].checkpoint:
        job.carry_out(job.state.shard_resumes(1, 3))
    if when in ("lost", "found", "registered"):
        job.register_shard(1)  # it repeats that until it is set up
        job.shard_ready(1)
    version = job.state.document()["version"]
    job.report(1, ready=True, members=version if when == "back" else 0)
    if when != "back":
        assert m.SetMembers(version, (0, 0, 1, 0)) in job.told(b"shard 1")
        job.members_set(version, 1)
    job.say(b"worker 0", m.Progress(*job.me(0), 1, 0, 0, 0, 0, 0, 0, 0.0, (0, 0)))
    assert m.ShardMoved(1, 1, "address-1.1") in job.told(b"worker 0")
    assert job.state.recovering() == []


def test_what_a_shard_has_lost_counts_from_the_checkpoint_that_it_came_back_from() -> None:
    job = Job(shards=1).start()
    job.carry_out(job.state.begin_snapshot(1, "1"))
    job.taken(0, 1, lost=0, lost_pushes={})
    job.report(0, staleness={"1": 4}, clock_gap_max=3)
    job.shard_dies(0)
    back(job, 0, 1)
    job.report(0, ready=True, members=1, staleness={"1": 2}, lost=6, lost_pushes={"0": 2, "1": 1})
    assert job.state.lost() == {0: Lost(6, 3)}
    job.shard_dies(0)
    assert job.state.lost() == {0: Lost(6, 3)}, "until it is known where the next one begins"
    back(job, 0, 1)
    job.report(0, ready=True, members=2, lost=10, lost_pushes={"0": 5})
    assert job.state.lost() == {0: Lost(10, 5)}, "what the first one lost is missing here, too"
    job.carry_out(job.state.begin_snapshot(2, "2"))
    job.taken(0, 2, lost=8, lost_pushes={"0": 4})
    job.restarted()
    job.shard_dies(0)
    back(job, 0, 2)
    job.report(0, ready=True, members=3, lost=1, lost_pushes=1)
    assert job.state.lost() == {0: Lost(9, 5)}, "by checkpoint 2 eight had been lost"
    assert (job.state.staleness(), job.state.clock_gap_max()) == ({1: 6}, 3)


@pytest.mark.parametrize("document", [{"lost": -1}, {"lost_pushes": {"0": "x"}}, {"non_finite": {"a": 1}}])
def test_counts_that_are_none_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Job().start().report(0, **document)


# ---------------------------------------------------------------- a worker is taken over


def test_in_sync_another_process_takes_over_and_its_slot_stays_a_member() -> None:
    job = Job(mode="sync", epoch=2, clock=40, resume="folder").start()
    for slot in (0, 1):
        job.begin_pass(slot, 2)
    job.sent.clear()
    job.taken_over(1)
    assert job.sent == {}, "shards and the others go on waiting for it"
    request = job.register_worker(1)
    assert job.told(b"shard 0") == [m.SetMembers(1, (0, 0, 1, 1), (1,))]
    job.report(0, initialised=True)
    job.report(1, initialised=True)
    job.members_set(1)
    assert job.answer(request) == m.Welcome(
        request, ("address-0", "address-1"), True, 40, (2, 0), (0, 1), takes_over=True
    )
    assert b"worker 0" not in job.sent, "nothing has changed for it"
    assert isinstance(again := job.answer(job.begin_pass(1, 2, 43)), m.PassBegins)
    assert (again.workers, again.index) == (2, 1), "its part of the pass is the one of before"


def test_all_are_taken_over_and_a_joiner_waits_for_the_next_pass() -> None:
    job = Job(mode="sync").start()
    for slot in (0, 1):
        job.begin_pass(slot, 0)
    job.replaced(2)
    joins = job.register_worker(2)
    for slot in (0, 1):
        job.taken_over(slot)
    requests = [job.register_worker(slot) for slot in (0, 1)]
    job.members_set(job.state.document()["version"])
    assert all(isinstance(job.answer(r), m.Welcome) for r in requests)
    assert job.answer(joins) is None
    for slot in (0, 1):
        job.begin_pass(slot, 0)
    held = job.begin_pass(0, 1, 9)
    job.members_set(job.state.document()["version"])
    assert isinstance(job.answer(joins), m.Welcome)
    assert job.answer(held) == m.PassBegins(held, 3, 0)


def test_one_that_takes_over_may_die_and_be_taken_over_itself() -> None:
    job = Job(mode="sync").start()
    job.begin_pass(1, 0)
    job.taken_over(1)
    job.register_worker(1)
    job.taken_over(1)
    job.restarted()
    request = job.register_worker(1)
    job.members_set(job.state.document()["version"])
    welcome = job.answer(request)
    assert isinstance(welcome, m.Welcome)
    assert (welcome.takes_over, welcome.position) == (True, (0, 0))
    assert job.state.document()["members"] == [(0, 0), (1, 2)]


def test_the_barrier_that_the_dead_one_had_come_to_opens_without_its_successor() -> None:
    job = Job(mode="sync").start()
    dead = job.enter(1)
    job.taken_over(1)
    entered = job.enter(0)
    assert isinstance(job.answer(entered), m.Ack)
    assert job.answer(dead) is None
    assert job.state.workers[1].answers == {}, "its successor's requests have numbers of their own"


def test_the_barriers_of_the_scripts_beginning_are_behind_one_that_takes_over() -> None:
    job = Job(mode="sync").start()
    for slot in (0, 1):
        job.begin_pass(slot, 0)
    job.taken_over(1)
    job.register_worker(1)
    job.members_set(1)
    assert isinstance(job.answer(job.enter(1)), m.Ack), "the others came through it long ago"
    job.begin_pass(1, 0)
    assert job.answer(entered := job.enter(1)) is None, "this one is still to come"
    job.enter(0)
    assert isinstance(job.answer(entered), m.Ack)


def test_the_barrier_between_two_passes_is_behind_one_that_begins_in_the_second() -> None:
    job = Job(3, mode="sync").start()
    for slot in (0, 1, 2):
        job.begin_pass(slot, 0)
    job.taken_over(2)
    waits = [job.enter(0)]
    job.register_worker(2)
    job.members_set(1)
    job.begin_pass(2, 1)
    assert job.answer(waits[0]) is None, "worker 1 has still to come"
    waits.append(job.enter(1))
    assert all(isinstance(job.answer(w), m.Ack) for w in waits)
    for slot in (0, 1):
        job.begin_pass(slot, 1)
    late = job.enter(0)
    job.enter(1)
    assert job.answer(late) is None, "to the next one it comes like everybody"


# ---------------------------------------------------------------- a job's life with shards that die


@free_modes
def test_a_dead_shard_comes_back_alone(mode: str) -> None:
    world = World(mode=mode, shards=2, restarts=2).start()
    world.wait(1.0)
    assert world.committed == [1], "so that there is something to come back to"
    world.slow = True
    world.end(("server", 1), -9)
    assert (world.phase, world.life.state, world.life.restarts) == (Phase.TRAINING, "RUNNING", 1)
    assert "server/1 is coming back from the last checkpoint" in world.life.degraded
    assert [(p.name, p.epoch) for p in world.life.pending()] == [], "elsewhere its file must be brought first"
    world.work()
    assert [(p.name, p.epoch) for p in world.life.pending()] == [("server/1", 1)]
    assert "server/1 is coming back from checkpoint 1, and waits for a place" in world.life.degraded
    world.place()
    assert world.life.degraded == ""
    assert moved(world.told["worker", 0]) == [m.ShardMoved(1, 1, "address-1.1")]
    setup = [t for t in world.told["server", 1] if isinstance(t, m.SetUpShard)][-1]
    assert (setup.resume, setup.recovers, setup.clock) == ("checkpoints/000001", True, 0)
    assert world.running == {("server", 0): 0, ("server", 1): 1, ("worker", 0): 0, ("worker", 1): 0}
    assert world.life.warnings == ["server/1 killed by signal 9 (SIGKILL); it comes back from the last checkpoint"]
    world.slow = False
    world.wait(21.0)
    assert world.committed == [1, 2], "and checkpoints go on"
    world.leave(0)
    world.leave(1)
    world.wait_for(Phase.OVER)
    assert world.life.state == "SUCCEEDED"


def test_on_one_host_it_starts_while_its_checkpoint_is_looked_for() -> None:
    world = World(restarts=1)
    world.life.checkpoints.base = "/run/"
    world.start()
    world.wait(1.0)
    world.slow = True
    world.end(("server", 0), -9)
    assert world.place() == [("server", 0)]
    assert not world.life.training.shards[0].ready
    world.work()
    assert world.life.training.shards[0].serves


def test_without_a_checkpoint_of_this_run_the_job_begins_again() -> None:
    world = World(restarts=1)
    world.disk_full = "No space left on device"
    world.start()
    world.end(("server", 0), -9)
    assert world.phase is Phase.LEAVING
    world.wait_for(Phase.TRAINING)
    assert world.life.restarts == 1


def test_damaged_checkpoints_are_skipped_and_named_and_if_none_is_sound_the_job_begins_again() -> None:
    world = World(restarts=2).start()
    world.wait(22.0)
    assert world.committed == [1, 2]
    world.damaged = {2}
    world.end(("server", 0), -9)
    assert world.life.training.shards[0].checkpoint == 1
    assert "skipped a damaged checkpoint: 2 is damaged" in world.life.warnings
    world.place()
    world.damaged = {1, 2}
    world.end(("server", 0), -9)
    assert world.phase is Phase.LEAVING
    world.committed.clear()
    world.wait_for(Phase.TRAINING)
    assert world.life.restarts == 2, "one failure costs one restart"


def test_a_snapshot_under_way_is_given_up_and_made_afterwards() -> None:
    world = World(shards=2, restarts=1).start()
    world.wait(1.0)
    world.deaf.add(("server", 0))
    world.wait(20.0)
    assert world.life.training.snapshot == 2
    world.end(("server", 1), -9)
    assert (world.life.training.snapshot, world.dropped) == (0, [2])
    world.deaf.clear()
    world.place()
    world.wait(1.0)
    assert world.committed == [1, 3]


def test_a_manifest_that_is_being_written_is_waited_for() -> None:
    world = World(shards=2, restarts=1).start()
    world.wait(1.0)
    world.slow = True
    for _ in range(20):
        world.tick(1.0)
    assert len(world.held) == 1, "it is being written"
    world.end(("server", 1), -9)
    assert len(world.held) == 1, "nobody looks for one yet"
    world.work()
    world.tick()
    world.work()
    assert world.life.training.shards[1].checkpoint == 2


def test_a_shard_that_cannot_come_back_makes_the_job_begin_again() -> None:
    world = World(restarts=3).start()
    world.wait(1.0)
    world.end(("server", 0), -9)
    world.deaf.add(("server", 0))
    world.place()
    world.hear(("server", 0), m.ShardReady("job-1", 0, 1, "it has other chunks"))
    world.settle()
    assert world.life.failure is not None
    assert world.life.failure.message == "it has other chunks"
    world.deaf.clear()
    world.wait_for(Phase.TRAINING)
    assert world.life.restarts == 1, "one failure costs one restart"


def test_a_shard_that_is_not_heard_of_again_is_ended_and_started_anew() -> None:
    world = World(restarts=3).start()
    world.wait(1.0)
    world.end(("server", 0), -9)
    world.deaf.add(("server", 0))
    world.place()
    world.wait(62.0)
    assert any("has not come back within 60 s" in w for w in world.life.warnings)
    world.deaf.clear()
    world.wait(2.0)
    assert world.running["server", 0] == 2
    assert world.life.training.recovering() == []


def test_one_that_dies_again_and_again_is_started_later_and_later() -> None:
    world = World(restarts=20).start()
    world.wait(1.0)
    waits = []
    for _ in range(10):
        world.end(("server", 0), -9)
        waits.append(world.process("server", 0).wait_s)
        world.wait(waits[-1] + 1.0)
        assert world.life.training.recovering() == []
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert max(waits) == LONGEST_BACKOFF_S
    world.wait(11.0)
    world.end(("server", 0), -9)
    assert world.process("server", 0).wait_s == 0.0, "this one had lived for a while"


def test_no_restarts_left() -> None:
    world = World(restarts=0).start()
    world.wait(21.0)
    world.end(("server", 0), -9)
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.reason) == ("FAILED", "PROCESS_KILLED")


def test_in_sync_a_dead_shard_makes_the_whole_job_begin_again() -> None:
    world = World(mode="sync", restarts=1).start()
    world.wait(2.0)
    world.end(("server", 0), -9)
    world.wait_for(Phase.LEAVING)
    world.wait_for(Phase.TRAINING)
    assert world.life.restarts == 1


@free_modes
def test_a_shard_that_dies_at_the_end_comes_back_for_the_result(mode: str) -> None:
    world = World(mode=mode, shards=2, restarts=1).start()
    world.wait(1.0)
    world.deaf.add(("server", 1))
    world.leave(0)
    world.leave(1)
    assert world.phase is Phase.SAVING
    world.end(("server", 1), -9)
    world.deaf.clear()
    assert (world.phase, world.life.restarts) == (Phase.SAVING, 1)
    world.place()
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.exported) == ("SUCCEEDED", f"model of {world.committed[-1]}")


def test_in_sync_a_shard_that_dies_at_the_end_makes_the_job_begin_again() -> None:
    world = World(mode="sync", restarts=1).start()
    world.deaf.add(("server", 0))
    world.leave(0)
    world.leave(1)
    world.end(("server", 0), -9)
    world.deaf.clear()
    world.wait_for(Phase.TRAINING)
    world.leave(0)
    world.leave(1)
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.restarts) == ("SUCCEEDED", 1)


def test_all_that_is_lost_with_a_host_costs_one_restart() -> None:
    world = World(workers=3, shards=2, restarts=1).start()
    world.wait(1.0)
    for key in (("server", 0), ("server", 1)):
        world.end(key, None, "lost with its host node-server")
    assert (world.life.restarts, world.phase) == (1, Phase.TRAINING)
    world.wait(1.0)
    assert world.life.training.recovering() == []


@pytest.mark.parametrize("again", [False, True])
def test_a_jobs_recovery_goes_on_in_another_process(again: bool) -> None:
    world = World(shards=2, restarts=2).start()
    world.wait(1.0)
    world.slow = True
    world.end(("server", 1), -9)
    if again:
        world.work()
        world.place()
    world.restarted()
    world.slow = False
    world.tick()
    world.place()
    world.speak()
    world.speak()
    assert world.life.training.recovering() == []
    assert world.running["server", 1] == 1


# ---------------------------------------------------------------- … and with workers that do


def test_in_sync_a_dead_worker_is_taken_over_at_once() -> None:
    world = World(mode="sync", restarts=2).start()
    world.end(("worker", 1), -9)
    assert (world.phase, world.life.failure, world.life.restarts) == (Phase.TRAINING, None, 1)
    assert world.life.degraded == "worker/1 is being replaced"
    assert [(p.name, p.epoch) for p in world.life.pending()] == [("worker/1", 1)]
    world.place()
    welcome = world.told["worker", 1][-1]
    assert isinstance(welcome, m.Welcome)
    assert welcome.takes_over
    assert world.life.degraded == ""
    world.leave(0)
    world.end(("worker", 1), -9)
    assert world.phase is Phase.TRAINING, "that the others have finished does not end the job"
    world.tick()
    world.place()
    world.wait(1.0)
    world.leave(1)
    world.wait_for(Phase.OVER)
    assert world.life.state == "SUCCEEDED"


@pytest.mark.parametrize(("compress", "in_place"), [("pull=bf16", True), ("push=bf16", False), ("pull=1bit", False)])
def test_in_sync_one_that_takes_what_it_owes_along_is_not_taken_over(compress: str, in_place: bool) -> None:
    world = World(mode="sync", restarts=2, compress=compress).start()
    world.end(("worker", 1), -9)
    assert (world.phase is Phase.TRAINING) == in_place
    assert world.life.failure is None or not in_place


def test_in_sync_without_restarts_the_job_fails() -> None:
    world = World(mode="sync").start()
    world.end(("worker", 1), -9)
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.reason) == ("FAILED", "PROCESS_KILLED")


def test_in_sync_one_that_was_to_leave_is_taken_over_by_one_that_leaves() -> None:
    world = World(workers=3, mode="sync", restarts=1).start()
    world.scale(2)
    world.end(("worker", 2), -9)
    assert world.phase is Phase.TRAINING
    world.place()
    world.tick()
    assert [(p.name, p.epoch) for p in world.life.stopping()] == [("worker/2", 1)]
    world.obey()
    world.tick()
    assert world.life.training.live() == [0, 1]
    assert world.life.pending() == []


def test_in_sync_one_that_has_left_is_not_taken_over() -> None:
    world = World(mode="sync", restarts=1).start()
    world.hear(("worker", 1), m.Goodbye(world.number(), *world.me(1), False, 0))
    world.settle()
    world.end(("worker", 1), -9)
    assert world.phase is Phase.LEAVING, "it was done, but not well"


def test_nothing_that_waits_is_forgotten_by_the_journal() -> None:
    world = World(mode="sync", restarts=9).start()
    for _ in range(3):
        world.end(("worker", 1), -9)
        world.wait(3.0)
    world.end(("worker", 1), -9)
    process = world.process("worker", 1)
    assert (process.epoch, process.wait_s, process.quick) == (4, 2.0, 4)
    before = through_json(world.life.document())
    world.restarted()
    after = through_json(world.life.document())
    assert [p | {"since_s": 0} for p in after["processes"]] == [p | {"since_s": 0} for p in before["processes"]]
    assert world.life.pending() == []
    world.speak()
    world.wait(3.0)
    assert world.life.training.live() == [0, 1]


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("way", ["fail", "skip"])
def test_workers_that_send_nan_are_named(way: str) -> None:
    world = World(settings={"on_nan": way}).start()
    world.hear(("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "non_finite": {"1": 3}}))
    world.settle()
    assert world.life.remarks == ["worker/1 sent NaN or Inf in 3 contributions, which were left out"]
    assert outcome_of(world.life, "out", world.now_s).document()["non_finite"] == {"worker/1": 3}
    assert world.phase is Phase.TRAINING


@pytest.mark.parametrize("mode", [*FREE, "sync"])
def test_quarantine_lets_the_worker_go_while_enough_are_left(mode: str) -> None:
    world = World(mode=mode, restarts=1, min_workers=1, settings={"on_nan": "quarantine"}).start()
    report = m.ShardReport("job-1", 0, 0, {"ready": True, "non_finite": {"1": 1}})
    for _ in range(2):
        world.hear(("server", 0), report)
        world.settle()
    assert [p.name for p in world.life.stopping()] == ["worker/1"]
    world.obey()
    world.wait(1.0)
    assert (world.life.training.live(), world.life.restarts, world.phase) == ([0], 0, Phase.TRAINING)
    assert any("quarantine" in w for w in world.life.warnings)
    world.hear(("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "non_finite": {"0": 1, "1": 1}}))
    world.settle()
    assert world.life.failure is not None
    assert (world.life.failure.reason, world.life.failure.index) == ("NON_FINITE", 0)


def test_rollback_begins_again_from_the_last_checkpoint() -> None:
    world = World(restarts=1, settings={"on_nan": "rollback"}).start()
    world.wait(1.0)
    report = m.ShardReport("job-1", 0, 0, {"ready": True, "non_finite": {"1": 1}})
    world.hear(("server", 0), report)
    world.settle()
    assert world.phase is Phase.LEAVING
    world.wait_for(Phase.TRAINING)
    assert world.life.training.facts.resume == "checkpoints/000001"
    assert world.life.last_failure is not None
    assert world.life.last_failure.reason == "NON_FINITE"
    world.hear(("server", 0), m.ShardReport("job-1", 0, 1, {"ready": True, "non_finite": {"1": 1}}))
    world.settle()
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.reason) == ("FAILED", "NON_FINITE")


# ---------------------------------------------------------------- words


def test_what_is_silent_is_named_until_it_speaks() -> None:
    world = World().start()
    world.speak()
    world.tick(SHARD_SILENT_S + 1.0)
    assert world.life.degraded == "server/0 has not been heard of for 6 s"
    world.tick(WORKER_SILENT_S)
    assert "worker/1 has not been heard of for 16 s" in world.life.degraded
    world.speak()
    world.tick()
    assert world.life.degraded == ""
    world.restarted()
    world.tick()
    assert world.life.degraded == "", "another coordinator has heard nobody yet"
    world.tick(SHARD_SILENT_S + 1.0)
    assert "server/0" in world.life.degraded


def test_lost_pushes_are_told_in_words_and_numbers() -> None:
    world = World(shards=2).start()
    report = {"ready": True, "lost": 6, "lost_pushes": {"0": 2, "1": 1}}
    world.hear(("server", 1), m.ShardReport("job-1", 1, 0, report))
    world.hear(("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "lost": 1, "lost_pushes": 1}))
    world.settle()
    document = outcome_of(world.life, "out", world.now_s).document()
    assert document["warnings"] == ["1 push was lost with server/0", "3 pushes were lost with server/1"]
    assert (document["lost_pushes"], document["lost"]) == (4, {"server/0": 1, "server/1": 6})


def test_the_first_beginning_anew_does_not_wait() -> None:
    assert [whole_backoff_s(n) for n in (1, 2, 3, 10_000)] == [0.0, 2.0, 4.0, LONGEST_BACKOFF_S]


# ---------------------------------------------------------------- in a cluster, and on disk


def test_in_a_cluster_a_shard_is_placed_elsewhere_and_fetches_its_own_file_only() -> None:
    hosts = Hosts()
    hosts.add("s1", "server")
    hosts.add("s2", "server")
    hosts.add("w1")
    record = hosts.submit(workers=2, shards=2, restarts=1)
    hosts.join(record)
    for index in (0, 1):
        entry = {"file": f"shard-{index}.safetensors", "bytes": 5, "sha256": "5" * 64, "chunks": {}}
        entry |= {"trainable_versions": [5], "position": []}
        hosts.say(b"x", m.SnapshotTaken(record.job, index, 0, 1, "", entry))
    assert record.life.checkpoints.committed == 1
    lost = record.life.processes["server", 0].node
    hosts.agents[lost].silent = True
    hosts.wait(hosts.node_timeout_s + 2.0)
    process = record.life.processes["server", 0]
    assert (process.epoch, process.running, process.node != lost) == (1, True, True)
    start = hosts.agents[process.node].starts[-1]
    assert (start.role, start.index, start.epoch) == ("server", 0, 1)
    assert start.document["fetch"] == ["checkpoints/000001/manifest.json", "checkpoints/000001/shard-0.safetensors"]
    assert (start.document["resume"], start.document["shard_epoch"]) == ("checkpoints/000001", 1)
    hosts.restarted()
    record = hosts.cluster.jobs[record.job]
    hosts.join(record)
    assert record.life.training.recovering() == []


def test_only_what_the_shard_needs_is_looked_at(tmp_path: Path) -> None:
    drivers = train(model(tensor("a", 700)), 2, 1024)
    for number in (1, 2, 3):
        save(tmp_path, drivers, number)
    assert checkpoints.newest_for(str(tmp_path), 0, (1,)) == (3, ())
    path = tmp_path / "checkpoints" / "000003" / "shard-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.newest_for(str(tmp_path), 0, (1,)) == (3, ())
    number, skipped = checkpoints.newest_for(str(tmp_path), 0, (0, 1))
    assert (number, len(skipped)) == (2, 1)
    assert os.fspath(path) in skipped[0]
    assert checkpoints.newest_for(str(tmp_path), 2, (0,))[0] == 0, "those of before are not this run's"


def test_a_checkpoint_under_way_when_the_job_fails_does_not_count() -> None:
    world = World(shards=2, restarts=0).start()
    world.deaf.add(("server", 0))
    world.wait(70.0, step_s=5.0)
    number = world.life.training.snapshot
    assert number
    world.end(("worker", 1), -9)
    assert world.phase is Phase.LEAVING
    assert (world.life.training.snapshot, world.dropped[-1]) == (0, number)
