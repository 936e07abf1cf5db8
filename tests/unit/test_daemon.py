"""The coordinator's process: answers leave once what they tell is written down, and each request is done once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_kit import MODEL, facts, shard_entry, spec_of
from hypothesis import given
from hypothesis import strategies as st
from test_access import TYPES, sample

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.keys import KeyPair, ServerKeys
from downpour_common.messages import Message, Refusal
from downpour_coordinator.daemon import CoordinatorDaemon
from downpour_coordinator.files import Files
from downpour_coordinator.journal import Journal
from downpour_coordinator.phases import Phase

CODE = b"the code" * 100
DIGEST = hashlib.sha256(CODE).hexdigest()
ALICE = "user/alice"


class Transport:
    """What arrives is put into ``arrived``; what leaves is found in ``sent``."""

    def __init__(self) -> None:
        self.arrived: list[tuple[bytes, str, Message]] = []
        self.sent: list[tuple[bytes, Message]] = []
        self.malformed = 0

    def poll_users(self, timeout_s: float) -> list[tuple[bytes, str, Message]]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def send(self, peer: bytes, message: Message) -> None:
        assert peer, "nobody is called that"
        self.sent.append((peer, message))


class BrokenJournal(Journal):
    """``broken``: why it cannot be written."""

    broken = ""

    def write(self, *args: Any) -> None:
        if self.broken:
            raise sqlite3.OperationalError(self.broken)
        super().write(*args)


class Desk:
    """A coordinator's process and those who talk to it."""

    def __init__(self, folder: Path, secure: bool = True) -> None:
        self.folder, self.secure = folder, secure
        self.made = 0
        self.now_s = 1000.0
        self.audit: list[str] = []
        self._request = 0
        self.open()

    def open(self) -> None:
        """The process starts, for the first time or again."""
        self.transport = Transport()
        self.files = Files(str(self.folder))
        self.journal = BrokenJournal(str(self.folder / "coordinator.db"), durable=False)
        self.keys = ServerKeys(self._pair(), {}) if self.secure else None
        make = self._pair if self.secure else None
        transport: Any = self.transport
        desk = self

        class Daemon(CoordinatorDaemon):
            def _now(self) -> float:
                return desk.now_s

        self.daemon = Daemon(transport, self.files, self.journal, self.keys, make, 1000.0, self.audit.append)

    def _pair(self) -> KeyPair:
        self.made += 1
        return KeyPair(f"{self.made:040d}", f"{self.made + 500:040d}")

    def close(self) -> None:
        """The process ends, and the system closes what it had open."""
        self.journal.close()
        for file in self.daemon._metrics.values():
            file.close()

    def killed(self) -> None:
        """The process is killed and started again; agents say who they are."""
        self.close()
        self.open()

    def number(self) -> int:
        self._request += 1
        return self._request

    def say(self, user: str, *messages: Message, peer: bytes = b"peer") -> None:
        """These messages arrive together."""
        self.transport.arrived += [(peer, user, message) for message in messages]
        self.daemon._pump()

    def ask(self, user: str, message: m.Request, peer: bytes = b"peer") -> Message | None:
        """The answer that has left, or None."""
        before = len(self.transport.sent)
        self.say(user, message, peer=peer)
        sent = self.transport.sent[before:]
        answers = [x for p, x in sent if p == peer and getattr(x, "request", None) == message.request]
        assert len(answers) <= 1, "a request was answered twice"
        return answers[0] if answers else None

    def tick(self, seconds: float = 0.1) -> None:
        """Time passes."""
        self.now_s += seconds
        self.daemon._carry_out(self.daemon.cluster.tick(self.now_s))
        self.daemon._flush()

    # ------------------------------------------------------------ who there is

    def agents(self) -> None:
        """A server and a worker with two slots."""
        for name, role in (("s1", "server"), ("w1", "worker")):
            register = m.RegisterNode(self.number(), name, role, "i", facts(slots=2))
            assert isinstance(self.ask(role, register, name.encode()), m.Ack)

    def upload(self) -> None:
        assert self.ask(ALICE, m.PutBundle(self.number(), DIGEST, len(CODE), 0, CODE)) is not None

    def submission(self, token: str = "a" * 32, bundle: str = DIGEST, **fields: Any) -> m.SubmitJob:
        extras = {k: fields.pop(k) for k in ("anyway", "dry_run") if k in fields}
        spec = spec_of(**fields).model_dump(mode="json")
        return m.SubmitJob(self.number(), token, bundle, {"spec": spec, **extras})

    def submit(self, user: str = ALICE, **fields: Any) -> dict[str, Any]:
        """Submit a job; its description."""
        return reply(self.ask(user, self.submission(**fields)))

    def started(self, **fields: Any) -> str:
        """A job whose processes have a place."""
        self.agents()
        self.upload()
        job = str(self.submit(**fields)["job"])
        assert self.daemon.cluster.jobs[job].life.phase is Phase.STARTING
        return job

    def running(self, **fields: Any) -> str:
        """A job with one worker and one shard, in training."""
        job = self.started(workers=1, **fields)
        user = f"job/{job}"
        self.say(user, m.RegisterShard(job, 0, 0, 1, "address"), peer=b"shard")
        self.say(user, m.RegisterWorker(self.number(), job, 0, 0, 2, MODEL.to_wire()), peer=b"worker")
        self.say(user, m.ShardReady(job, 0, 0, ""), peer=b"shard")
        assert self.daemon.cluster.jobs[job].life.phase is Phase.TRAINING
        return job

    def heard(self, peer: bytes, kind: type[Message]) -> list[Any]:
        return [message for p, message in self.transport.sent if p == peer and isinstance(message, kind)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def reply(message: Message | None) -> dict[str, Any]:
    assert isinstance(message, m.Reply), message
    return message.document


def refused(message: Message | None) -> tuple[str, str]:
    assert isinstance(message, m.Refused), message
    assert "\n" not in message.reason
    return message.code, message.reason


# ---------------------------------------------------------------- written down, then told


def test_nothing_is_answered_that_is_not_written_down(desk: Desk) -> None:
    desk.agents()
    desk.upload()
    desk.journal.broken = "database or disk is full"
    submission = desk.submission()
    assert desk.ask(ALICE, submission) is None
    for _ in range(20):
        desk.tick()
    assert desk.ask(ALICE, submission) is None, "nor is its repeat"
    assert desk.heard(b"w1", m.StartProcess) == []
    assert sum("disk is full" in line for line in desk.audit) == 1, "it is told once"
    desk.journal.broken = ""
    desk.tick()
    answers = [reply(x)["job"] for p, x in desk.transport.sent if p == b"peer" and isinstance(x, m.Reply)]
    assert len(answers) == 2
    assert len(set(answers)) == 1
    assert desk.heard(b"w1", m.StartProcess)
    assert "can be written again" in desk.audit[-1]


def test_what_was_not_told_may_be_forgotten(desk: Desk) -> None:
    desk.agents()
    desk.upload()
    desk.journal.broken = "database or disk is full"
    submission = desk.submission()
    desk.ask(ALICE, submission)
    desk.killed()
    assert desk.daemon.cluster.jobs == {}
    desk.agents()
    assert reply(desk.ask(ALICE, submission))["name"] == "digits"


def test_what_was_told_is_remembered(desk: Desk) -> None:
    job = desk.running()
    user = f"job/{job}"
    take = m.TakeLease(desk.number(), job, 0, 0, 0, 0, 32, 4, "order", ())
    lease = desk.ask(user, take, b"worker")
    assert isinstance(lease, m.Lease)
    before = desk.daemon.cluster.jobs[job].keys
    desk.killed()
    assert desk.daemon.cluster.jobs[job].keys == before
    assert desk.ask(user, take, b"worker again") == lease
    assert desk.daemon.cluster.jobs[job].life.state == "RUNNING"
    assert desk.keys is not None
    assert list(desk.keys.allowed.values()) == [f"job/{job}"]
    assert "1 running" in desk.audit[-1]


def test_metrics_are_written_once(desk: Desk) -> None:
    job = desk.running()
    user, path = f"job/{job}", Path(desk.files.job(job)) / "metrics.jsonl"

    def row(n: int) -> m.LogMetrics:
        return m.LogMetrics(100 + n, job, 0, 0, n, {"loss": float(n)})

    desk.say(user, row(1), row(1), row(2), peer=b"worker")
    desk.journal.broken = "disk is full"
    desk.say(user, row(3), peer=b"worker")
    assert len(path.read_text().splitlines()) == 3
    desk.journal.broken = ""
    desk.killed()
    assert len(path.read_text().splitlines()) == 2, "nobody was told that the third is there"
    desk.say(user, row(2), row(3), peer=b"worker")
    assert [line.split('"clock": ')[1] for line in path.read_text().splitlines()] == ["1}", "2}", "3}"]


def test_answers_leave_in_the_order_of_the_requests(desk: Desk) -> None:
    pings = [m.Ping(desk.number(), bytes([n])) for n in range(5)]
    desk.say(ALICE, *pings)
    assert [x.request for x in desk.heard(b"peer", m.Pong)] == [p.request for p in pings]


# ---------------------------------------------------------------- submissions


def test_a_job_is_submitted(desk: Desk) -> None:
    desk.agents()
    desk.upload()
    document = desk.submit(workers=2)
    job = document["job"]
    assert (document["state"], document["user"], document["exit_code"]) == ("STARTING", ALICE, None)
    assert {p["name"] for p in document["processes"]} == {"server/0", "worker/0", "worker/1"}
    assert (Path(desk.files.job(job)) / "job.toml").read_text().startswith('name = "digits"')
    start = desk.heard(b"w1", m.StartProcess)[0]
    assert (start.document["bundle"], start.document["bundle_bytes"]) == (DIGEST, len(CODE))
    assert "shard_secret" not in start.document["keys"]
    assert "shard_secret" in desk.heard(b"s1", m.StartProcess)[0].document["keys"]
    assert any(job in line and ALICE in line and "train.py" in line for line in desk.audit)
    listed = reply(desk.ask(ALICE, m.ListJobs(desk.number())))["jobs"]
    assert [j["job"] for j in listed] == [job]
    assert not {"spec", "processes", "result"} & set(listed[0])


def test_a_token_stands_for_one_job_of_one_user(desk: Desk) -> None:
    desk.agents()
    desk.upload()
    first = desk.submission()
    job = reply(desk.ask(ALICE, first))["job"]
    assert reply(desk.ask(ALICE, first))["job"] == job
    assert reply(desk.ask(ALICE, desk.submission(workers=1)))["job"] == job, "it is the token that counts"
    assert reply(desk.ask("user/bob", desk.submission()))["job"] != job
    assert reply(desk.ask(ALICE, desk.submission(token="b" * 32)))["job"] != job
    assert len(desk.daemon.cluster.jobs) == 3


def test_code_must_be_there_first(desk: Desk) -> None:
    desk.agents()
    assert refused(desk.ask(ALICE, desk.submission()))[0] == Refusal.NOT_READY
    assert desk.daemon.cluster.jobs == {}
    assert os.listdir(desk.files.jobs) == []
    desk.upload()
    assert desk.submit()["job"]


@pytest.mark.parametrize(("token", "bundle"), [("", DIGEST), ("A" * 32, DIGEST), ("a" * 32, "../x")])
def test_a_token_is_a_token_and_a_digest_a_digest(desk: Desk, token: str, bundle: str) -> None:
    desk.agents()
    assert refused(desk.ask(ALICE, desk.submission(token, bundle)))[0] == Refusal.MALFORMED


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"spec": 5},
        {"spec": {}},
        {"spec": {"name": "Bad Name", "script": "x", "workers": 1, "shards": 1}},
        {"spec": {"name": "../x", "script": "x", "workers": 1, "shards": 1}},
        {"spec": {"name": "x", "script": "x", "workers": 1, "shards": 1, "self": 5}},
        {"spec": {"name": "x", "script": "x", "workers": 1, "shards": 1, "settings": {"no_such": 1}}},
        {"spec": {"name": "x", "script": "x", "workers": 1, "shards": 1, "env": {"A": "b\0"}}},
    ],
    ids=repr,
)
def test_a_spec_must_be_one(desk: Desk, document: dict[str, Any]) -> None:
    desk.agents()
    desk.upload()
    message = desk.ask(ALICE, m.SubmitJob(desk.number(), "a" * 32, DIGEST, document))
    assert isinstance(message, m.Refused)
    assert message.code == Refusal.UNUSABLE
    assert desk.daemon.cluster.jobs == {}


