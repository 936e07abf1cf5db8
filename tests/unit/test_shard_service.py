"""The thin loop around the shard: what a stranger sends must not end it, and a coordinator that comes back, forgets
what was said or asks twice gets what it needs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, payload, tensor, values_of

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ConfigError, PeerTimeout
from downpour_common.transport.memory import MemoryClient, MemoryNetwork
from downpour_server.config import ShardConfig
from downpour_server.keeper import SnapshotKeeper
from downpour_server.service import ShardService
from downpour_server.snapshot import WriteSnapshot, write
from downpour_server.upload import PART_BYTES

MODEL = model(tensor("w", 4))
HELLO = m.Hello(7, JOB, 0, 0, MODEL.digest)
CONFIG = ShardConfig(JOB, 0, 3, "coordinator", "server-0", 2, 1, "async", 1024, 10.0, 60.0)
SET_UP = m.SetUpShard(MODEL.to_wire(), "")


def arrived(client: MemoryClient) -> list[m.Message]:
    """All that has come back to a client."""
    found: list[m.Message] = []
    while got := client.poll(0):
        found += [message for _, message in got]
    return found


class Bench:
    """A shard's loop, one turn at a time; time goes on as the test says."""

    def __init__(self, config: ShardConfig = CONFIG) -> None:
        self.network = MemoryNetwork()
        self.coordinator, self.worker = self.network.server("coordinator"), self.network.client()
        self.control = self.network.client()
        self.now_s = 0.0
        self.turns: list[Callable[[], object]] = []
        self.told: list[list[m.Message]] = []
        data = self.network.server("server-0")
        self.service = ShardService(config, data, self.control, clock=self._clock)
        data.poll = self._turn(data.poll)  # type: ignore[method-assign]

    def _clock(self) -> float:
        return self.now_s

    def _turn(self, poll: Callable[[float], Any]) -> Callable[[float], Any]:
        def turn(_timeout_s: float) -> Any:
            self._hear()
            if self.turns:
                self.turns.pop(0)()
            else:
                self.say(m.StopShard())
            return poll(0.0)

        return turn

    def _hear(self) -> None:
        self.told.append([x for _ in range(self.coordinator.inbox.qsize()) for _, x in self.coordinator.poll(0)])

    def say(self, *messages: m.Message) -> None:
        """As the coordinator."""
        for message in messages:
            self.control.inbox.put(("coordinator", list(wire.encode(message))))

    def run(self, *turns: m.Message | float) -> list[list[m.Message]]:
        """One turn of the loop each, with this message from the coordinator, or at this time; what was told in
        between: ``[0]`` before the first turn, ``[n]`` after the n-th."""
        for turn in turns:
            if isinstance(turn, m.Message):
                self.turns.append(lambda message=turn: self.say(message))  # type: ignore[misc]
            else:
                self.turns.append(lambda now_s=turn: setattr(self, "now_s", now_s))  # type: ignore[misc]
        self.service.run()
        self._hear()
        return self.told


def serve(*data: m.Message, spec: Any = None) -> tuple[list[m.Message], list[m.Message]]:
    """A shard that is set up, gets ``data``, one message per turn of its loop, and is then told to stop.

    What the worker and what the coordinator were told.
    """
    bench = Bench()
    for message in [m.Pull(1, JOB, 0, 0, 0), *data]:  # the first comes before the set-up
        bench.worker.send("server-0", message)
    set_up = m.SetUpShard(MODEL.to_wire() if spec is None else spec, "")
    told = bench.run(set_up, *[m.ShouldStop("not for shards")] * len(data))
    return arrived(bench.worker), [message for turn in told for message in turn]


def of_type(messages: list[list[m.Message]], kind: type[m.Message]) -> list[Any]:
    return [message for turn in messages for message in turn if isinstance(message, kind)]


def test_a_shard_registers_gets_ready_answers_reports_and_stops() -> None:
    answers, told = serve(HELLO)
    assert answers == [m.HelloReply(7, 0, 3, 0)]
    register, ready, report = told
    assert isinstance(register, m.RegisterShard)
    assert (register.job, register.shard, register.shard_epoch, register.address) == (JOB, 0, 3, "server-0")
    assert ready == m.ShardReady(JOB, 0, 3, "")
    assert isinstance(report, m.ShardReport)


