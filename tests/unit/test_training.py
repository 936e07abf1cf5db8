"""A job's training as a state machine: who joins, who waits for whom, and what a checkpoint says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from coordinator_kit import MODEL, OTHER, Job, shard_entry
from hypothesis import given
from hypothesis import strategies as st
from unit_kit import JOB

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Refusal
from downpour_coordinator.answers import ANSWERS_KEPT
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed

# ---------------------------------------------------------------- joining


@given(st.permutations(["shard 0", "shard 1", "ready 0", "ready 1", "worker 0", "worker 1", "worker 2"]))
def test_the_order_of_joining_does_not_matter(order: list[str]) -> None:
    """Shards get ready once they have the model, which is worker 0's; all else may come in any order."""
    job = Job(workers=3)
    requests: dict[int, int] = {}
    ready: list[int] = []
    for event in order:
        index = int(event[-1])
        if event.startswith("shard"):
            job.register_shard(index)
        elif event.startswith("worker"):
            requests[index] = job.register_worker(index)
        else:
            ready.append(index)
        for shard in list(ready):
            if b"shard %d" % shard in job.sent:
                ready.remove(shard)
                job.shard_ready(shard)
        done = all(s.ready for s in job.state.shards.values()) and len(requests) == 3
        assert all((job.answer(r) is not None) == done for r in requests.values())
    for shard in (0, 1):
        assert job.sent[b"shard %d" % shard] == [m.SetUpShard(MODEL.to_wire(), "")]
    for slot in range(3):
        welcome = m.Welcome(requests[slot], ("address-0", "address-1"), False, 0, (0, 0), (0, 1, 2))
        assert job.sent[b"worker %d" % slot] == [welcome]
    assert job.state.training
    assert job.state.waiting_for() == []


def test_it_says_who_is_still_to_join() -> None:
    job = Job()
    assert job.state.waiting_for() == ["server/0", "server/1", "worker/0", "worker/1"]
    job.register_shard(1)
    job.register_worker(0)
    assert job.state.waiting_for() == ["server/0", "worker/1"]
    assert not job.state.training


@pytest.mark.parametrize("first", [0, 1])
def test_a_worker_with_another_model_is_refused_naming_the_tensor(first: int) -> None:
    job = Job(shards=0)
    requests = {}
    for slot in (first, 1 - first):
        requests[slot] = job.register_worker(slot, MODEL if slot == 0 else OTHER)
    assert isinstance(job.answer(requests[0]), m.Welcome)
    refused = job.answer(requests[1])
    assert isinstance(refused, m.Refused)
    assert refused.code == Refusal.MODEL_DIFFERS
    assert "b (trainable float32[5]" in refused.reason


@pytest.mark.parametrize(("slot", "fields"), [(2, {}), (-1, {}), (0, {"job": "job-2"})])
def test_a_worker_that_does_not_belong_here_is_refused(slot: int, fields: dict[str, Any]) -> None:
    job = Job()
    register = m.RegisterWorker(1, JOB, slot, 0, 1, MODEL.to_wire())
    refused = job.ask(b"stranger", replace(register, **fields))
    assert isinstance(refused, m.Refused)
    assert refused.code == Refusal.WRONG_JOB
    assert job.state.model is None


def test_a_malformed_registration_does_not_keep_the_others_out() -> None:
    job = Job()
    for index in (0, 1):
        job.register_shard(index)
    try:
        job.register_worker(1, spec=None)
    except ProtocolError:
        pass  # what the service counts as malformed
    chief, repaired = job.register_worker(0), job.register_worker(1)
    for index in (0, 1):
        job.shard_ready(index)
    assert isinstance(job.answer(chief), m.Welcome)
    assert isinstance(job.answer(repaired), m.Welcome)


def test_nobody_starts_before_everybody_is_there() -> None:
    job = Job()
    for index in (0, 1):
        job.register_shard(index)
    chief = job.register_worker(0)
    for index in (0, 1):
        job.shard_ready(index)
    assert job.answer(chief) is None
    job.register_worker(1)
    assert isinstance(job.answer(chief), m.Welcome)


def test_a_malformed_registration_of_the_chief_can_be_repaired() -> None:
    job = Job(workers=1, shards=0)
    try:
        job.register_worker(0, spec=None)
    except ProtocolError:
        pass
    assert isinstance(job.answer(job.register_worker(0)), m.Welcome)