def test_what_is_too_large_is_refused_unless_it_may_wait(desk: Desk) -> None:
    desk.agents()
    desk.upload()
    code, reason = refused(desk.ask(ALICE, desk.submission(workers=3)))
    assert (code, reason) == (
        Refusal.TOO_LARGE,
        "the cluster is too small for this job: 1 of 3 worker slots are missing",
    )
    document = desk.submit(workers=3, anyway=True)
    assert (document["state"], document["position"]) == ("PENDING", 1)
    assert document["message"] == "waiting for room: 1 of 3 worker slots are missing"


def test_a_dry_run_leaves_nothing_behind(desk: Desk) -> None:
    desk.agents()
    document = desk.submit(workers=2, dry_run=True)
    assert (document["fits"], document["message"]) == (True, "would start now")
    assert {(p["role"], p["node"]) for p in document["placement"]} == {("server", "s1"), ("worker", "w1")}
    assert document["spec"]["workers"] == 2
    assert refused(desk.ask(ALICE, desk.submission(workers=3, dry_run=True)))[0] == Refusal.TOO_LARGE
    desk.upload()
    desk.submit(token="c" * 32, workers=2)
    document = desk.submit(token="d" * 32, workers=2, dry_run=True)
    assert (document["fits"], document["placement"]) == (False, [])
    assert document["message"].startswith("would wait: ")
    assert len(desk.daemon.cluster.jobs) == 1


