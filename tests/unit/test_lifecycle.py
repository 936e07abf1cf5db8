"""A job's life: each way from phase to phase, each way to fail, and that it always comes to an end."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_kit import World, through_json
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common.errors import ConfigError, ProtocolError
from downpour_coordinator.checkpointing import RETRY_S
from downpour_coordinator.ending import CANCEL_GRACE_S, CLOSE_S, KEEP_S
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.phases import Phase
from downpour_coordinator.recovery import LONG_S, LONGEST_BACKOFF_S

MODES = ["async", "ssp:2", "sync"]
modes = pytest.mark.parametrize("mode", MODES)


def over(world: World, state: str, reason: str = "") -> World:
    """Time passes and orders are obeyed until the job is over, which must be so."""
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.reason) == (state, reason)
    assert world.running == {}
    return world


def told(world: World, role: str, index: int, kind: type[m.Message]) -> list[m.Message]:
    return [message for message in world.told.get((role, index), []) if isinstance(message, kind)]


# ---------------------------------------------------------------- the straight way


@modes
def test_a_job_that_goes_well(mode: str) -> None:
    world = World(mode=mode, shards=2)
    assert (world.life.state, world.life.reason, world.phase) == ("PENDING", "QUEUED", Phase.QUEUED)
    assert world.life.pending() == []
    world.prepares = False
    world.begin()
    assert (world.life.state, world.life.reason, world.phase) == ("STARTING", "STARTING", Phase.STARTING)
    assert world.life.waiting_for() == ["worker/0", "worker/1"]
    world.prepares = True
    world.speak()
    assert (world.life.state, world.phase, world.life.waiting_for()) == ("RUNNING", Phase.TRAINING, [])
    world.leave(0)
    assert world.phase is Phase.TRAINING
    world.slow = True
    world.leave(1)
    assert (world.phase, world.life.state) == (Phase.SAVING, "STOPPING")
    world.work()
    assert world.phase is Phase.EXPORTING
    assert [p.key for p in world.life.stopping()] == [], "the shards are needed should the export be repeated"
    world.work()
    assert world.life.model == world.exported
    over(world, "SUCCEEDED")
    assert told(world, "server", 0, m.StopShard)
    assert all(p.code == 0 for p in world.life.processes.values())
    assert world.life.warnings == []


def test_processes_are_wanted_shards_first() -> None:
    world = World(workers=2, shards=2)
    world.life.begin(0.0)
    assert [p.name for p in world.life.pending()] == ["server/0", "server/1", "worker/0", "worker/1"]
    world.life.placed("server", 0, "node", 0.0)
    assert [p.name for p in world.life.pending()] == ["server/1", "worker/0", "worker/1"]


def test_messages_before_and_after_are_nonsense() -> None:
    world = World()
    hello = m.RegisterShard("job-1", 0, 0, 1, "address")
    with pytest.raises(ProtocolError):
        world.life.handle(b"early", hello, 0.0)
    world.start().cancel()
    over(world, "CANCELLED", "CANCELLED")
    with pytest.raises(ProtocolError):
        world.life.handle(b"late", hello, 0.0)


def test_a_pid_is_that_of_the_process_that_is_there_now() -> None:
    world = World(restarts=1).start()
    assert world.process("worker", 1).pid == 201
    assert world.process("server", 0).pid == 100
    world.end(("worker", 1), -9)
    world.place()
    world._do(world.life.handle(b"old", m.RegisterWorker(99, "job-1", 1, 0, 666, {}), world.now_s))
    assert world.process("worker", 1).pid == 201


def test_what_cannot_happen_changes_nothing() -> None:
    world = World().start()
    before = through_json(world.life.document())
    for key, epoch in [(("worker", 9), 0), (("worker", 0), 5), (("somebody", 0), 0)]:
        assert world.life.ended(key, epoch, 1, world.now_s) == []
    assert world.life.exported("path", "", world.now_s) == []
    assert world.life.checkpoint_found(world.life.training.facts, world.now_s) == []
    assert through_json(world.life.document()) == before


# ---------------------------------------------------------------- how it fails


def _fails(world: World) -> Any:
    world.wait_for(Phase.OVER)
    assert world.life.state == "FAILED"
    assert world.life.failure is not None
    assert world.life.reason == world.life.failure.reason
    assert world.running == {}
    return world.life.failure


@modes
def test_a_script_that_raises(mode: str) -> None:
    world = World(mode=mode).start()
    world.fails(1, "ValueError: no")
    assert world.life.state == "STOPPING"
    failure = _fails(world)
    assert (failure.role, failure.index, failure.exit_code) == ("worker", 1, 1)
    assert (failure.reason, failure.message, failure.host) == ("SCRIPT_FAILED", "ValueError: no", "node-worker")
    assert failure.details.endswith("ValueError: no")
    assert told(world, "worker", 0, m.ShouldStop), "the others learn of it before they are ended"


def test_a_process_that_is_killed() -> None:
    world = World().start()
    world.end(("worker", 0), -9, tail=("one", "two"))
    failure = _fails(world)
    assert (failure.reason, failure.exit_code, failure.details) == ("PROCESS_KILLED", 137, "one\ntwo")
    assert "SIGKILL" in failure.message


@pytest.mark.parametrize("key", [("worker", 0), ("server", 0)])
def test_a_host_that_is_lost(key: tuple[str, int]) -> None:
    world = World().start()
    world.end(key, None, "lost with its host")
    failure = _fails(world)
    assert (failure.reason, failure.message, failure.role) == ("NODE_LOST", "lost with its host", key[0])


@pytest.mark.parametrize("key", [("worker", 0), ("server", 0)])
def test_a_process_that_cannot_be_started(key: tuple[str, int]) -> None:
    world = World()
    world.prepares = False
    world.begin()
    world.end(key, -15, "its code does not match its digest")
    failure = _fails(world)
    assert (failure.reason, failure.exit_code) == ("NOT_STARTED", 1)
    assert failure.message == "its code does not match its digest"


def test_a_script_that_never_calls_prepare() -> None:
    world = World(restarts=3)
    world.prepares = False
    world.begin()
    world.end(("worker", 0), 0)
    assert _fails(world).reason == "NO_PREPARE", "nor would it the next time"


def test_a_worker_that_ends_without_leaving() -> None:
    world = World().start()
    world.end(("worker", 0), 0)
    failure = _fails(world)
    assert (failure.reason, failure.exit_code) == ("PROCESS_FAILED", 1)


def test_a_shard_that_ends_by_itself() -> None:
    world = World().start()
    world.end(("server", 0), 3)
    assert (_fails(world).reason, world.life.failure and world.life.failure.exit_code) == ("PROCESS_FAILED", 3)


def test_a_job_that_does_not_come_together() -> None:
    world = World()
    world.prepares = False
    world.begin()
    world.wait(59.0)
    assert world.phase is Phase.STARTING
    failure = _fails(world)
    assert failure.reason == "START_TIMEOUT"
    assert "worker/0, worker/1" in failure.message


def test_the_time_to_start_begins_when_all_have_a_place() -> None:
    world = World()
    world.life.begin(world.now_s)
    for _ in range(500):
        world.tick(1.0)
    assert world.phase is Phase.STARTING, "it waits for room as long as it takes"
    world.prepares = False
    world.place()
    world.wait(59.0)
    assert world.phase is Phase.STARTING
    assert _fails(world).reason == "START_TIMEOUT"


def test_a_result_that_cannot_be_written() -> None:
    world = World(restarts=3)
    world.disk_full = "No space left on device"
    world.start()
    world.leave(0)
    world.leave(1)
    failure = _fails(world)
    assert (failure.reason, failure.exit_code) == ("RESULT_NOT_WRITTEN", 74)
    assert "No space left on device" in failure.message
    assert world.dropped == [1, 2, 3, 4], "the one of the beginning, and the last, three times"


def test_the_last_checkpoint_is_tried_again() -> None:
    world = World().start()
    world.disk_full = "No space left on device"
    world.leave(0)
    world.leave(1)
    assert (world.phase, world.dropped) == (Phase.SAVING, [1])
    world.disk_full = ""
    world.wait(5.0)
    assert (world.life.state, world.committed) == ("SUCCEEDED", [2])


def test_an_export_that_fails() -> None:
    world = World().start()
    world.slow = True
    world.leave(0)
    world.leave(1)
    world.work()
    world.held.clear()
    world._do(world.life.exported("", "disk full", world.now_s))
    assert _fails(world).reason == "RESULT_NOT_WRITTEN"


def test_shards_that_do_not_answer_at_the_end() -> None:
    world = World().start()
    world.deaf.add(("server", 0))
    world.leave(0)
    world.leave(1)
    world.wait(29.0)
    assert world.phase is Phase.SAVING
    world.wait(3.0)
    assert len(told(world, "server", 0, m.TakeSnapshot)) > 3, "they were asked again and again"
    world.deaf.clear()
    assert _fails(world).reason == "RESULT_NOT_WRITTEN"


@pytest.mark.parametrize(("interrupted", "limit_s", "fewest"), [(False, 30.0, 10), (True, KEEP_S, 2)])
def test_a_few_lost_messages_do_not_lose_the_last_checkpoint(interrupted: bool, limit_s: float, fewest: int) -> None:
    """What it may take is short, and any request or answer may be lost: there are many attempts in that time."""
    world = World().start()
    world.deaf.add(("server", 0))
    if interrupted:
        world.stop()
    else:
        world.leave(0)
        world.leave(1)
    world.wait(limit_s - (1.5 if interrupted else 3.0), 0.25)
    asked = told(world, "server", 0, m.TakeSnapshot)
    assert len(set(map(str, asked))) == 1, "one attempt, under one number"
    assert len(asked) >= fewest
    world.deaf.clear()
    world.wait(3.0, 0.25)
    assert len(world.committed) == 1
    over(world, *(("CANCELLED", "INTERRUPTED") if interrupted else ("SUCCEEDED", "")))


def test_an_error_reported_by_an_earlier_process_is_not_this_ones() -> None:
    world = World(restarts=1).start()
    world.fails(1, "ValueError: no")
    world.place()
    world.end(("worker", 1), 9)
    assert _fails(world).message == "exit code 9"


def test_the_first_failure_counts() -> None:
    world = World().start()
    world.fails(1, "ValueError: first")
    world.fails(0, "PeerTimeout: second")
    assert _fails(world).message == "ValueError: first"


def test_something_outside_of_the_processes_goes_wrong() -> None:
    from downpour_coordinator.processes import Failure

    world = World().start()
    world._do(world.life.fail(Failure("run", -1, 74, "no", reason="RESULT_NOT_WRITTEN"), world.now_s))
    assert _fails(world).reason == "RESULT_NOT_WRITTEN"


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_taken_in_time_and_asked_for_again() -> None:
    world = World().start()
    world.deaf.add(("server", 0))
    world.wait(19.0)
    assert told(world, "server", 0, m.TakeSnapshot) == []
    world.wait(2.0)
    assert told(world, "server", 0, m.TakeSnapshot) == [m.TakeSnapshot(1, "checkpoints/000001", -1)]
    world.deaf.clear()
    world.wait(RETRY_S + 1.0)
    assert world.committed == [1]
    world.wait(21.0)
    assert world.committed == [1, 2]


def test_a_lost_request_is_repeated_even_if_checkpoints_are_wanted_every_second() -> None:
    world = World(settings={"checkpoint_s": 1.0}).start()
    world.deaf.add(("server", 0))
    world.wait(2.0)
    world.deaf.clear()
    world.wait(RETRY_S + 2.0)
    assert world.committed[0] == 1


def test_a_checkpoint_that_fails_makes_the_job_degraded_until_one_succeeds() -> None:
    world = World().start()
    world.disk_full = "No space left on device"
    world.wait(10.0)
    world.speak()
    world.wait(10.0)
    assert (world.life.degraded, world.dropped) == ("", [1]), "that may happen once"
    world.wait(3 * RETRY_S)
    assert "No space left on device" in world.life.degraded
    assert world.life.state == "RUNNING"
    assert 3 < len(world.dropped) < 12, "it is tried again, less and less often"
    world.disk_full = ""
    world.speak()
    world.wait(RETRY_S + 1.0)
    assert (world.life.degraded, world.committed) == ("", [world.dropped[-1] + 1])


def test_a_shard_that_dies_once_all_is_on_disk_takes_no_result_away() -> None:
    world = World().start()
    world.slow = True
    world.leave(0)
    world.leave(1)
    world.end(("server", 0), -9)
    world.tick()
    assert world.phase is Phase.SAVING
    over(world, "SUCCEEDED")
    assert world.exported


def test_a_shard_that_dies_before_does() -> None:
    world = World(shards=2).start()
    world.deaf.add(("server", 1))
    world.leave(0)
    world.leave(1)
    world.end(("server", 1), -9)
    assert _fails(world).reason == "RESULT_NOT_WRITTEN"


# ---------------------------------------------------------------- interruptions


@modes
def test_an_interrupted_job_leaves_a_checkpoint(mode: str) -> None:
    world = World(mode=mode).start()
    world.slow = True
    world.stop()
    assert (world.phase, world.life.state, world.life.reason) == (Phase.KEEPING, "STOPPING", "INTERRUPTED")
    assert told(world, "worker", 0, m.ShouldStop)
    request = told(world, "server", 0, m.TakeSnapshot)[-1]
    assert isinstance(request, m.TakeSnapshot)
    assert (request.at_clock >= 0) == (mode == "sync"), "while the workers still run"
    assert world.life.stopping() == []
    world.work()
    assert {p.name for p in world.life.stopping()} == {"worker/0", "worker/1"}
    over(world, "CANCELLED", "INTERRUPTED")
    assert world.committed == [1]
    assert any("--resume" in w for w in world.life.warnings)
    assert world.exported == ""


@modes
def test_an_interrupted_job_tries_once_more_after_its_workers(mode: str) -> None:
    world = World(mode=mode).start()
    world.deaf.add(("server", 0))
    world.stop()
    world.wait(KEEP_S + 1.0)
    assert world.phase is Phase.SAVING
    world.deaf.clear()
    world.wait(RETRY_S + 1.0)
    over(world, "CANCELLED", "INTERRUPTED")
    assert len(world.committed) == 1


def test_an_interrupted_job_without_a_checkpoint_says_so() -> None:
    world = World().start()
    world.disk_full = "No space left on device"
    world.stop()
    over(world, "CANCELLED", "INTERRUPTED")
    assert world.committed == []
    assert any("No space left on device" in w for w in world.life.warnings)


def test_an_interruption_before_training_keeps_nothing() -> None:
    world = World()
    world.prepares = False
    world.begin()
    world.stop()
    over(world, "CANCELLED", "INTERRUPTED")
    assert any("had not begun" in w for w in world.life.warnings)


def test_an_interruption_that_comes_too_late_changes_nothing() -> None:
    world = World().start()
    world.slow = True
    world.leave(0)
    world.leave(1)
    world.stop()
    over(world, "SUCCEEDED")
    assert world.exported


def test_scripts_that_end_well_when_told_to_stop_have_a_result() -> None:
    world = World().start()
    world.deaf.add(("server", 0))
    world.stop()
    world.leave(0)
    world.leave(1)
    assert world.phase is Phase.SAVING
    world.deaf.clear()
    over(world, "SUCCEEDED")
    assert world.exported
    assert any("ended well" in w for w in world.life.warnings)


def test_shards_that_are_gone_end_the_wait_for_a_checkpoint() -> None:
    world = World().start()
    world.deaf.add(("server", 0))
    world.stop()
    world.end(("server", 0), -9)
    assert world.phase is Phase.LEAVING
    over(world, "CANCELLED", "INTERRUPTED")


@pytest.mark.parametrize("phase", ["STARTING", "TRAINING", "KEEPING", "LEAVING", "SAVING", "EXPORTING", "CLOSING"])
def test_a_second_interruption_ends_everything_at_once(phase: str) -> None:
    world = _in(phase)
    world.stop()
    if world.phase is not Phase.OVER:
        world.stop()
        assert world.phase is Phase.ENDING
        assert all(p.stop == 0.0 for p in world.life.stopping())
        assert {p.key for p in world.life.stopping()} == set(world.running)
    world.deaf.clear()
    world.wait_for(Phase.OVER)
    assert world.life.state == ("SUCCEEDED" if phase == "CLOSING" else "CANCELLED")


def _in(phase: str) -> World:
    """A job in this phase, in which it stays while nobody obeys."""
    world = World(restarts=1, shards=2)
    world.slow = True
    if phase == "QUEUED":
        return world
    world.prepares = phase != "STARTING"
    world.begin()
    if phase in ("KEEPING", "LEAVING"):
        world.deaf.add(("server", 0))
        world.stop()
        if phase == "LEAVING":
            world.tick(KEEP_S + 1.0)
    if phase in ("SAVING", "EXPORTING", "CLOSING"):
        world.leave(0)
        world.leave(1)
        if phase != "SAVING":
            world.work()
        if phase == "CLOSING":
            world.deaf.add(("server", 1))
            world.work()
            world.tick()
    if phase in ("ENDING", "WAITING"):
        world.deaf.add(("server", 1))
        world.end(("server", 0), -9)
        while world.phase is Phase.LEAVING:
            world.tick()
            world.obey()
        if phase == "WAITING":
            world.deaf.clear()
            world.obey()
    assert world.phase == phase
    return world


@pytest.mark.parametrize("phase", list(Phase)[:-1])
def test_a_job_can_be_cancelled_at_any_time(phase: Phase) -> None:
    world = _in(str(phase))
    interrupted = world.life.interrupted
    world.cancel()
    assert world.phase not in (Phase.QUEUED, Phase.WAITING, Phase.KEEPING, Phase.SAVING, Phase.EXPORTING)
    world.deaf.clear()
    world.wait_for(Phase.OVER)
    assert world.running == {}
    if phase is Phase.CLOSING:
        assert world.life.state == "SUCCEEDED", "there was its result already"
    elif phase is Phase.ENDING:
        assert world.life.state == "FAILED", "it had failed before"
    else:
        assert (world.life.state, world.life.reason) == ("CANCELLED", interrupted or "CANCELLED")
    assert world.life.restarts == (1 if phase is Phase.WAITING else 0)


def test_cancelled_processes_get_little_time() -> None:
    world = World(settings={"grace_s": 600.0}).start()
    world.deaf.add(("server", 0))
    world.cancel()
    world.tick()
    assert {p.stop for p in world.life.stopping()} == {CANCEL_GRACE_S}
    world.obey()
    assert {p.stop for p in world.life.stopping()} == {CANCEL_GRACE_S}
    assert {p.role for p in world.life.stopping()} == {"server"}, "shards are not waited for"


def test_shards_that_do_not_end_by_themselves_are_ended() -> None:
    world = World().start()
    world.slow = True
    world.leave(0)
    world.leave(1)
    world.work()
    world.deaf.add(("server", 0))
    world.work()
    world.tick()
    assert world.phase is Phase.CLOSING
    world.tick(CLOSE_S + 0.1)
    assert [p.name for p in world.life.stopping()] == ["server/0"]
    world.deaf.clear()
    over(world, "SUCCEEDED")


# ---------------------------------------------------------------- restarts of the whole job


def test_a_job_begins_again_from_its_last_checkpoint() -> None:
    world = World(restarts=2, mode="sync").start()
    world.wait(5.0)
    assert world.committed == [], "the shards' pace is not known yet"
    world.speak()
    world.speak()
    world.wait(2.0)
    assert world.committed == [1], "there is something to begin again from as soon as may be"
    world.slow = True
    world.end(("server", 0), -9)
    assert world.life.state == "STOPPING"
    for _ in range(3):
        world.tick()
        world.obey()
    assert (world.phase, world.life.state, world.life.reason) == (Phase.WAITING, "RESTARTING", "PROCESS_KILLED")
    assert (world.life.restarts, world.life.failure) == (1, None)
    assert world.life.training.begun is False
    world.slow = False
    world.work()
    assert world.phase is Phase.QUEUED, "the first time it does not wait"
    world.place()
    assert world.phase is Phase.TRAINING
    facts = world.life.training.facts
    assert (facts.resume, facts.clock, facts.shard_epoch) == ("checkpoints/000001", 5, 1)
    assert world.running == {("server", 0): 1, ("worker", 0): 1, ("worker", 1): 1}
    setup = told(world, "server", 0, m.SetUpShard)[-1]
    assert isinstance(setup, m.SetUpShard)
    assert setup.resume == "checkpoints/000001"
    assert "started again" in world.life.warnings[-1]
    world.speak()
    world.speak()
    world.wait(25.0)
    assert world.committed == [1, 2], "numbers are never used twice"
    world.leave(0)
    world.leave(1)
    over(world, "SUCCEEDED")


def test_restarts_are_limited_and_wait_longer_each_time() -> None:
    world = World(restarts=7, mode="sync").start()
    waits = []
    for _ in range(7):
        world.end(("server", 0), -9)
        since_s = world.now_s
        world.wait_for(Phase.TRAINING)
        waits.append(world.now_s - since_s)
        assert world.life.training.facts.shard_epoch == world.life.restarts == len(waits)
    assert all(w == pytest.approx(e, abs=1.5) for w, e in zip(waits, [0, 2, 4, 8, 16, 32, 60], strict=True)), waits
    assert waits[-1] <= LONGEST_BACKOFF_S + 1.5
    world.end(("server", 0), -9)
    assert _fails(world).reason == "PROCESS_KILLED"


def test_many_restarts_do_not_overflow() -> None:
    world = World(restarts=100_000, mode="sync").start()
    world.life.restarts = world.life._begun_again = 50_000
    world.end(("server", 0), -9)
    world.wait_for(Phase.WAITING)
    world.wait_for(Phase.TRAINING)


def test_a_job_that_has_trained_for_long_begins_again_at_once() -> None:
    world = World(restarts=3, mode="sync").start()
    for _ in range(3):
        world.wait(LONG_S + 1.0)
        world.end(("server", 0), -9)
        since_s = world.now_s
        world.wait_for(Phase.TRAINING)
        assert world.now_s - since_s < 1.5


def test_a_job_that_failed_to_start_begins_again_too() -> None:
    world = World(restarts=1)
    world.prepares = False
    world.begin()
    world.end(("worker", 0), None, "lost with its host")
    world.prepares = True
    world.wait_for(Phase.TRAINING)
    assert (world.life.state, world.life.reason) == ("RUNNING", "")


def test_looking_for_a_checkpoint_is_repeated_and_counts_once() -> None:
    world = World(restarts=1, mode="sync").start()
    world.slow = True
    world.end(("server", 0), -9)
    for _ in range(3):
        world.tick()
        world.obey()
    assert world.phase is Phase.WAITING
    for _ in range(8):
        world.tick(RETRY_S)
    assert len(world.held) > 3
    world.work()
    world.place()
    assert world.phase is Phase.TRAINING
    assert world.running[("worker", 0)] == 1


def test_stale_processes_of_before_are_not_heard() -> None:
    world = World(restarts=1, mode="sync").start()
    world.end(("server", 0), -9)
    world.wait_for(Phase.LEAVING)
    world.wait_for(Phase.TRAINING)
    world._do(world.life.handle(b"old", m.ShardReport("job-1", 0, 0, {"staleness": {"7": 1}}), world.now_s))
    assert world.life.training.staleness() == {}


# ---------------------------------------------------------------- workers come and go


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_a_lost_worker_is_replaced(mode: str) -> None:
    world = World(mode=mode, restarts=1).start()
    world.end(("worker", 1), -9)
    assert world.phase is Phase.TRAINING
    assert [(p.name, p.epoch) for p in world.life.pending()] == [("worker/1", 1)]
    assert world.life.training.live() == [0]
    world.place()
    assert world.life.training.live() == [0, 1]
    assert (world.life.restarts, world.life.state) == (1, "RUNNING")
    assert "it is being replaced" in world.life.warnings[-1]
    world.end(("worker", 0), -9)
    assert _fails(world).reason == "PROCESS_KILLED", "the limit counts all kinds of restarts"


def test_the_last_worker_is_replaced_too() -> None:
    world = World(workers=1, restarts=1).start()
    world.progress(0, clock=40, samples=320)
    world.end(("worker", 0), -9)
    world.place()
    assert world.life.training.live() == [0]
    assert world.life.training.clock() == 40


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_the_others_go_on_while_there_are_enough(mode: str) -> None:
    world = World(workers=3, min_workers=2, mode=mode).start()
    world.end(("worker", 2), -9)
    assert world.phase is Phase.TRAINING
    assert "go on without it" in world.life.warnings[-1]
    assert world.life.pending() == []
    world.end(("worker", 0), -9)
    assert _fails(world).reason == "PROCESS_KILLED"


def test_a_worker_that_does_not_join_is_ended_and_replaced() -> None:
    world = World(restarts=2).start()
    world.prepares = False
    world.end(("worker", 1), -9)
    world.place()
    world.wait(61.0, place=False)
    assert any("has not joined" in w for w in world.life.warnings)
    assert [p.name for p in world.life.pending()] == ["worker/1"]
    world.prepares = True
    world.place()
    assert world.life.training.live() == [0, 1]


def test_too_few_workers_and_no_room_for_more() -> None:
    world = World(restarts=1).start()
    world.end(("worker", 1), -9)
    for _ in range(70):
        world.tick(1.0)
    assert world.life.failure is not None
    assert world.life.failure.reason == "BELOW_MIN"


def test_enough_workers_and_no_room_for_more() -> None:
    world = World(workers=2, min_workers=1, restarts=1).start()
    world.end(("worker", 1), -9)
    for _ in range(200):
        world.tick(1.0)
    assert world.phase is Phase.TRAINING


def test_a_job_that_begins_with_fewer_gets_the_rest_later() -> None:
    world = World(workers=4, min_workers=2)
    world.start(workers=2)
    assert world.life.training.live() == [0, 1]
    assert [p.name for p in world.life.pending()] == ["worker/2", "worker/3"]
    world.place()
    assert world.life.training.live() == [0, 1, 2, 3]


def test_a_worker_ended_by_somebody_else() -> None:
    world = World(workers=2, restarts=1).start()
    world.leave(1, drained=True)
    assert world.life.last_failure is not None
    assert world.life.last_failure.reason == "PREEMPTED"
    world.place()
    assert world.life.training.live() == [0, 1]
    world.leave(0, drained=True)
    assert _fails(world).reason == "PREEMPTED"


@modes
def test_a_drained_worker_leaves_and_another_comes(mode: str) -> None:
    world = World(mode=mode).start()
    world.drain(1)
    assert [(p.name, p.stop) for p in world.life.stopping()] == [("worker/1", 30.0)]
    world.drain(1)
    world.obey()
    assert world.phase is Phase.TRAINING
    assert world.life.restarts == 0, "that is nobody's failure"
    assert [(p.name, p.epoch) for p in world.life.pending()] == [("worker/1", 1)]
    world.place()
    if mode == "sync":
        world.hear(("worker", 0), m.BeginPass(world.number(), *world.me(0), 0, 1, 10))
        world.settle()
    assert world.life.training.live() == [0, 1]


@modes
def test_all_workers_may_be_drained_at_once(mode: str) -> None:
    world = World(mode=mode).start()
    world.drain(0, 1)
    world.obey()
    assert world.phase is Phase.TRAINING
    world.place()
    assert world.life.training.live() == [0, 1]
    world.leave(0)
    world.leave(1)
    over(world, "SUCCEEDED")


def test_in_sync_a_worker_that_does_not_leave_in_time_tears_the_round() -> None:
    world = World(mode="sync").start()
    world.drain(1)
    world.end(("worker", 1), -9)
    assert _fails(world).reason == "PROCESS_KILLED"


def test_in_async_it_tears_nothing() -> None:
    world = World().start()
    world.drain(1)
    world.end(("worker", 1), -9)
    assert [p.name for p in world.life.pending()] == ["worker/1"]


def test_draining_is_for_running_workers_of_running_jobs() -> None:
    world = World()
    world.prepares = False
    world.begin()
    world.drain(0)
    assert world.life.stopping() == []
    world.prepares = True
    world.speak()
    world._do(world.life.drain([("server", 0), ("worker", 9)], world.now_s))
    assert world.life.stopping() == []


# ---------------------------------------------------------------- other numbers of workers


def test_scaling_up_and_down() -> None:
    world = World(workers=2).start()
    world.scale(4)
    world.place()
    assert world.life.training.live() == [0, 1, 2, 3]
    world.scale(1)
    assert {p.name for p in world.life.stopping()} == {"worker/1", "worker/2", "worker/3"}
    world.scale(2)
    assert [p.name for p in world.life.pending()] == ["worker/4"], "those that leave leave; another comes"
    world.obey()
    world.place()
    assert world.life.training.live() == [0, 4]
    world.scale(3)
    world.place()
    assert world.running == {("server", 0): 0, ("worker", 0): 0, ("worker", 4): 0, ("worker", 1): 1}
    assert world.life.restarts == 0
    for slot in (0, 1, 4):
        world.leave(slot)
    over(world, "SUCCEEDED")


def test_scaling_down_takes_those_first_that_have_no_place() -> None:
    world = World(workers=2).start()
    world.scale(4)
    world.scale(2)
    assert world.life.pending() == []
    assert world.life.stopping() == []
    assert world.life.training.training
    world.leave(0)
    world.leave(1)
    over(world, "SUCCEEDED")


def test_one_too_many_may_leave_as_it_likes() -> None:
    world = World(workers=2, restarts=1).start()
    world.scale(1)
    world.end(("worker", 1), 1)
    assert world.life.pending() == []
    assert (world.life.state, world.life.restarts) == ("RUNNING", 0)


def test_who_leaves_already_is_not_replaced_twice() -> None:
    world = World(workers=2).start()
    world.drain(0, 1)
    world.scale(2)
    world.obey()
    assert [p.name for p in world.life.pending()] == ["worker/2", "worker/3"]


def test_scaling_twice_to_the_same_number_is_nothing_new() -> None:
    world = World(workers=2).start()
    world.scale(3)
    world.scale(3)
    assert len(world.life.pending()) == 1
    world.scale(1)
    world.scale(1)
    assert [p.name for p in world.life.stopping()] == ["worker/1"]


def test_after_scaling_down_fewer_are_enough() -> None:
    world = World(workers=3).start()
    world.scale(2)
    world.obey()
    world.end(("worker", 1), -9)
    assert world.life.failure is not None


@pytest.mark.parametrize(
    ("workers", "text"), [(0, "between 1 and 4096"), (5000, "between 1 and 4096"), (1, "at least 2")]
)
def test_numbers_that_make_no_sense(workers: int, text: str) -> None:
    world = World(workers=3, min_workers=2).start()
    with pytest.raises(ConfigError, match=text):
        world.scale(workers)
    assert world.life.wanted == 3


@pytest.mark.parametrize("phase", [p for p in Phase if p not in (Phase.TRAINING, Phase.OVER)])
def test_only_a_running_job_can_be_scaled(phase: Phase) -> None:
    world = _in(str(phase))
    with pytest.raises(ConfigError, match="only a running job"):
        world.scale(3)


# ---------------------------------------------------------------- another process takes over


@pytest.mark.parametrize("phase", list(Phase)[:-1])
def test_a_job_goes_on_in_another_process_wherever_it_was(phase: Phase) -> None:
    world = _in(str(phase))
    expected = {"KEEPING": "CANCELLED", "LEAVING": "CANCELLED"}.get(str(phase), "SUCCEEDED")
    world.deaf.clear()
    world.restarted()
    for _ in range(3):
        world.tick(0.1)  # before anybody has said anything
    if phase is Phase.QUEUED:
        world.begin()
    world.prepares = True
    for _ in range(200):
        world.speak()
        world.wait(1.0)
        for slot in world.life.training.live() if world.phase is Phase.TRAINING else ():
            world.leave(slot)
    assert (world.phase, world.life.state) == (Phase.OVER, expected)
    assert world.running == {}
    if expected == "SUCCEEDED":
        assert world.exported
    else:
        assert world.committed


def test_a_cancelled_job_stays_cancelled() -> None:
    world = World(settings={"grace_s": 50.0}).start()
    world.cancel()
    world.restarted()
    world.tick()
    assert {p.stop for p in world.life.stopping()} == {CANCEL_GRACE_S}
    over(world, "CANCELLED", "CANCELLED")


def test_failures_and_figures_outlive_the_process() -> None:
    world = World(restarts=1).start()
    world.progress(0, 12, 96)
    world.fails(1)
    world.restarted()
    assert world.life.last_failure is not None
    assert world.life.last_failure.details.startswith("Traceback")
    assert (world.life.restarts, world.life.begun_s, world.life.first_step_s) == (1, 1000.0, 1000.0)
    assert world.life.training.clock() == 12


# ---------------------------------------------------------------- whatever happens


EVENTS = [
    "end", "kill", "lose", "leave", "drained", "drain", "scale", "interrupt", "cancel", "wait", "long", "speak",
    "place", "obey", "restart", "deaf", "hear", "full", "slow", "work", "again",
]  # fmt: skip


class _Fate:
    """What happens to a job, drawn from numbers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ended: list[tuple[tuple[str, int], int]] = []

    def happens(self, kind: str, dice: int) -> None:
        world = self.world
        keys = sorted(world.running)
        key = keys[dice % len(keys)] if keys else None
        workers = [k for k in keys if k[0] == "worker"]
        worker = workers[dice % len(workers)] if workers else None
        joined = worker is not None and world.life.training.workers[worker[1]].answered
        match kind:
            case "end" | "kill" | "lose" if key is not None:
                self.ended.append((key, world.running[key]))
                world.end(key, {"end": dice % 3, "kill": -9, "lose": None}[kind])
            case "leave" | "drained" if worker is not None and joined:
                self.ended.append((worker, world.running[worker]))
                world.leave(worker[1], kind == "drained")
            case "again" if self.ended:
                old, epoch = self.ended[dice % len(self.ended)]
                world._do(world.life.ended(old, epoch, dice % 2, world.now_s))
            case "drain":
                world.drain(dice % 3)
            case "scale":
                wanted = (1 + dice % 4) * world.spec.ranks
                try:
                    world.scale(wanted)
                except ConfigError:
                    assert world.phase is not Phase.TRAINING or wanted < (world.spec.min_workers or 1)
            case "interrupt":
                world.stop()
            case "cancel":
                world.cancel()
            case "wait" | "long":
                world.tick(dice / 10 if kind == "wait" else 4.0 * dice)
            case "speak":
                world.speak()
            case "place":
                world.place()
            case "obey":
                world.obey()
            case "work":
                world.work()
            case "restart":
                world.restarted()
            case "deaf" if key is not None:
                world.deaf.add(key)
            case "hear":
                world.deaf.clear()
            case "full" | "slow":
                world.disk_full = "disk full" if kind == "full" and dice % 2 else ""
                world.slow = kind == "slow" and dice % 2 == 0


