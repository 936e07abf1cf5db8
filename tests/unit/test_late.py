"""Contributions that come after their round (``sync,backup=b``): counted, answered at once, and told to people."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from coordinator_kit import World
from test_shard_recovery import come_back
from test_shard_recovery import manifest as manifest_of
from unit_kit import JOB, ShardDriver, model, tensor, values_of

from downpour.jobs.status import job_status
from downpour_common import messages as m
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError
from downpour_coordinator.losses import Past, late_in_words
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.recovery import WORKER_SILENT_S
from downpour_deploy.jobs.tables import closing_lines, job_details
from downpour_server.snapshot import write

TWO = model(tensor("w", 2), tensor("v", 2))


def ones(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count,), value)


def driver(mode: str, workers: int = 3) -> ShardDriver:
    d = ShardDriver(TWO, mode, workers, chunk_bytes=8)
    d.init_all()
    return d


def test_a_late_contribution_changes_nothing_and_is_answered_with_the_newest_weights() -> None:
    d = driver("sync,backup=1")
    for slot in (2, 0):
        for chunk in d.chunks:
            d.push_pull(chunk.index, slot, 0, ones(chunk.numel, 1.0 + slot))
    before = [stored.weights.tolist() for stored in d.shard.chunks.values()]
    for chunk in d.chunks:
        answer = d.push_pull(chunk.index, 1, 0, ones(chunk.numel, 100.0))
        assert isinstance(answer, m.Weights)
        assert answer.version == 1
        assert values_of(answer) == before[chunk.index]
    assert [s.version for s in d.shard.chunks.values()] == [1] * len(d.chunks)
    assert d.shard.stats.late == {1: 1}, "one, however many chunks"
    assert d.shard.stats.applied == 2 * len(d.chunks)
    assert d.shard.stats.document()["late"] == {"1": 1}
    count = d.chunks[0].numel
    again = d.push_pull(0, 1, 0, ones(count, 100.0))
    assert isinstance(again, m.Weights), "a repeat is answered, too"
    assert (d.shard.stats.late, d.shard.stats.repeats) == ({1: 1}, 1)
    for slot in (1, 2):
        assert d.push_pull(0, slot, 1, ones(count), base_version=1) is None or slot == 2
    assert d.shard.chunks[0].version == 2


def test_what_waits_for_its_round_is_not_in_a_snapshot_and_comes_again(tmp_path: Path) -> None:
    """A shard that comes back alone has not seen it, so that its repeat counts."""
    d = driver("sync,backup=1")
    for chunk in d.chunks:
        for slot in (0, 1):
            d.push_pull(chunk.index, slot, 0, ones(chunk.numel, 4.0))
        d.push_pull(chunk.index, 0, 1, ones(chunk.numel, 2.0), base_version=1)
    d.snapshot(1)
    entry = write(dataclasses.replace(d.written[-1], folder=str(tmp_path)))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_of(d.layout, [entry])))
    back = come_back(tmp_path, d, 3, mode="sync,backup=1")
    assert back.shard.chunks[0].version == 1
    for slot in (0, 1):
        back.answer(m.Hello(back.number(), JOB, slot, 0, back.layout.digest, 1, 0))
    epoch = back.shard.identity.shard_epoch
    count = d.chunks[0].numel
    assert back.push_pull(0, 0, 1, ones(count, 2.0), shard_epoch=epoch, base_version=1) is None
    assert back.push_pull(0, 1, 1, ones(count, 2.0), shard_epoch=epoch, base_version=1) is not None
    assert back.shard.chunks[0].version == 2
    assert (back.shard.stats.lost, back.shard.stats.repeats) == (0, 0)


# ---------------------------------------------------------------- told to people


def test_the_job_tells_what_the_shard_that_saw_most_has_counted_over_its_lives() -> None:
    world = World(workers=3, shards=2, mode="sync,backup=1").start()
    world.hear(("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, "late": {"2": 5, "0": 1}}))
    world.hear(("server", 1), m.ShardReport("job-1", 1, 0, {"ready": True, "late": {"2": 3, "1": 2}}))
    world.settle()
    world.restarted()
    assert outcome_of(world.life, "", 0.0).document()["late"] == {"worker/0": 1, "worker/1": 2, "worker/2": 5}
    past = Past()
    past.add({"late": {"1": 2}})
    past = Past.from_document(json.loads(json.dumps(past.document())))
    past.add({"late": {"1": 1}})
    assert past.late == {1: 3}
    status = job_status({"job": "x", "late": {"worker/1": 4}, "result": {"late": {"worker/1": 4}}})
    for lines in (job_details(status), closing_lines(status)):
        assert any("4 contributions came after their round" in line for line in lines)
    assert late_in_words({"worker/1": 1200, "worker/2": 3}) == (
        "1,203 contributions came after their round and were left out (worker/1 1,200, worker/2 3)"
    )


# ---------------------------------------------------------------- the end of a job with one that is frozen


def frozen(mode: str, slot: int = 2) -> World:
    """All but one have ended well, and that one says nothing."""
    world = World(workers=3, mode=mode).start()
    world.speak()
    for other in {0, 1, 2} - {slot}:
        world.leave(other)
    return world


def test_a_job_with_backups_ends_without_one_that_is_silent() -> None:
    world = frozen("sync,backup=1")
    world.deaf.add(("worker", 2))
    for _ in range(int(WORKER_SILENT_S)):
        world.tick(1.0)
        assert not world.life.stopping()
    world.tick(1.0)
    world.tick(1.0)
    assert [p.key for p in world.life.stopping()] == [("worker", 2)]
    world.end(("worker", 2), -9)
    world.wait_for(Phase.OVER)
    assert (world.life.state, world.life.restarts, world.exported != "") == ("SUCCEEDED", 0, True)
    assert any(text.startswith("worker/2 has not been heard of") for text in world.life.warnings)


def test_one_that_is_slow_and_speaks_is_waited_for() -> None:
    world = frozen("sync,backup=1")
    for _ in range(60):
        world.tick(1.0)
        world.speak()
    assert (world.phase, world.life.stopping()) == (Phase.TRAINING, [])
    world.leave(2)
    world.wait_for(Phase.OVER)
    assert world.life.state == "SUCCEEDED"


@pytest.mark.parametrize("mode", ["async", "average:5"])
def test_other_modes_wait_for_everybody(mode: str) -> None:
    world = frozen(mode)
    world.deaf.add(("worker", 2))
    world.wait(60)
    assert (world.phase, world.life.stopping()) == (Phase.TRAINING, [])
    assert "worker/2 has not been heard of" in world.life.degraded


def test_more_silent_ones_than_backups_are_waited_for() -> None:
    world = World(workers=3, mode="sync,backup=1").start()
    world.speak()
    world.leave(0)
    world.deaf |= {("worker", 1), ("worker", 2)}
    world.wait(60)
    assert (world.phase, world.life.stopping()) == (Phase.TRAINING, [])


@pytest.mark.parametrize("mode", ["sync,backup=2", "async;1=sync,backup=2"])
def test_somebody_must_be_left_in_a_round(mode: str) -> None:
    job_spec(name="x", script="x.py", workers=3, shards=1, mode=mode)
    with pytest.raises(ConfigError, match="would leave nobody in a round"):
        job_spec(name="x", script="x.py", workers=2, shards=1, mode=mode)