def test_a_job_goes_on_from_anothers_checkpoint(desk: Desk) -> None:
    job = desk.started(workers=1)
    for name, code in [("nothing", Refusal.UNKNOWN), (job, Refusal.CHECKPOINT), ("s3://x", Refusal.CHECKPOINT)]:
        assert refused(desk.ask(ALICE, desk.submission(token="b" * 32, workers=1, resume=name)))[0] == code
    _checkpoint(desk, job, 3)
    _checkpoint(desk, job, 4)
    (Path(desk.files.job(job)) / "checkpoints/000004/shard-0.safetensors").write_bytes(b"damaged")
    document = desk.submit(token="b" * 32, workers=1, resume=job)
    other = document["job"]
    assert document["checkpoints"] == [3], "the newest that is sound"
    life = desk.daemon.cluster.jobs[other].life
    assert (life.training.facts.resume, life.training.facts.clock) == ("checkpoints/000003", 17)
    start = desk.heard(b"s1", m.StartProcess)[-1]
    assert (start.job, start.document["resume"]) == (other, "checkpoints/000003")
    assert start.document["fetch"] == [
        "checkpoints/000003/manifest.json",
        "checkpoints/000003/shard-0.safetensors",
    ]
    for path in start.document["fetch"]:
        assert isinstance(desk.ask("server", m.GetFile(desk.number(), other, path, 0, 10)), m.FileData)