fates = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 30)), max_size=40)


def _in_replicas(fields: dict[str, Any]) -> dict[str, Any]:
    ranks = fields["tensor"]
    return {**fields, "workers": fields["workers"] * ranks, "min_workers": fields["min_workers"] and ranks}


jobs = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODES),
        "workers": st.integers(1, 3),
        "tensor": st.sampled_from([1, 1, 2]),
        "shards": st.integers(1, 2),
        "restarts": st.integers(0, 3),
        "min_workers": st.sampled_from([None, 1]),
    }
).map(_in_replicas)


@given(jobs, fates, st.sampled_from(["", "cancel", "interrupt", "exit"]), st.booleans())
def test_a_job_always_comes_to_an_end(
    fields: dict[str, Any], fate: list[tuple[str, int]], at_last: str, restarted: bool
) -> None:
    """Whatever happens: once orders are obeyed, and workers end, time alone brings it about."""
    world = World(**fields)
    fates = _Fate(world)
    world.begin()
    for kind, dice in fate:
        fates.happens(kind, dice)
        _sane(world.life)
    world.deaf.clear()
    world.slow = False
    if restarted:
        world.restarted()
    world.work()
    if at_last == "cancel":
        world.cancel()
    elif at_last == "interrupt":
        world.stop()
    for _ in range(400):
        world.speak()
        world.wait(2.0)
        if at_last == "exit" and (workers := [k for k in world.running if k[0] == "worker"]):
            world.end(workers[0], 1)
        elif world.phase is Phase.TRAINING:
            for slot in world.life.training.live():
                if world.phase is Phase.TRAINING and ("worker", slot) in world.running:
                    world.leave(slot)
        if world.life.over:
            break
    assert world.life.over, f"stuck in {world.phase}"
    assert world.running == {}
    assert world.life.state in ("SUCCEEDED", "FAILED", "CANCELLED")
    if world.life.state == "SUCCEEDED":
        assert world.exported
    assert world.life.restarts <= world.spec.restarts