@pytest.mark.parametrize(
    "message",
    [
        m.StopShard(),
        m.Ack(1, 0),
        m.Weights(1, 0, 0, b""),
        m.RegisterShard(JOB, 0, 0, 1, "elsewhere"),
        m.Push(2, JOB, 3, 0, 0, 0, 0, 0, 1, (), b"\xc1", bytes(16)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_shard_goes_on_after_a_message_that_makes_no_sense(message: m.Message) -> None:
    answers, _ = serve(message, HELLO)
    assert m.HelloReply(7, 0, 3, 0) in answers


@pytest.mark.parametrize(
    "document",
    [{}, {**MODEL.to_wire(), "rule": "Lioness"}],
    ids=["malformed", "unknown rule"],
)
def test_a_shard_that_cannot_be_set_up_says_why(document: dict[str, Any]) -> None:
    told = Bench().run(m.SetUpShard(document, ""), 0.6, m.SetUpShard(document, ""))
    ready = of_type(told, m.ShardReady)
    assert len(ready) == 2
    assert ready[0] == ready[1]
    assert ready[0].error
    report = of_type(told, m.ShardReport)[0].document
    assert (report["ready"], report["error"]) == (False, ready[0].error)


def test_a_shard_that_is_never_set_up_gives_up_by_name() -> None:
    with pytest.raises(PeerTimeout, match="coordinator"):
        Bench().run(59.0, 61.0)


# ---------------------------------------------------------------- a coordinator that comes and goes


def test_it_registers_until_it_is_set_up() -> None:
    told = Bench().run(1.0, 2.5, 3.0, 5.0, SET_UP, 9.0)
    assert [len([x for x in turn if isinstance(x, m.RegisterShard)]) for turn in told] == [1, 0, 1, 0, 1, 0, 0, 0]


def test_a_second_set_up_is_answered_and_changes_nothing() -> None:
    bench = Bench()
    bench.turns.append(lambda: bench.say(SET_UP))
    bench.turns.append(lambda: bench.worker.send("server-0", m.Init(1, JOB, 0, 0, 0, payload(torch.ones(4)))))
    bench.turns.append(lambda: bench.say(SET_UP))
    bench.turns.append(lambda: bench.worker.send("server-0", m.Pull(2, JOB, 1, 0, 0)))
    told = bench.run()
    assert of_type(told, m.ShardReady) == [m.ShardReady(JOB, 0, 3, "")] * 2
    weights = arrived(bench.worker)[1]
    assert isinstance(weights, m.Weights)
    assert bytes(weights.payload) == bytes(payload(torch.ones(4)))


def test_reports_hold_all_that_may_have_been_missed() -> None:
    bench = Bench()
    bench.turns.append(lambda: bench.say(m.SetMembers(4, (0, 0, 6, 2))))
    bench.turns.append(lambda: bench.say(SET_UP))
    bench.turns.append(lambda: bench.worker.send("server-0", m.Init(1, JOB, 6, 2, 0, payload(torch.ones(4)))))
    told = bench.run(0.6)
    assert of_type(told, m.MembersSet) == [m.MembersSet(JOB, 0, 3, 4)], "those that came before the set-up are in force"
    report = of_type(told, m.ShardReport)[0].document
    expected = {"ready": True, "error": "", "initialised": True, "members": 4, "snapshot": 0, "address": "server-0"}
    assert {key: report[key] for key in expected} == expected


def test_members_are_answered_whether_they_are_news_or_not() -> None:
    told = Bench().run(SET_UP, m.SetMembers(2, (0, 0)), m.SetMembers(1, (0, 0, 1, 0)), m.SetMembers(2, (0, 0)))
    assert of_type(told, m.MembersSet) == [m.MembersSet(JOB, 0, 3, 2)] * 3


@pytest.mark.parametrize("slots", [(0,), (-1, 0), (0, -1)])
def test_members_that_make_no_sense_change_nothing(slots: tuple[int, ...]) -> None:
    bench = Bench()
    told = bench.run(SET_UP, m.SetMembers(2, slots))
    assert of_type(told, m.MembersSet) == []
    assert bench.control.malformed == 1


# ---------------------------------------------------------------- snapshots


class Disk:
    """A keeper with its folder, and what it told the coordinator."""

    def __init__(self, folder: Path, upload: bool) -> None:
        self.folder = folder
        self.told: list[Any] = []
        config = dataclasses.replace(CONFIG, folder=str(folder), upload=upload)
        self.keeper = SnapshotKeeper(config, self.told.append)

    def take(self, number: int, numel: int = 4) -> bool:
        """Ask; if it is to be taken, write it, and wait for the file."""
        if not self.keeper.asked(m.TakeSnapshot(number, f"checkpoints/{number}", -1)):
            return False
        tensors = {"0.weights": torch.arange(numel, dtype=torch.float32)}
        self.keeper.write(WriteSnapshot(number, f"checkpoints/{number}", 0, tensors, {"chunks": {}}))
        self.keeper._writing[-1][1].exception()
        return True

    def turn(self, now_s: float = 0.0) -> list[Any]:
        """What is told in this turn."""
        before = len(self.told)
        self.keeper.turn(now_s)
        return self.told[before:]


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    disk = Disk(tmp_path, upload=False)
    yield disk
    disk.keeper.close()


@pytest.fixture
def far(tmp_path: Path) -> Any:
    disk = Disk(tmp_path, upload=True)
    yield disk
    disk.keeper.close()


def test_a_number_is_taken_once_and_answered_as_often_as_it_is_asked_for(disk: Disk) -> None:
    assert disk.take(3)
    (taken,) = disk.turn()
    assert (taken.snapshot, taken.error, taken.document["file"]) == (3, "", "shard-0.safetensors")
    assert (disk.folder / "checkpoints/3/shard-0.safetensors").stat().st_size == taken.document["bytes"]
    assert not disk.take(3)
    assert disk.told == [taken, taken]
    assert not disk.take(2), "older than the newest and never taken"
    assert len(disk.told) == 2
    assert disk.keeper.answered == 3


def test_a_failure_is_an_answer_too(disk: Disk) -> None:
    assert disk.keeper.asked(m.TakeSnapshot(1, "x", 5))
    disk.keeper.write(WriteSnapshot(1, "x", 0, {}, {}, "chunk 0 is at clock 9 already, past 5"))
    assert not disk.keeper.asked(m.TakeSnapshot(1, "x", 5))
    assert [t.error for t in disk.told] == ["chunk 0 is at clock 9 already, past 5"] * 2


def test_a_file_that_cannot_be_written_is_told(disk: Disk) -> None:
    (disk.folder / "checkpoints").write_text("in the way")
    disk.take(1)
    (taken,) = disk.turn()
    assert "checkpoints" in taken.error


def answer_all(far: Disk, now_s: float) -> None:
    """Every part is taken, until none comes."""
    while parts := [x for x in far.turn(now_s) if isinstance(x, m.SnapshotPart)]:
        for part in parts:
            far.keeper.received(m.Ack(part.request, part.offset + len(part.payload)), now_s)


def test_an_upload_sends_the_file_removes_it_and_only_then_answers(far: Disk) -> None:
    far.take(1, PART_BYTES)  # 4 MiB and a header
    far.keeper.turn(0.0)
    path = far.folder / "checkpoints/1/shard-0.safetensors"
    data = path.read_bytes()
    parts = list(far.told)
    assert [type(p) for p in parts] == [m.SnapshotPart] * 4
    assert {(p.job, p.shard, p.shard_epoch, p.snapshot, p.name) for p in parts} == {(JOB, 0, 3, 1, path.name)}
    for part in parts:
        far.keeper.received(m.Ack(part.request, part.offset + len(part.payload)), 0.1)
    answer_all(far, 0.2)
    *parts, taken = far.told
    assert b"".join(bytes(p.payload) for p in parts) == data
    assert (taken.error, taken.document["bytes"]) == ("", len(data))
    assert not path.parent.exists()
    assert not far.take(1)
    assert far.told[-1] == taken, "the file is gone, the answer is not"


def test_an_upload_that_is_refused_is_an_error_and_leaves_nothing(far: Disk) -> None:
    far.take(1)
    (part,) = far.turn()
    far.keeper.received(m.Refused(part.request, "unknown", "no such snapshot"), 0.1)
    (taken,) = far.turn(0.2)
    assert "no such snapshot" in taken.error
    assert not (far.folder / "checkpoints/1").exists()


def test_a_newer_snapshot_ends_the_upload_of_an_older_one(far: Disk) -> None:
    far.take(1)
    (part,) = far.turn()
    far.take(2)
    given_up = far.told[-1]
    assert (given_up.snapshot, bool(given_up.error)) == (1, True)
    far.keeper.received(m.Ack(part.request, len(part.payload)), 0.1)
    answer_all(far, 0.2)
    taken = far.told[-1]
    assert (taken.snapshot, taken.error) == (2, "")
    assert os.listdir(far.folder / "checkpoints") == []


def test_folders_are_below_the_jobs_unless_they_are_absolute() -> None:
    config = dataclasses.replace(CONFIG, folder="/data/jobs/j")
    assert config.path("checkpoints/3") == "/data/jobs/j/checkpoints/3"
    assert config.path("/elsewhere") == "/elsewhere"
    assert CONFIG.path("here") == "here"


# ---------------------------------------------------------------- keys

Z85 = ["abcdefghij" * 4, "ABCDEFGHIJ" * 4, "0123456789" * 4, "9876543210" * 4, "aAbBcCdDeE" * 4]


def test_keys_let_in_the_jobs_workers_and_know_the_coordinator() -> None:
    assert CONFIG.transport_keys() == (None, None)
    coordinator, public, secret, shards, shard_secret = Z85
    keys = {"coordinator": coordinator, "job": [public, secret], "shards": shards, "shard_secret": shard_secret}
    server, client = dataclasses.replace(CONFIG, keys=keys).transport_keys()
    assert server is not None
    assert client is not None
    assert (server.pair.public, server.allowed) == (shards, {public: "worker"})
    assert (client.pair.public, client.server_at("anywhere")) == (public, coordinator)


@pytest.mark.parametrize("missing", ["coordinator", "job", "shards", "shard_secret"])
def test_keys_that_are_not_all_there_are_refused_without_telling_them(missing: str) -> None:
    coordinator, public, secret, shards, shard_secret = Z85
    keys = {"coordinator": coordinator, "job": [public, secret], "shards": shards, "shard_secret": shard_secret}
    del keys[missing]
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, keys=keys).transport_keys()
    assert not any(key in str(caught.value) for key in Z85)


@pytest.mark.parametrize("job", [JOB, "job-2"])
def test_a_shard_that_recovers_goes_on_from_its_own_file_or_says_why_not(tmp_path: Path, job: str) -> None:
    config = dataclasses.replace(CONFIG, folder=str(tmp_path))
    first = ShardDriver(MODEL, chunk_bytes=config.chunk_bytes)
    first.init_all(7.0)
    first.push(0, 1, 0, torch.ones(4))
    first.snapshot()
    entry = write(dataclasses.replace(first.written[0], folder=str(tmp_path / "cut")))
    fields = {"job": job, "clock": 30, "shards": 1, "chunk_bytes": config.chunk_bytes, "model": MODEL.to_wire()}
    (tmp_path / "cut" / "manifest.json").write_text(json.dumps({**fields, "files": [entry]}))
    bench = Bench(config)
    say = m.SetUpShard(MODEL.to_wire(), "cut", recovers=True, clock=0)
    for message in (m.Hello(1, JOB, 1, 0, MODEL.digest, 3), m.Pull(2, JOB, 0, 0, 0), HELLO):
        bench.turns.append(lambda: None)
        bench.turns.append(lambda message=message: bench.worker.send("server-0", message))  # type: ignore[misc]
    bench.turns.insert(0, lambda: bench.say(say))
    told = bench.run()
    [ready] = of_type(told, m.ShardReady)
    if job != JOB:
        assert "job-2" in ready.error
        return
    assert ready.error == ""
    answers = arrived(bench.worker)
    assert answers[0] == m.HelloReply(1, 0, 3, 0)
    assert isinstance(answers[1], m.Weights)
    assert (answers[1].version, values_of(answers[1])) == (1, [8, 8, 8, 8])
    report = of_type(told, m.ShardReport)[-1].document
    assert (report["lost"], report["lost_pushes"], report["initialised"]) == (2, {"1": 2}, True)