@pytest.mark.parametrize(
    "message",
    [
        m.ShardReady(JOB, 9, 0, ""),
        m.ShardReady(JOB, -1, 0, ""),
        m.ShardReport(JOB, 9, 0, {}),
        m.RegisterShard("job-2", 0, 0, 1, "elsewhere"),
        m.Ack(1, 0),
        m.StopShard(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_of_strangers_are_nonsense(message: m.Message) -> None:
    job = Job().start()
    with pytest.raises(ProtocolError):
        job.say(b"stranger", message)
    assert job.state.shards[0].address == "address-0"
    assert job.sent == {}


@pytest.mark.parametrize(
    "document",
    [
        {"staleness": []},
        {"staleness": {"a": 1}},
        {"staleness": {"1": "many"}},
        {"round": "5"},
        {"rounds_per_report": None},
        {"members": True},
        {"clock_gap_max": 1.5},
        {"pid": -2},
    ],
    ids=repr,
)
def test_a_report_with_something_else_than_counts_is_nonsense(document: dict[str, Any]) -> None:
    job = Job().start()
    with pytest.raises(ProtocolError):
        job.report(0, **document)
    assert job.state.staleness() == {}
    assert _begin(job), "snapshots use reports"


def test_a_checkpoint_that_a_shard_cannot_load_is_told_to_every_worker() -> None:
    job = Job(resume="folder")
    for index in (0, 1):
        job.register_shard(index)
    early = job.register_worker(0)
    assert job.sent[b"shard 1"] == [m.SetUpShard(MODEL.to_wire(), "folder")]
    job.shard_ready(0)
    job.shard_ready(1, "folder: is damaged")
    for request in (early, job.register_worker(1)):
        refused = job.answer(request)
        assert isinstance(refused, m.Refused)
        assert (refused.code, refused.reason) == (Refusal.CHECKPOINT, "server/1: folder: is damaged")


@pytest.mark.parametrize(
    ("mode", "done", "position"),
    [
        ("sync", ((0, 24),), (3, 24)),
        ("sync", (), (3, 0)),
        ("sync", ((8, 24),), (3, 0)),
        ("async", ((0, 24),), (3, 0)),
    ],
)
def test_a_resumed_job_starts_at_its_clock_and_position(
    mode: str, done: tuple[tuple[int, int], ...], position: tuple[int, int]
) -> None:
    job = Job(1, 0, mode, resume="folder", clock=40, epoch=3, done=done)
    assert job.answer(job.register_worker(0)) == m.Welcome(1, (), True, 40, position, (0,))


# ---------------------------------------------------------------- barriers


def test_a_barrier_opens_when_all_have_come() -> None:
    job = Job(3).start()
    entered = [job.enter(slot) for slot in (2, 0)]
    assert [job.answer(r) for r in entered] == [None, None]
    entered.append(job.enter(1))
    assert [job.answer(r) for r in entered] == [m.Ack(r, 0) for r in entered]


def test_a_barrier_does_not_wait_for_those_who_left() -> None:
    job = Job(3).start()
    entered = [job.enter(0)]
    assert isinstance(job.goodbye(1), m.Ack)
    assert job.answer(entered[0]) is None
    job.carry_out(job.state.worker_lost(2))
    assert job.answer(entered[0]) == m.Ack(entered[0], 0)
    assert job.answer(again := job.enter(0, "barrier 2")) == m.Ack(again, 0), "nobody else is left"


def test_one_who_came_and_then_left_does_not_stand_in_for_another() -> None:
    job = Job(3).start()
    job.enter(0)
    job.carry_out(job.state.worker_lost(0))
    entered = job.enter(1)
    assert job.answer(entered) is None, "worker 2 has not come"
    job.enter(2)
    assert job.answer(entered) == m.Ack(entered, 0)


def test_barriers_of_different_names_are_apart() -> None:
    job = Job(2).start()
    first, second = job.enter(0, "barrier 1"), job.enter(1, "barrier 2")
    assert [job.answer(first), job.answer(second)] == [None, None]


# ---------------------------------------------------------------- snapshots


def _begin(job: Job, number: int = 1, final: bool = False) -> list[m.TakeSnapshot]:
    """Begin a snapshot; what the shards were told."""
    before = {peer: len(told) for peer, told in job.sent.items()}
    job.carry_out(job.state.begin_snapshot(number, f"folder-{number}", final))
    return [
        message
        for index in range(job.shards)
        for message in job.sent.get(b"shard %d" % index, [])[before.get(b"shard %d" % index, 0) :]
        if isinstance(message, m.TakeSnapshot)
    ]


def test_a_snapshot_is_committed_when_every_shard_has_answered() -> None:
    job = Job(mode="async").start()
    job.work(0, 1)
    job.progress(0, clock=12)
    assert _begin(job) == [m.TakeSnapshot(1, "folder-1", -1)] * 2
    job.taken(1, trainable_versions=[4, 9])
    assert job.outcomes == []
    job.taken(0)
    commit = job.outcomes.pop()
    assert isinstance(commit, CommitSnapshot)
    assert (commit.number, commit.folder) == (1, "folder-1")
    manifest = commit.manifest
    assert ModelSpec.from_wire(manifest["model"]) == MODEL
    assert [f["file"] for f in manifest["files"]] == ["shard-0.safetensors", "shard-1.safetensors"]
    assert (manifest["format"], manifest["mode"], manifest["seed"]) == (1, "async", 7)
    assert (manifest["shards"], manifest["chunk_bytes"], manifest["clock"]) == (2, 1024, 12)
    assert manifest["data"]["epoch"] == 0
    assert len(manifest["data"]["done"]) == 1
    assert _begin(job, 2), "the next may begin"


def test_a_snapshot_fails_when_a_shard_could_not_write() -> None:
    job = Job().start()
    _begin(job)
    job.taken(1, error="disk full")
    job.taken(0)
    assert job.outcomes == [SnapshotFailed(1, "folder-1", "server/1: disk full")]
    assert _begin(job, 2), "the next may begin"


def test_nothing_is_begun_before_the_job_is_ready_or_while_one_is_under_way() -> None:
    job = Job()
    assert _begin(job) == []
    job.register_worker(0)
    for index in (0, 1):
        job.register_shard(index)
    assert _begin(job) == [], "the shards hold nothing yet"
    for index in (0, 1):
        job.shard_ready(index)
    assert len(_begin(job)) == 2
    assert _begin(job, 2) == []


def test_the_final_snapshot_takes_the_place_of_one_under_way() -> None:
    job = Job(mode="sync").start()
    _begin(job)
    assert _begin(job, 2, final=True) == [m.TakeSnapshot(2, "folder-2", -1)] * 2
    job.taken(0, 1, error="another snapshot began")
    job.taken(0, 2)
    job.taken(1, 1)
    assert job.outcomes == []
    job.taken(1, 2)
    assert [o.number for o in job.outcomes] == [2]


def test_answers_of_strangers_do_not_make_a_snapshot_complete() -> None:
    job = Job().start()
    _begin(job)
    job.taken(0)
    try:
        job.taken(7)
    except ProtocolError:
        pass
    assert job.outcomes == []


def test_a_sync_snapshot_is_taken_at_a_clock_that_no_shard_has_reached() -> None:
    job = Job(mode="sync").start()
    job.report(0, round=40, rounds_per_report=6)
    job.report(1, round=41, rounds_per_report=9)
    clocks = {message.at_clock for message in _begin(job)}
    assert len(clocks) == 1
    assert clocks.pop() > 41 + 2 * 9


def test_a_sync_snapshot_says_its_clock_and_the_data_position_of_the_shards() -> None:
    job = Job(mode="sync").start()
    _begin(job)
    job.taken(0, trainable_versions=[17], position=[2, 64])
    job.taken(1, trainable_versions=[17], position=[2, 48])
    commit = job.outcomes.pop()
    assert isinstance(commit, CommitSnapshot)
    assert commit.manifest["clock"] == 17
    assert commit.manifest["data"] == {"epoch": 2, "done": [[0, 64]]}


def test_a_sync_snapshot_at_the_beginning_of_a_pass_has_done_nothing_of_it() -> None:
    job = Job(shards=1, mode="sync").start()
    _begin(job)
    job.taken(0, trainable_versions=[17], position=[3, 0])
    commit = job.outcomes.pop()
    assert isinstance(commit, CommitSnapshot)
    assert commit.manifest["data"] == {"epoch": 3, "done": []}


def test_a_sync_snapshot_before_the_first_step_of_a_resumed_job_keeps_its_position() -> None:
    job = Job(shards=1, mode="sync", resume="folder", clock=17, epoch=2, done=((0, 64),)).start()
    _begin(job)
    job.taken(0, trainable_versions=[17], position=[])
    commit = job.outcomes.pop()
    assert isinstance(commit, CommitSnapshot)
    assert commit.manifest["data"] == {"epoch": 2, "done": [[0, 64]]}
    assert commit.manifest["clock"] == 17


@pytest.mark.parametrize("versions", [([17], [18]), ([17, 18], [17])])
def test_a_sync_snapshot_of_different_rounds_is_refused(versions: tuple[list[int], list[int]]) -> None:
    job = Job(mode="sync").start()
    _begin(job)
    for shard in (0, 1):
        job.taken(shard, trainable_versions=versions[shard])
    failed = job.outcomes.pop()
    assert isinstance(failed, SnapshotFailed)
    assert "17" in failed.reason
    assert "18" in failed.reason


# ---------------------------------------------------------------- the rest


def test_metrics_become_rows_with_who_and_when() -> None:
    job = Job().start()
    job.say(b"worker 1", m.LogMetrics(job.number(), *job.me(1), 30, {"loss": 0.5, "note": "text is left out"}))
    assert job.rows == [{"worker": 1, "clock": 30, "loss": 0.5}]
    assert job.state.latest == {"loss": 0.5}


def test_a_metric_cannot_pass_itself_off_as_who_or_when() -> None:
    job = Job().start()
    job.say(b"worker 1", m.LogMetrics(job.number(), *job.me(1), 30, {"worker": 9, "clock": 9}))
    assert (job.rows[0]["worker"], job.rows[0]["clock"]) == (1, 30)


def test_staleness_is_summed_over_shards() -> None:
    job = Job().start()
    job.report(0, staleness={"0": 3, "2": 1})
    job.report(1, staleness={"2": 4})
    assert job.state.staleness() == {0: 3, 2: 5}


def test_stopping_is_told_to_the_living_only() -> None:
    job = Job().start()
    job.goodbye(1)
    job.sent.clear()
    job.carry_out(job.state.ask_to_stop("interrupted"))
    job.carry_out(job.state.stop_shards())
    assert job.sent == {
        b"worker 0": [m.ShouldStop("interrupted")],
        b"shard 0": [m.StopShard()],
        b"shard 1": [m.StopShard()],
    }


def test_failures_are_kept_in_order() -> None:
    job = Job().start()
    for slot in (1, 0):
        job.say(b"worker %d" % slot, m.ReportFailure(*job.me(slot), "ValueError: no", "traceback"))
    assert [failure.slot for failure in job.state.failures] == [1, 0]


# ---------------------------------------------------------------- repeats, strangers of the same name, impostors


def test_every_repeat_gets_the_answer_that_the_request_got() -> None:
    job = Job().start()
    requests: list[m.WorkerRequest] = [
        m.TakeLease(job.number(), *job.me(0), 0, 0, 32, 4, "order", ()),
        m.LogMetrics(job.number(), *job.me(0), 3, {"loss": 0.5}),
        m.TakeLease(job.number(), *job.me(0), 0, 0, 9, 4, "another", ()),
        m.Goodbye(job.number(), *job.me(0), False, 3),
    ]
    for request in requests:
        first = job.ask(b"worker 0", request)
        job.sent.clear()
        assert job.ask(b"moved", request) == first
        assert list(job.sent) == [b"moved"], "the answer goes where the repeat came from"
        job.sent.clear()
    assert job.rows == [{"loss": 0.5, "worker": 0, "clock": 3}], "it is done once"
    assert job.state.torn == 3


def test_a_registration_is_answered_where_its_repeat_came_from() -> None:
    job = Job()
    request = job.register_worker(0)
    job.say(b"moved", m.RegisterWorker(request, *job.me(0), 200, MODEL.to_wire()))
    for index in (0, 1):
        job.register_shard(index)
        job.shard_ready(index)
    job.register_worker(1)
    assert b"worker 0" not in job.sent
    welcome = job.answer(request)
    assert isinstance(welcome, m.Welcome)
    job.sent.clear()
    again = m.RegisterWorker(request, *job.me(0), 200, MODEL.to_wire())
    assert job.ask(b"worker 0", again) == welcome


def test_only_the_newest_answers_are_kept() -> None:
    job = Job().start()
    for _ in range(5 * ANSWERS_KEPT):
        job.say(b"worker 0", m.LogMetrics(job.number(), *job.me(0), 1, {}))
    assert len(job.state.workers[0].answers) == ANSWERS_KEPT


def test_an_older_epoch_of_a_slot_is_refused() -> None:
    job = Job().start()
    job.replaced(0)
    job.sent.clear()
    for request in (
        m.TakeLease(job.number(), JOB, 0, 0, 0, 0, 32, 4, "order", ()),
        m.Goodbye(job.number(), JOB, 0, 0, False, 9),
        m.RegisterWorker(job.number(), JOB, 0, 0, 1, MODEL.to_wire()),
    ):
        refused = job.ask(b"old", request)
        assert isinstance(refused, m.Refused)
        assert refused.code == Refusal.STALE_EPOCH
    job.say(b"old", m.Progress(JOB, 0, 0, 999, 0, 0, 0, 0, 0, 0, 0.0))
    job.say(b"old", m.ReportFailure(JOB, 0, 0, "ValueError", ""))
    assert job.state.clock() == 0
    assert job.state.failures == []
    assert not job.state.workers[0].gone


def test_a_shard_of_an_older_epoch_is_not_heard() -> None:
    job = Job(shard_epoch=3)
    for message in (
        m.RegisterShard(JOB, 0, 2, 1, "old"),
        m.ShardReady(JOB, 0, 2, ""),
        m.ShardReport(JOB, 0, 2, {"ready": True}),
        m.SnapshotPart(7, JOB, 0, 2, 1, "shard-0.safetensors", 0, b"x"),
    ):
        job.say(b"old", message)
    assert job.sent == {}
    assert (job.state.shards[0].address, job.state.shards[0].ready, job.state.shards[0].peer) == ("", False, b"")


def test_a_worker_that_has_left_is_not_let_in_again() -> None:
    job = Job().start()
    job.goodbye(0)
    late = job.register_worker(0)
    lease = m.TakeLease(job.number(), *job.me(0), 0, 0, 32, 4, "order", ())
    assert job.ask(b"worker 0", lease) is None
    assert job.answer(late) is None
    assert job.state.live() == [1]


# ---------------------------------------------------------------- members


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_a_joiner_is_let_in_once_every_shard_counts_it(mode: str) -> None:
    job = Job(mode=mode).start()
    job.progress(0, clock=40)
    job.report(0, initialised=True)
    job.report(1, initialised=True)
    job.replaced(2)
    joins = job.register_worker(2)
    expected = m.SetMembers(1, (0, 0, 1, 0, 2, 0))
    assert [job.told(b"shard %d" % i) for i in (0, 1)] == [[expected], [expected]]
    job.members_set(1, 0)
    assert job.answer(joins) is None
    job.members_set(1, 1)
    assert job.answer(joins) == m.Welcome(joins, ("address-0", "address-1"), True, 40, (0, 0), (0, 1, 2))
    for slot in (0, 1):
        assert job.told(b"worker %d" % slot) == [m.MembersChanged((0, 1, 2))]
    assert job.state.live() == [0, 1, 2]


def test_a_report_stands_in_for_a_lost_answer() -> None:
    job = Job(workers=1, shards=1)
    job.register_shard(0)
    welcomed = job.register_worker(0)
    job.report(0, ready=True)
    assert isinstance(job.answer(welcomed), m.Welcome), "ShardReady was lost"
    job.replaced(1)
    joins = job.register_worker(1)
    job.told(b"shard 0")
    job.report(0, ready=True, members=0)
    assert job.told(b"shard 0") == [m.SetMembers(1, (0, 0, 1, 0))], "SetMembers was lost"
    job.report(0, ready=True, members=1)
    assert isinstance(job.answer(joins), m.Welcome), "MembersSet was lost"


def test_a_report_stands_in_for_a_lost_refusal() -> None:
    job = Job(workers=1, shards=1, resume="folder")
    job.register_shard(0)
    asked = job.register_worker(0)
    job.report(0, ready=False, error="folder: is damaged")
    refused = job.answer(asked)
    assert isinstance(refused, m.Refused)
    assert (refused.code, refused.reason) == (Refusal.CHECKPOINT, "server/0: folder: is damaged")


def test_a_joiner_to_shards_without_weights_may_have_to_initialise_them() -> None:
    job = Job(workers=1, shards=1).start()
    job.replaced(0)
    joins = job.register_worker(0)
    job.members_set(2)
    welcome = job.answer(joins)
    assert isinstance(welcome, m.Welcome)
    assert not welcome.restored


def test_the_lost_do_not_count_any_more() -> None:
    job = Job(workers=3).start()
    job.carry_out(job.state.worker_lost(0))
    assert job.told(b"shard 0") == [m.SetMembers(1, (1, 0, 2, 0))]
    assert job.told(b"worker 1") == [m.MembersChanged((1, 2))]
    job.carry_out(job.state.worker_lost(0))
    assert job.told(b"shard 0") == []


def test_who_leaves_in_good_order_has_told_the_shards() -> None:
    job = Job(workers=3).start()
    job.goodbye(0, drained=True)
    assert job.told(b"shard 0") == []
    assert job.told(b"worker 1") == [m.MembersChanged((1, 2))]
    job.carry_out(job.state.worker_lost(0))
    assert job.told(b"shard 0") == [], "its process has ended since"


def test_who_comes_to_its_scripts_end_changes_nothing_for_the_others() -> None:
    job = Job(workers=3).start()
    job.goodbye(0)
    assert job.told(b"worker 1") == [], "its part of a stream is done; were it split anew, samples would come twice"


def test_a_joiner_that_is_lost_before_it_was_let_in_is_taken_back() -> None:
    job = Job(workers=1, shards=1).start()
    job.replaced(1)
    job.register_worker(1)
    assert job.told(b"shard 0") == [m.SetMembers(1, (0, 0, 1, 0))]
    job.carry_out(job.state.worker_lost(1))
    assert job.told(b"shard 0") == [m.SetMembers(2, (0, 0))]
    job.members_set(1)
    job.members_set(2)
    assert b"worker 1" not in job.sent


def test_a_joiner_with_another_model_is_refused_and_never_counted() -> None:
    job = Job(workers=1, shards=1).start()
    job.replaced(1)
    refused = job.answer(job.register_worker(1, OTHER))
    assert isinstance(refused, m.Refused)
    assert job.told(b"shard 0") == []


def test_in_sync_a_joiner_waits_for_the_next_pass() -> None:
    job = Job(shards=1, mode="sync").start()
    for slot in (0, 1):
        assert job.answer(b := job.begin_pass(slot, 0)) == m.PassBegins(b, 2, slot)
    job.replaced(2)
    joins = job.register_worker(2)
    job.members_set(0)
    assert job.told(b"shard 0") == [], "nothing happens in the middle of a pass"
    validation = job.begin_pass(0, 0, 9, loader=1)
    assert isinstance(job.answer(validation), m.PassBegins), "other loaders are nobody's moment to join"
    first = job.begin_pass(0, 1, 10)
    second = job.begin_pass(1, 1, 10)
    assert job.told(b"shard 0") == [m.SetMembers(1, (0, 0, 1, 0, 2, 0))]
    assert [job.answer(r) for r in (first, second, joins)] == [None] * 3
    job.say(b"moved", m.BeginPass(first, *job.me(0), 0, 1, 10))
    job.members_set(1)
    assert job.answer(joins) == m.Welcome(joins, ("address-0",), False, 10, (1, 0, 0), (0, 1, 2))
    assert m.PassBegins(first, 3, 0) in job.sent[b"moved"]
    assert job.answer(second) == m.PassBegins(second, 3, 1)
    assert job.answer(b := job.begin_pass(2, 1, 10)) == m.PassBegins(b, 3, 2)


def test_in_sync_one_who_comes_while_a_pass_is_held_waits_for_the_one_after() -> None:
    job = Job(workers=1, shards=1, mode="sync").start()
    job.begin_pass(0, 0)
    job.replaced(1)
    joins = job.register_worker(1)
    held = job.begin_pass(0, 1, 10)
    job.replaced(2)
    late = job.register_worker(2)
    job.members_set(1)
    assert isinstance(job.answer(joins), m.Welcome)
    assert job.answer(held) == m.PassBegins(held, 2, 0)
    assert job.answer(late) is None
    held = job.begin_pass(1, 2, 20)
    job.members_set(2)
    assert isinstance(job.answer(late), m.Welcome)
    assert job.answer(held) == m.PassBegins(held, 3, 1)


def test_in_sync_a_held_pass_begins_without_those_who_are_lost_meanwhile() -> None:
    job = Job(shards=1, mode="sync").start()
    job.replaced(2)
    job.register_worker(2)
    held = [job.begin_pass(slot, 0) for slot in (0, 1)]
    job.carry_out(job.state.worker_lost(2))
    job.goodbye(1, drained=True)
    assert job.answer(held[0]) is None
    job.members_set(2)
    assert job.answer(held[0]) == m.PassBegins(held[0], 1, 0)
    assert job.answer(held[1]) is None


def test_in_sync_joiners_do_not_wait_for_a_pass_that_nobody_is_left_to_begin() -> None:
    """Their places were needed: all members have left, and others are there instead."""
    job = Job(shards=1, mode="sync").start()
    for slot in (0, 1):
        job.begin_pass(slot, 4, clock=30)
    for slot in (0, 1):
        job.progress(slot, clock=37, epoch=4)
        job.goodbye(slot, drained=True, torn=8)
        job.replaced(slot)
    job.told(b"shard 0")
    joins = [job.register_worker(slot) for slot in (0, 1)]
    assert job.told(b"shard 0")[-1] == m.SetMembers(2, (0, 1, 1, 1))
    job.members_set(2)
    for slot in (0, 1):
        welcome = job.answer(joins[slot])
        assert isinstance(welcome, m.Welcome)
        assert (welcome.clock, welcome.position, welcome.slots) == (37, (5, 0), (0, 1))


def test_what_a_replaced_worker_did_is_not_forgotten() -> None:
    job = Job(workers=1, shards=1).start()
    job.progress(0, clock=40, samples=320)
    job.replaced(0)
    assert job.state.clock() == 40
    assert [p.samples for p in job.state.former] == [320]
    job.restarted()
    assert job.state.clock() == 40
    assert [p.samples for p in job.state.former] == [320]


# ---------------------------------------------------------------- more on barriers


def test_a_barrier_is_answered_where_the_repeat_came_from_and_once_more_if_need_be() -> None:
    job = Job().start()
    first = job.enter(0)
    job.say(b"moved", m.EnterBarrier(first, *job.me(0), "barrier"))
    second = job.enter(1)
    assert job.sent == {b"moved": [m.Ack(first, 0)], b"worker 1": [m.Ack(second, 0)]}
    job.say(b"moved", m.EnterBarrier(first, *job.me(0), "barrier"))
    assert job.sent[b"moved"] == [m.Ack(first, 0)] * 2
    third = job.enter(0)
    assert job.answer(third) is None, "the next barrier of that name is another one"


def test_one_who_is_replaced_in_a_barrier_leaves_nothing_behind() -> None:
    job = Job(3).start()
    lost = job.enter(1)
    job.replaced(1)
    entered = [job.enter(0), job.enter(2)]
    assert [job.answer(r) for r in entered] == [m.Ack(r, 0) for r in entered]
    assert job.answer(lost) is None
    assert job.state.workers[1].answers == {}, "its successor's requests have numbers of their own"


# ---------------------------------------------------------------- more on snapshots


def test_shards_that_have_not_answered_are_asked_again() -> None:
    job = Job().start()
    _begin(job)
    job.taken(1)
    job.sent.clear()
    job.carry_out(job.state.repeat_snapshot())
    assert job.sent == {b"shard 0": [m.TakeSnapshot(1, "folder-1", -1)]}
    job.taken(1)
    job.taken(0)
    job.taken(0)
    assert [o.number for o in job.outcomes] == [1]
    assert job.state.repeat_snapshot() == []


def test_an_abandoned_snapshot_is_over() -> None:
    job = Job(shards=1).start()
    _begin(job)
    job.state.abandon_snapshot()
    job.taken(0)
    assert job.outcomes == []
    assert job.state.snapshot == 0
    assert _begin(job, 2)


def test_parts_are_taken_of_the_snapshot_under_way_only() -> None:
    job = Job(shards=1).start()
    part = m.SnapshotPart(job.number(), JOB, 0, 0, 1, "shard-0.safetensors", 0, b"bytes")
    early = job.ask(b"shard 0", part)
    assert isinstance(early, m.Refused)
    assert early.code == Refusal.CHECKPOINT
    _begin(job)
    job.say(b"shard 0", replace(part, request=job.number()))
    assert [p.payload for p in job.parts] == [b"bytes"]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {**shard_entry(0), "file": "../../secret"},
        {**shard_entry(0), "file": "shard-1.safetensors"},
        {**shard_entry(0), "position": ["1", 2]},
        {**shard_entry(0), "trainable_versions": None},
        {**shard_entry(0), "chunks": {"a": {}}},
    ],
    ids=repr,
)
def test_a_shard_that_says_something_strange_of_its_file_is_not_believed(document: dict[str, Any]) -> None:
    job = Job(shards=1).start()
    _begin(job)
    with pytest.raises(ProtocolError):
        job.say(b"shard 0", m.SnapshotTaken(JOB, 0, 0, 1, "", document))
    assert job.outcomes == []


def test_a_snapshot_can_be_begun_before_any_shard_was_heard_of_again() -> None:
    job = Job().start()
    job.restarted()
    assert job.state.begin_snapshot(4, "folder-4") == []
    assert job.state.snapshot == 4
    job.report(0, ready=True)
    job.sent.clear()
    job.carry_out(job.state.repeat_snapshot())
    assert job.sent == {b"shard 0": [m.TakeSnapshot(4, "folder-4", -1)]}


# ---------------------------------------------------------------- another process takes over


def test_after_a_restart_answers_are_given_again() -> None:
    job = Job().start()
    take = m.TakeLease(job.number(), *job.me(0), 0, 0, 32, 4, "order", ())
    lease = job.ask(b"worker 0", take)
    job.restarted()
    assert job.ask(b"moved", take) == lease
    assert job.lease(1) != lease


def test_after_a_restart_a_worker_is_told_the_members_at_its_first_word() -> None:
    job = Job().start()
    job.goodbye(1, drained=True)
    job.restarted()
    job.progress(0, clock=3)
    assert job.told(b"worker 0") == [m.MembersChanged((0,))]
    job.progress(0, clock=4)
    assert job.told(b"worker 0") == []


def test_a_barrier_outlives_a_restart() -> None:
    job = Job().start()
    first = job.enter(0)
    job.restarted()
    second = job.enter(1)
    assert job.answer(second) == m.Ack(second, 0)
    job.say(b"moved", m.EnterBarrier(first, *job.me(0), "barrier"))
    assert m.Ack(first, 0) in job.sent[b"moved"]


def test_registrations_that_wait_are_asked_again() -> None:
    job = Job(shards=1)
    waiting = job.register_worker(0)
    job.register_shard(0)
    job.restarted()
    assert job.state.waiting_for() == ["worker/0", "worker/1"]
    job.register_worker(1)
    job.shard_ready(0)
    assert job.sent.get(b"worker 1") is None
    job.say(b"worker 0", m.RegisterWorker(waiting, *job.me(0), 200, MODEL.to_wire()))
    assert isinstance(job.answer(waiting), m.Welcome)
    assert job.state.training


@pytest.mark.parametrize("joiner_first", [True, False])
def test_a_pass_that_is_held_at_a_restart_begins_with_the_joiner_where_the_others_are(joiner_first: bool) -> None:
    job = Job(workers=1, shards=1, mode="sync").start()
    job.begin_pass(0, 0, 0)
    job.progress(0, clock=7)
    job.replaced(1)
    joins = job.register_worker(1)
    held = job.begin_pass(0, 1, clock=10)
    job.restarted()
    if joiner_first:
        job.say(b"worker 1", m.RegisterWorker(joins, *job.me(1), 201, MODEL.to_wire()))
    job.report(0, ready=True, members=1)
    job.say(b"worker 0", m.BeginPass(held, *job.me(0), 0, 1, 10))
    assert m.PassBegins(held, 2, 0) in job.sent[b"worker 0"]
    if not joiner_first:
        job.say(b"worker 1", m.RegisterWorker(joins, *job.me(1), 201, MODEL.to_wire()))
    welcome = job.answer(joins)
    assert isinstance(welcome, m.Welcome)
    assert (welcome.clock, welcome.position[:2]) == (10, (1, 0))
    assert job.answer(b := job.begin_pass(1, 1, 10)) == m.PassBegins(b, 2, 1)


KINDS = [
    "shard",
    "register",
    "ready",
    "report",
    "set",
    "taken",
    "register",
    "worker",
    "pass",
    "lease",
    "work",
    "barrier",
    "metrics",
    "progress",
    "goodbye",
    "again",
    "replaced",
    "lost",
    "snapshot",
    "repeat",
]


class _Player:
    """Draws what happens next from numbers; every player who draws the same does the same."""

    def __init__(self, mode: str) -> None:
        self.job = Job(workers=2, shards=2, mode=mode)
        self.snapshots = 0
        self.past: list[tuple[bytes, m.Message]] = []
        self.passes: Counter[tuple[int, int]] = Counter()

    def play(self, kind: str, dice: int) -> None:
        job, slot, shard = self.job, dice % 3, dice % 2
        number = job.number()
        me, peer = job.me(slot), b"worker %d" % slot
        expected = slot in job.state.workers
        message: m.Message | None = None
        match kind:
            case "shard" | "ready":
                if not job.state.shards[shard].address:
                    job.register_shard(shard)
                elif job.state.model is not None:
                    job.shard_ready(shard)
            case "report":
                document = {"ready": job.state.shards[shard].ready, "round": dice, "staleness": {str(dice): 1}}
                if job.state.shards[shard].address:
                    job.report(shard, **document)
            case "set":
                if job.state.shards[shard].address:
                    job.members_set(min(job.state.document()["version"], dice), shard)
            case "taken":
                if job.state.snapshot and job.state.shards[shard].address:
                    job.taken(shard, job.state.snapshot, "disk full" if dice % 5 == 0 else "")
            case "snapshot":
                self.snapshots += 1
                job.carry_out(job.state.begin_snapshot(self.snapshots, "folder", final=dice % 7 == 0))
            case "repeat":
                job.carry_out(job.state.repeat_snapshot())
            case "replaced":
                job.replaced(slot)
            case "lost":
                job.carry_out(job.state.worker_lost(slot))
            case "again":
                if self.past:
                    job.say(*self.past[dice % len(self.past)])
            case "register":
                message = m.RegisterWorker(number, *me, 1, MODEL.to_wire()) if expected else None
            case "pass":
                self.passes[slot, dice % 2] += 1
                message = m.BeginPass(number, *me, dice % 2, self.passes[slot, dice % 2], dice)
            case "lease" | "work":
                message = m.TakeLease(number, *me, dice % 2, dice // 20, 32, 4 * (kind == "lease"), "o", (dice, 32))
            case "barrier":
                message = m.EnterBarrier(number, *me, "barrier")
            case "metrics":
                message = m.LogMetrics(number, *me, dice, {"loss": dice / 2})
            case "progress":
                message = m.Progress(*me, dice, dice // 20, dice, 0, 0, 0, 0, 0.0)
            case "goodbye" if expected and job.state.workers[slot].answered:
                message = m.Goodbye(number, *me, dice % 2 == 0, dice)
        if message is not None:
            self.past.append((peer, message))
            job.say(peer, message)

    def speak(self) -> None:
        """Everybody says something, and repeats what was not answered."""
        for index in (0, 1):
            if self.job.state.shards[index].address:
                self.job.report(index, ready=self.job.state.shards[index].ready)
        for slot in sorted(self.job.state.workers):
            registered = [x for _, x in self.past if isinstance(x, m.RegisterWorker) and x.slot == slot]
            if registered:
                self.job.say(b"worker %d" % slot, registered[-1])
            self.job.progress(slot, clock=5)
            for _, message in self.past:
                if isinstance(message, m.EnterBarrier | m.BeginPass) and message.slot == slot:
                    self.job.say(b"worker %d" % slot, message)
        self.job.sent.clear()


events = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 40)), max_size=60)


