"""The coordinator as a state machine: who joins, who waits for whom, and what a checkpoint says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common.errors import ProtocolError
from downpour_common.layout import ModelSpec
from downpour_common.messages import Refusal
from downpour_common.modes import parse_mode
from downpour_coordinator.snapshots import CommitSnapshot, SnapshotFailed
from downpour_coordinator.state import Coordinator, Effect, JobFacts, LogRow, Send

MODEL = model(tensor("a", 3), tensor("b", 2))
OTHER = model(tensor("a", 3), tensor("b", 5))


class Job:
    """A coordinator and the messages of its processes. ``sent[peer]``: what each was told, in order."""

    def __init__(self, workers: int = 2, shards: int = 2, mode: str = "async", **facts: Any) -> None:
        self.workers, self.shards = workers, shards
        self.facts = JobFacts(JOB, workers, shards, parse_mode(mode), 7, 1024, **facts)
        self.state = Coordinator(self.facts)
        self.sent: dict[bytes, list[m.Message]] = {}
        self.outcomes: list[CommitSnapshot | SnapshotFailed] = []
        self.rows: list[dict[str, Any]] = []
        self._request = 0

    def number(self) -> int:
        self._request += 1
        return self._request

    def say(self, peer: bytes, message: m.Message) -> None:
        self.carry_out(self.state.handle(peer, message))

    def ask(self, peer: bytes, message: m.Request) -> m.Message | None:
        """Say it; the answer, or None while there is none."""
        self.say(peer, message)
        return self.answer(message.request)

    def answer(self, request: int) -> m.Message | None:
        answers = [a for told in self.sent.values() for a in told if getattr(a, "request", None) == request]
        assert len(answers) <= 1, "a request was answered twice"
        return answers[0] if answers else None

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self.sent.setdefault(peer, []).append(message)
                case LogRow(row):
                    self.rows.append(row)
                case CommitSnapshot() | SnapshotFailed():
                    self.outcomes.append(effect)

    def register_shard(self, index: int) -> None:
        self.say(b"shard %d" % index, m.RegisterShard(JOB, index, 0, 100 + index, f"address-{index}"))

    def shard_ready(self, index: int, error: str = "") -> None:
        self.say(b"shard %d" % index, m.ShardReady(index, error))

    def register_worker(self, slot: int, spec: ModelSpec = MODEL, **fields: Any) -> int:
        """Register; the request's number."""
        register = m.RegisterWorker(self.number(), JOB, slot, 0, 200 + slot, spec.to_wire())
        self.say(b"worker %d" % slot, replace(register, **fields))
        return register.request

    def start(self) -> Job:
        """Everybody joins."""
        for index in range(self.shards):
            self.register_shard(index)
        for slot in range(self.workers):
            self.register_worker(slot)
        for index in range(self.shards):
            self.shard_ready(index)
        assert self.state.training
        self.sent.clear()
        return self

    def lease(self, slot: int, epoch: int = 0, total: int = 32, unit: int = 4, **fields: Any) -> m.Message:
        take = m.TakeLease(self.number(), slot, fields.pop("loader", 0), epoch, total, unit, "order", ())
        answer = self.ask(b"worker %d" % slot, replace(take, **fields))
        assert answer is not None
        return answer

    def work(self, slot: int, batches: int, epoch: int = 0, total: int = 32) -> list[int]:
        """``slot`` takes and finishes this many leases; the positions it had."""
        had: list[int] = []
        done: tuple[int, ...] = ()
        for _ in range(batches):
            lease = self.lease(slot, epoch, total, done=done)
            assert isinstance(lease, m.Lease)
            had += range(lease.start, lease.stop)
            done = (lease.start, lease.stop)
        self.lease(slot, epoch, 0, 0, order="", done=done)
        return had

    def taken(self, shard: int, snapshot: int = 1, error: str = "", **document: Any) -> None:
        """A shard's answer to a snapshot."""
        found = {"file": f"shard-{shard}", "trainable_versions": [5], "position": [], **document}
        self.say(b"shard %d" % shard, m.SnapshotTaken(shard, snapshot, error, {} if error else found))


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
        welcome = m.Welcome(requests[slot], ("address-0", "address-1"), False, 0, (0, 0))
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
        job.register_worker(1, model={"tensors": 5})
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
        job.register_worker(0, model={"tensors": 5})
    except ProtocolError:
        pass
    assert isinstance(job.answer(job.register_worker(0)), m.Welcome)