def _checkpoint(desk: Desk, job: str, number: int) -> None:
    from downpour_common.layout import plan
    from downpour_common.tensorfile import TensorHead, write_tensors
    from downpour_coordinator import checkpoints

    folder = Path(desk.files.job(job)) / f"checkpoints/{number:06d}"
    folder.mkdir(parents=True)
    chunk = plan(MODEL, 1, 1 << 20).chunks[0]
    file = folder / "shard-0.safetensors"
    digest = write_tensors(str(file), [TensorHead("0.weights", chunk.dtype, (chunk.numel,))], [bytes(chunk.nbytes)])
    entry = {
        **shard_entry(0),
        "bytes": file.stat().st_size,
        "sha256": digest,
        "chunks": {"0": {}},
    }
    manifest = {
        "format": 1,
        "clock": 17,
        "seed": 0,
        "shards": 1,
        "chunk_bytes": 1 << 20,
        "model": MODEL.to_wire(),
        "files": [entry],
        "data": {"epoch": 2, "done": [[0, 8]]},
    }
    checkpoints.commit(str(folder), manifest)


def test_a_user_has_a_checkpoint_made(desk: Desk) -> None:
    job = desk.running()
    found = reply(desk.ask(ALICE, m.CheckpointNow(desk.number(), job, "t" * 32)))
    assert (found["job"], found["state"], found["number"]) == (job, "waiting", 0)
    desk.tick()
    assert len(desk.heard(b"shard", m.TakeSnapshot)) == 1
    assert reply(desk.ask(ALICE, m.CheckpointNow(desk.number(), job, "t" * 32)))["state"] == "writing"
    long = desk.ask(ALICE, m.CheckpointNow(desk.number(), job, "t" * 1000))
    assert refused(long)[0] == Refusal.UNUSABLE
    assert refused(desk.ask(ALICE, m.CheckpointNow(desk.number(), "nothing", "t")))[0] == Refusal.UNKNOWN
    other = desk.submit(token="b" * 32, workers=1)["job"]
    assert "only a running job" in refused(desk.ask(ALICE, m.CheckpointNow(desk.number(), other, "t")))[1]


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("file:///copies/a", True),
        ("file:///copies", True),
        ("file:///copies-of-others", False),
        ("file:///etc", False),
        ("memory://x", False),
    ],
)
def test_copies_go_where_the_administrator_says(desk: Desk, url: str, fine: bool) -> None:
    desk.agents()
    desk.upload()
    desk.daemon._copies_to = ("file:///copies",)
    answer = desk.ask(ALICE, desk.submission(settings={"checkpoint_url": url}, dry_run=True))
    if fine:
        reply(answer)
    else:
        assert "this coordinator copies checkpoints to file:///copies" in refused(answer)[1]