@given(st.sampled_from(["async", "ssp:1", "sync"]), st.booleans(), events, events)
def test_another_process_goes_on_as_the_one_before_would_have(
    mode: str, begun: bool, before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> None:
    """Whatever has happened, the state survives JSON: both copies do the same with whatever happens next."""
    one, other = _Player(mode), _Player(mode)
    for player in (one, other):
        if begun:
            player.job.start()
        for event in before:
            player.play(*event)
        if player is other:
            player.job.restarted()
        player.job.state.abandon_snapshot()
        player.speak()
        player.job.outcomes.clear()
        player.job.rows.clear()
    for event in after:
        for player in (one, other):
            player.play(*event)
        assert {peer: sorted(map(repr, told)) for peer, told in one.job.sent.items()} == {
            peer: sorted(map(repr, told)) for peer, told in other.job.sent.items()
        }
    assert one.job.rows == other.job.rows
    assert one.job.outcomes == other.job.outcomes
    assert one.job.state.document() == other.job.state.document()


def test_in_sync_who_has_finished_keeps_its_part_of_passes() -> None:
    job = Job(workers=2, mode="sync").start()
    job.goodbye(1)
    answer = job.ask(b"worker 0", m.BeginPass(job.number(), *job.me(0), 1, 1, 8))
    assert isinstance(answer, m.PassBegins)
    assert (answer.workers, answer.index) == (2, 0), "whether the other's goodbye came before is a matter of chance"