@pytest.mark.parametrize("message", [m.ShardReady(9, ""), m.ShardReady(-1, ""), m.ShardReport(9, {}), m.Ack(1, 0)])
def test_messages_of_strangers_raise_nothing_but_protocol_errors(message: m.Message) -> None:
    job = Job().start()
    try:
        job.say(b"stranger", message)
    except ProtocolError:
        pass
    job.say(b"stranger", m.RegisterShard("job-2", 0, 0, 1, "elsewhere"))
    assert job.state.shards[0].address == "address-0"


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
    assert job.answer(job.register_worker(0)) == m.Welcome(1, (), True, 40, position)


# ---------------------------------------------------------------- leases


def test_all_workers_together_do_every_position_of_a_pass_once() -> None:
    job = Job(3).start()
    had: list[int] = []
    while True:
        before = len(had)
        for slot in range(3):
            had += job.work(slot, 1)
        if len(had) == before:
            break
    assert sorted(had) == list(range(32))
    assert job.state.data_position() == (1, [])


def test_what_a_worker_held_when_it_ended_goes_to_the_others() -> None:
    job = Job(2).start()
    lost = job.lease(0)
    assert isinstance(lost, m.Lease)
    job.carry_out(_gone(job, 0))
    had = job.work(1, 40)
    assert sorted(had) == list(range(32)), "what worker 0 held is among it"


def _gone(job: Job, slot: int) -> list[Effect]:
    effects: list[Effect] = []
    job.state.worker_gone(slot, effects)
    return effects


def test_loaders_and_passes_have_their_own_ledgers() -> None:
    job = Job().start()
    for fields in ({"epoch": 0}, {"epoch": 1}, {"epoch": 0, "loader": 1}):
        lease = job.lease(0, **fields)
        assert isinstance(lease, m.Lease)
        assert lease.start == 0


def test_a_pass_that_a_worker_left_early_is_free_for_the_others() -> None:
    job = Job().start()
    left = job.lease(0, epoch=0)
    assert isinstance(left, m.Lease)
    job.lease(0, epoch=1)
    again = job.lease(1, epoch=0)
    assert isinstance(again, m.Lease)
    assert again.start == left.start


@pytest.mark.parametrize("fields", [{"total": 31}, {"order": "another"}])
def test_a_worker_with_other_data_is_refused(fields: dict[str, Any]) -> None:
    job = Job().start()
    job.lease(0)
    refused = job.lease(1, **fields)
    assert isinstance(refused, m.Refused)
    assert refused.code == Refusal.DATA_DIFFERS
    assert "worker/1" in refused.reason
    assert isinstance(job.lease(0), m.Lease), "the others go on"


# ---------------------------------------------------------------- where the data is


def test_the_data_position_is_the_earliest_pass_that_is_not_complete() -> None:
    job = Job(2).start()
    assert job.state.data_position() == (0, [])
    slow = job.lease(1)
    assert isinstance(slow, m.Lease)
    job.work(0, 40)
    epoch, done = job.state.data_position()
    assert epoch == 0
    assert (slow.start, slow.stop) not in done
    assert sum(b - a for a, b in done) == 32 - (slow.stop - slow.start)
    job.work(0, 1, epoch=1)
    assert job.state.data_position()[0] == 0, "worker 1 is still at it"
    job.lease(1, done=(slow.start, slow.stop))
    assert job.state.data_position()[0] == 1


def test_the_data_position_is_that_of_the_first_loader() -> None:
    job = Job().start()
    job.lease(0, loader=1, epoch=5, total=4, unit=4)
    assert job.state.data_position() == (0, [])