# ---------------------------------------------------------------- what users ask


def test_a_job_is_described_cancelled_and_stays_so(desk: Desk) -> None:
    job = desk.started()
    for text in (job, "digits", job[:-2]):
        assert reply(desk.ask(ALICE, m.DescribeJob(desk.number(), text)))["job"] == job
    for _ in range(2):
        assert reply(desk.ask(ALICE, m.CancelJob(desk.number(), job)))["state"] == "STOPPING"
    desk.tick(1.0)
    assert desk.heard(b"w1", m.StopProcess)
    for name, role, index in (("w1", "worker", 0), ("w1", "worker", 1), ("s1", "server", 0)):
        ended = m.ProcessEnded(desk.number(), name, "i", job, role, index, 0, {"code": -15, "stopped": "asked"})
        assert isinstance(desk.ask(role, ended, name.encode()), m.Ack)
    desk.tick()
    document = reply(desk.ask(ALICE, m.CancelJob(desk.number(), job)))
    assert (document["state"], document["reason"], document["exit_code"]) == ("CANCELLED", "CANCELLED", 103)
    assert document["result"]["job"] == job
    assert refused(desk.ask(ALICE, m.ScaleJob(desk.number(), job, 1)))[0] == Refusal.UNUSABLE
    assert desk.keys is not None
    assert desk.keys.allowed == {}, "its keys are worth nothing any more"
    desk.killed()
    assert reply(desk.ask(ALICE, m.DescribeJob(desk.number(), job)))["state"] == "CANCELLED"
    assert desk.keys.allowed == {}