def _sane(life: Lifecycle) -> None:
    for process in life.processes.values():
        assert process.state != "pending" or (process.stop is None and not process.node)
        assert process.state != "started" or process.node
    assert all(p.running for p in life.stopping())
    if life.over:
        assert not any(p.running for p in life.processes.values())
    live = [p for p in life.roster.staying() if p.state != "ended"]
    if life.phase is Phase.TRAINING:
        assert len(live) <= max(life.wanted, 1)
    for process in life.roster.workers():
        mates = life.roster.mates(process)
        assert {(p.epoch, len(mates)) for p in mates} == {(process.epoch, life.spec.ranks)}


@given(jobs, fates, fates)
def test_another_process_comes_to_the_same_end(
    fields: dict[str, Any], before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> None:
    """A job that is carried on by another process from any moment on ends as it would have."""
    ends = []
    for restarted in (False, True):
        world = World(**fields)
        fate = _Fate(world)
        world.begin()
        for kind, dice in before:
            if kind not in ("deaf", "slow", "restart", "long", "wait"):  # in another process waits begin anew
                fate.happens(kind, dice)
        if restarted:
            world.restarted()
        world.speak()
        world.wait(3.0, place=False)
        for kind, dice in after:
            if kind not in ("deaf", "slow", "restart", "long", "wait"):
                fate.happens(kind, dice)
        world.wait(3.0, place=False)
        world.cancel()
        world.wait_for(Phase.OVER)
        life = world.life
        ends.append((life.state, life.reason, life.restarts, life.wanted, bool(world.exported), sorted(life.processes)))
    assert ends[0] == ends[1]