def test_a_resumed_pass_goes_on_where_it_was() -> None:
    job = Job(1, resume="folder", clock=9, epoch=3, done=((0, 20),)).start()
    assert job.state.data_position() == (3, [(0, 20)])
    assert job.work(0, 40, epoch=3) == list(range(20, 32))
    assert job.state.data_position() == (4, [])
    assert job.work(0, 40, epoch=4) == list(range(32)), "only that pass was begun before"


# ---------------------------------------------------------------- barriers


def _enter(job: Job, slot: int, name: str = "barrier 1") -> int:
    enter = m.EnterBarrier(job.number(), slot, name)
    job.say(b"worker %d" % slot, enter)
    return enter.request


def test_a_barrier_opens_when_all_have_come() -> None:
    job = Job(3).start()
    entered = [_enter(job, slot) for slot in (2, 0)]
    assert [job.answer(r) for r in entered] == [None, None]
    entered.append(_enter(job, 1))
    assert [job.answer(r) for r in entered] == [m.Ack(r, 0) for r in entered]


def test_a_barrier_does_not_wait_for_those_who_left() -> None:
    job = Job(3).start()
    entered = [_enter(job, 0)]
    goodbye = m.Goodbye(job.number(), 1, 0)
    assert job.ask(b"worker 1", goodbye) == m.Ack(goodbye.request, 0)
    assert job.answer(entered[0]) is None
    job.carry_out(_gone(job, 2))
    assert job.answer(entered[0]) == m.Ack(entered[0], 0)
    assert job.answer(again := _enter(job, 0, "barrier 2")) == m.Ack(again, 0), "nobody else is left"


def test_one_who_came_and_then_left_does_not_stand_in_for_another() -> None:
    job = Job(3).start()
    _enter(job, 0)
    job.carry_out(_gone(job, 0))
    entered = _enter(job, 1)
    assert job.answer(entered) is None, "worker 2 has not come"
    _enter(job, 2)
    assert job.answer(entered) == m.Ack(entered, 0)


def test_barriers_of_different_names_are_apart() -> None:
    job = Job(2).start()
    first, second = _enter(job, 0, "barrier 1"), _enter(job, 1, "barrier 2")
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
    job.say(b"worker 0", m.Progress(0, 12, 0, 0, 0, 0, 0, 0, 0.0))
    assert _begin(job) == [m.TakeSnapshot(1, "folder-1", -1)] * 2
    job.taken(1, trainable_versions=[4, 9])
    assert job.outcomes == []
    job.taken(0)
    commit = job.outcomes.pop()
    assert isinstance(commit, CommitSnapshot)
    assert (commit.number, commit.folder) == (1, "folder-1")
    manifest = commit.manifest
    assert ModelSpec.from_wire(manifest["model"]) == MODEL
    assert [f["file"] for f in manifest["files"]] == ["shard-0", "shard-1"]
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
    job.say(b"shard 0", m.ShardReport(0, {"round": 40, "rounds_per_report": 6}))
    job.say(b"shard 1", m.ShardReport(1, {"round": 41, "rounds_per_report": 9}))
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
    job.say(b"worker 1", m.LogMetrics(1, 30, {"loss": 0.5, "note": "text is left out"}))
    assert job.rows == [{"worker": 1, "clock": 30, "loss": 0.5}]
    assert job.state.latest == {"loss": 0.5}


def test_a_metric_cannot_pass_itself_off_as_who_or_when() -> None:
    job = Job().start()
    job.say(b"worker 1", m.LogMetrics(1, 30, {"worker": 9, "clock": 9}))
    assert (job.rows[0]["worker"], job.rows[0]["clock"]) == (1, 30)


def test_staleness_is_summed_over_shards() -> None:
    job = Job().start()
    job.say(b"shard 0", m.ShardReport(0, {"staleness": {"0": 3, "2": 1}}))
    job.say(b"shard 1", m.ShardReport(1, {"staleness": {"2": 4}}))
    assert job.state.staleness() == {0: 3, 2: 5}


def test_stopping_is_told_to_the_living_only() -> None:
    job = Job().start()
    job.carry_out(_gone(job, 1))
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
        job.say(b"worker %d" % slot, m.ReportFailure(slot, "ValueError: no", "traceback"))
    assert [failure.slot for failure in job.state.failures] == [1, 0]