def test_a_job_is_scaled(desk: Desk) -> None:
    job = desk.running()
    assert reply(desk.ask(ALICE, m.ScaleJob(desk.number(), job, 2)))["workers"] == {"wanted": 2, "live": 1, "min": 1}
    desk.tick()
    assert [s.index for s in desk.heard(b"w1", m.StartProcess)] == [0, 1]
    for workers in (0, -1, 5000):
        assert refused(desk.ask(ALICE, m.ScaleJob(desk.number(), job, workers)))[0] == Refusal.UNUSABLE


@pytest.mark.parametrize("kind", [m.DescribeJob, m.CancelJob, m.ListFiles])
def test_a_job_that_nobody_knows(desk: Desk, kind: Any) -> None:
    assert refused(desk.ask(ALICE, kind(desk.number(), "nothing"))) == ("unknown", "there is no job nothing")


def test_a_beginning_of_several_jobs_is_not_enough(desk: Desk) -> None:
    desk.started(workers=1, name="one-a")
    desk.submit(token="b" * 32, workers=1, name="one-b")
    code, reason = refused(desk.ask(ALICE, m.CancelJob(desk.number(), "one")))
    assert code == Refusal.UNUSABLE
    assert reason.count("one-") == 2


def test_nodes_are_listed_and_drained(desk: Desk) -> None:
    desk.agents()
    document = reply(desk.ask(ALICE, m.ListNodes(desk.number())))
    assert [(n["node"], n["state"]) for n in document["nodes"]] == [("s1", "READY"), ("w1", "READY")]
    assert document["coordinator"]["security"] == "curve"
    assert reply(desk.ask(ALICE, m.DrainNode(desk.number(), "w1", False)))["state"] == "DRAINING"
    desk.killed()
    assert reply(desk.ask(ALICE, m.DrainNode(desk.number(), "w1", True)))["state"] == "READY"
    assert refused(desk.ask(ALICE, m.DrainNode(desk.number(), "nobody", False)))[0] == Refusal.UNKNOWN


def test_files_are_listed_and_read(desk: Desk) -> None:
    job = desk.started(workers=1)
    log = m.LogData(desk.number(), "w1", "i", job, "worker", 0, 0, 0, b"hello\n")
    assert desk.ask("worker", log) == m.Ack(log.request, 6)
    assert ["logs/worker-0.log", 6] in reply(desk.ask(ALICE, m.ListFiles(desk.number(), job)))["files"]
    get = m.GetFile(desk.number(), job, "logs/worker-0.log", 0, 100)
    assert desk.ask(ALICE, get) == m.FileData(get.request, 6, 0, b"hello\n")
    get = m.GetFile(desk.number(), job, "bundle", 0, 10)
    assert desk.ask("worker", get) == m.FileData(get.request, len(CODE), 0, CODE[:10])
    assert refused(desk.ask("worker", m.GetFile(desk.number(), job, "job.toml", 0, 9)))[0] == Refusal.FORBIDDEN
    assert refused(desk.ask(ALICE, m.GetFile(desk.number(), "no-job", "bundle", 0, 9)))[0] == Refusal.UNKNOWN


def test_output_of_strangers_is_not_kept(desk: Desk) -> None:
    job = desk.started(workers=1)
    for fields in ({"node": "w2"}, {"instance": "x"}, {"job": "unknown"}, {"node": "s1"}):
        found = {"node": "w1", "instance": "i", "job": job, "role": "worker", "index": 0, "epoch": 0, **fields}
        assert isinstance(desk.ask("worker", m.LogData(desk.number(), **found, offset=0, payload=b"x")), m.Refused)
    assert os.listdir(os.path.join(desk.files.job(job), "logs")) == []


# ---------------------------------------------------------------- who may say what


@pytest.mark.parametrize("sender", ["user", "server", "worker", "job/JOB", "job/other", ""])
def test_no_message_of_anybody_ends_the_coordinator(desk: Desk, sender: str) -> None:
    """Whatever the values are."""
    job = desk.running()
    sender = sender.replace("JOB", job)
    for kind in TYPES:
        for values in ({}, {"job": job}, {"slot": -1, "index": -1, "shard": -1, "request": -1, "epoch": -1}):
            desk.say(sender, sample(kind, **{"role": "worker", "job": job, "node": "w1", "instance": "i", **values}))
            desk.tick()
    assert isinstance(desk.ask("user", m.Ping(77, b"still there?")), m.Pong)


def test_who_may_not_is_told_so(desk: Desk) -> None:
    code, reason = refused(desk.ask("worker", m.ListJobs(desk.number())))
    assert (code, reason) == (Refusal.FORBIDDEN, "the key of 'worker' may not send ListJobs")
    before = desk.transport.malformed
    desk.say("user", m.Heartbeat("w1", "i", {}))
    assert desk.transport.malformed == before + 1


def test_a_job_does_not_speak_for_another(desk: Desk) -> None:
    job = desk.running()
    take = m.TakeLease(desk.number(), job, 0, 0, 0, 0, 32, 4, "order", ())
    assert refused(desk.ask("job/other", take))[0] == Refusal.FORBIDDEN
    assert isinstance(desk.ask(f"job/{job}", take), m.Lease)


@pytest.mark.parametrize(
    "document",
    [
        {"staleness": [1]},
        {"staleness": {"x": 1}},
        {"round": "7"},
        {"clock_gap_max": {}},
        {"pid": "x", "address": 5},
        {"members": -5},
    ],
    ids=repr,
)
def test_a_report_that_makes_no_sense_is_counted(desk: Desk, document: dict[str, Any]) -> None:
    job = desk.running()
    before = desk.transport.malformed
    desk.say(f"job/{job}", m.ShardReport(job, 0, 0, document), peer=b"shard")
    assert desk.transport.malformed == before + 1
    desk.tick(25.0)
    assert reply(desk.ask(ALICE, m.DescribeJob(desk.number(), job)))["staleness"] == {}


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_uploaded_and_committed(desk: Desk) -> None:
    async def play() -> None:
        job = desk.running()
        user = f"job/{job}"
        desk.tick(21.0)
        assert desk.heard(b"shard", m.TakeSnapshot) == [m.TakeSnapshot(1, "checkpoints/000001", -1)]
        for offset, payload, held in [(0, b"wei", 3), (0, b"wei", 3), (5, b"xx", 3), (3, b"", 3), (3, b"ghts", 7)]:
            part = m.SnapshotPart(desk.number(), job, 0, 0, 1, "shard-0.safetensors", offset, payload)
            assert desk.ask(user, part, b"shard") == m.Ack(part.request, held)
        entry = {**shard_entry(0), "bytes": 7, "chunks": {"0": {}}}
        desk.say(user, m.SnapshotTaken(job, 0, 0, 1, "", entry), peer=b"shard")
        await asyncio.gather(*desk.daemon._working)
        await asyncio.sleep(0)
        document = reply(desk.ask(ALICE, m.DescribeJob(desk.number(), job)))
        assert document["checkpoints"] == [1]
        assert "checkpoint" not in document["degraded"]
        late = m.SnapshotPart(desk.number(), job, 0, 0, 1, "shard-0.safetensors", 7, b"more")
        assert refused(desk.ask(user, late, b"shard"))[0] == Refusal.CHECKPOINT
        desk.killed()
        assert reply(desk.ask(ALICE, m.DescribeJob(desk.number(), job)))["checkpoints"] == [1]
        desk.say(user, m.ShardReport(job, 0, 0, {"ready": True}), peer=b"shard")
        desk.tick(21.0)
        assert desk.heard(b"shard", m.TakeSnapshot) == [m.TakeSnapshot(2, "checkpoints/000002", -1)]

    asyncio.run(play())


def test_without_security_all_is_open(tmp_path: Path) -> None:
    desk = Desk(tmp_path, secure=False)
    for name, role in (("s1", "server"), ("w1", "worker")):
        register = m.RegisterNode(desk.number(), name, role, "i", facts(slots=2))
        assert isinstance(desk.ask("", register, name.encode()), m.Ack)
    desk.upload()
    job = desk.submit(user="", workers=1)["job"]
    assert desk.heard(b"w1", m.StartProcess)[0].document["keys"] is None
    evil = m.LogData(desk.number(), "w1", "i", job, "../../../evil", 0, 0, 0, b"x")
    assert refused(desk.ask("", evil))[0] in (Refusal.MALFORMED, Refusal.UNKNOWN)
    assert not list(tmp_path.parent.glob("**/evil*"))
    assert reply(desk.ask("", m.ListNodes(desk.number())))["coordinator"]["security"] == "none"
    desk.close()


NAMES = [
    "staleness", "round", "rounds_per_report", "pid", "address", "members", "error", "ready", "clock_gap_max", "file",
    "bytes", "sha256", "chunks", "trainable_versions", "position", "tensors", "options", "rule", "buffers", "processes",
    "job", "role", "index", "epoch", "state", "draining", "code", "tail", "stopped", "spec", "name", "script",
    "workers", "shards", "settings", "env", "resume", "labels", "slots", "memory_bytes", "gpus", "loss", "worker",
    "anyway", "dry_run",
]  # fmt: skip
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.sampled_from(["", "x", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(st.sampled_from(NAMES), plain, max_size=8)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A coordinator that is not made anew for each example."""
    desk = Desk(tmp_path_factory.mktemp("data"), secure=False)
    desk.running()
    yield desk
    desk.close()


@given(documents)
def test_no_document_of_anybody_ends_the_coordinator(busy: Desk, document: dict[str, Any]) -> None:
    job = next(iter(busy.daemon.cluster.jobs))
    number = busy.number
    for message in (
        m.ShardReport(job, 0, 0, document),
        m.SnapshotTaken(job, 0, 0, 1, "", document),
        m.RegisterWorker(number(), job, 0, 0, 1, document),
        m.LogMetrics(number(), job, 0, 0, 1, document),
        m.Heartbeat("w1", "i", document),
        m.Heartbeat("w1", "i", {"processes": [document, {**document, "job": job, "role": "worker", "index": 9}]}),
        m.RegisterNode(number(), "w1", "worker", "i", {**facts(slots=2), **document}),
        m.ProcessEnded(number(), "w1", "i", job, "worker", 9, 0, document),
        m.SubmitJob(number(), "e" * 32, DIGEST, document),
        m.SubmitJob(number(), "f" * 32, DIGEST, {"spec": document}),
        m.SubmitJob(number(), "f" * 32, DIGEST, {"spec": {**spec_of().model_dump(mode="json"), **document}}),
        m.DescribeJob(number(), job),
        m.ListJobs(number()),
        m.ListNodes(number()),
    ):
        assert wire.decode(list(wire.encode(message)), wire.CONTROL_HEADER_LIMIT) is not None
        busy.say("", message)
        busy.tick()
    for _, message in busy.transport.sent:
        wire.encode(message)
    busy.transport.sent.clear()
