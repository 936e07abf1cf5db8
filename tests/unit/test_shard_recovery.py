"""A shard that comes back from its file of a checkpoint while the job goes on: exactly as it was written, and what was
pushed since is counted to the push."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from unit_kit import JOB, ShardDriver, model, payload, tensor, values_of

from downpour_common import messages as m
from downpour_common.errors import CheckpointError
from downpour_common.layout import Layout
from downpour_server.dedup import DedupWindow, Seen
from downpour_server.recover import recover
from downpour_server.snapshot import write

ADAM = {"lr": 0.05, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}
SPEC = model(
    tensor("w", 11),
    tensor("b", 4, dtype="float64"),
    tensor("mean", 3, kind="buffer"),
    tensor("fixed", 2, kind="frozen"),
    rule="Adam",
    options=(ADAM,),
)
LEDGER = model(tensor("w", 512))
CHUNK_BYTES = 20


def manifest(layout: Layout, entries: list[dict[str, Any]], clock: int = 0) -> dict[str, Any]:
    """A manifest as the coordinator writes it."""
    return {
        "format": 1,
        "job": JOB,
        "clock": clock,
        "shards": layout.shards,
        "chunk_bytes": layout.chunk_bytes,
        "model": layout.model.to_wire(),
        "files": entries,
    }


def checkpoint(folder: Path, d: ShardDriver, **others: Any) -> dict[str, Any]:
    """Write a checkpoint of one shard; its manifest."""
    d.snapshot(len(d.written) + 1)
    entry = write(dataclasses.replace(d.written[-1], folder=str(folder)))
    d.written[-1].reading.done = True
    document = {**manifest(d.layout, [entry]), **others}
    (folder / "manifest.json").write_text(json.dumps(document))
    return document


def come_back(folder: Path, d: ShardDriver, workers: int = 2, first_seq: int = 0, mode: str = "async") -> ShardDriver:
    """Another process of the same shard, from the checkpoint."""
    back = ShardDriver(d.layout.model, mode, workers, chunk_bytes=d.layout.chunk_bytes, shard_epoch=6)
    recover(str(folder), JOB, 0, back.layout, back.shard.chunks)
    back.shard.recovered(first_seq)
    return back


def hello(d: ShardDriver, slot: int, done: int = -1, epoch: int = 0) -> m.HelloReply:
    reply = d.answer(m.Hello(d.number(), JOB, slot, epoch, d.layout.digest, done))
    assert isinstance(reply, m.HelloReply), reply
    return reply


def trained(folder: Path) -> ShardDriver:
    """Some pushes of two workers, then a checkpoint."""
    d = ShardDriver(SPEC, "async", 2, chunk_bytes=CHUNK_BYTES)
    d.init_all(0.5)
    for seq in range(4):
        for slot in (0, 1):
            for chunk in d.chunks:
                if chunk.kind != "frozen":
                    gradient = torch.full((chunk.numel,), 1.0 + seq + slot, dtype=getattr(torch, chunk.dtype))
                    d.push(chunk.index, slot, seq, gradient)
    d.push(0, 1, 6, torch.ones(d.chunks[0].numel))
    checkpoint(folder, d)
    return d


def inside(d: ShardDriver) -> list[Any]:
    """All that a checkpoint has of a shard, as bytes."""
    d.snapshot(99)
    written = d.written.pop()
    written.reading.done = True
    tensors = [(name, bytes(payload(values))) for name, values in sorted(written.tensors.items())]
    return [tensors, written.document["chunks"]]


# ---------------------------------------------------------------- the file


def test_a_shard_comes_back_as_it_was_written_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    d = trained(tmp_path)
    back = come_back(tmp_path, d)
    assert back.shard.initialised
    assert inside(back) == inside(d)
    for one in (d, back):
        for chunk in one.layout.by_kind["trainable"]:
            one.push(chunk.index, 0, 4, torch.full((chunk.numel,), 0.3, dtype=getattr(torch, chunk.dtype)))
    assert inside(back) == inside(d)


def test_only_the_shards_own_file_is_needed(tmp_path: Path) -> None:
    d = ShardDriver(SPEC, "async", 2, shards=2, shard=1, chunk_bytes=CHUNK_BYTES)
    d.init_all(0.25)
    document = checkpoint(tmp_path, d)
    elsewhere = {"file": "shard-0.safetensors", "bytes": 1, "sha256": "", "chunks": {"0": {}}}
    document["files"].insert(0, elsewhere)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    back = ShardDriver(SPEC, "async", 2, shards=2, shard=1, chunk_bytes=CHUNK_BYTES)
    recover(str(tmp_path), JOB, 1, back.layout, back.shard.chunks)
    assert inside(back) == inside(d)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"job": "job-2"}, "job 'job-2'"),
        ({"shards": 2}, "shards 2"),
        ({"chunk_bytes": 64}, "chunk_bytes 64"),
        ({"model": model(tensor("w", 12)).to_wire()}, "another model"),
        ({"files": []}, "no file with exactly the chunks of server/0"),
        ({"files": [{}]}, "unusable manifest"),
        ({"files": 3}, "unusable manifest"),
        ({"clock": "soon"}, "unusable manifest"),
        ({"model": []}, "unusable manifest"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_anything_else_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    d = trained(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(CheckpointError, match=words):
        come_back(tmp_path, d)


def test_without_a_file_or_manifest_it_says_so(tmp_path: Path) -> None:
    d = trained(tmp_path)
    (tmp_path / "shard-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        come_back(tmp_path, d)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        come_back(tmp_path, d)


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    d = trained(tmp_path)
    path = tmp_path / "shard-0.safetensors"
    sound = path.read_bytes()
    choices = random.Random(5)
    for at in [0, 3, 8, 9, 40, len(sound) - 1, *choices.sample(range(len(sound)), 60)]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << choices.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="shard-0"):
            come_back(tmp_path, d)
    for size in (0, 1, 8, 100, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            come_back(tmp_path, d)
    path.write_bytes(sound)
    come_back(tmp_path, d)


def test_a_manifest_that_says_something_else_of_the_tensors_is_refused(tmp_path: Path) -> None:
    d = trained(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text())
    for change in ({"version": "x"}, {"windows": [[1]]}, {"scalars": 3}):
        rows = {i: {**row, **change} for i, row in document["files"][0]["chunks"].items()}
        other = {**document, "files": [{**document["files"][0], "chunks": rows}]}
        (tmp_path / "manifest.json").write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match="does not hold what the manifest says"):
            come_back(tmp_path, d)


# ---------------------------------------------------------------- windows


def test_settling_counts_what_was_not_seen() -> None:
    window = DedupWindow(3, {5, 8})
    assert window.settle(2) == 0
    assert window.settle(7) == 3, "3, 4 and 6"
    assert (window.next_seq, window.above) == (7, {8})
    assert window.settle(8) == 1
    assert (window.next_seq, window.above) == (9, set())
    assert window.look(4) is Seen.REPEAT, "given up"


# ---------------------------------------------------------------- what was lost


def two_chunks() -> ShardDriver:
    d = ShardDriver(model(tensor("w", 8)), "async", 2, chunk_bytes=16)
    d.init_all()
    return d


G = torch.ones(4)


def test_lost_is_what_lies_between_the_window_and_the_first_that_comes(tmp_path: Path) -> None:
    d = two_chunks()
    for seq in range(3):
        for chunk in (0, 1):
            d.push(chunk, 0, seq, G)
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    # the former process had answered 3 and 4 of both chunks, and 5 of chunk 1
    hello(back, 0, done=5)
    assert (back.shard.stats.lost, back.shard.stats.lost_pushes) == (4, {0: 2})
    back.push(0, 0, 5, G)
    back.push(1, 0, 6, G)
    assert (back.shard.stats.lost, back.shard.stats.lost_pushes) == (5, {0: 3})
    back.push(0, 0, 8, G)
    assert back.shard.stats.lost == 5, "gaps later on are the worker's own"
    document = back.shard.stats.document()
    assert (document["lost"], document["lost_pushes"]) == (5, {"0": 3})


def test_what_the_checkpoint_has_is_a_repeat_and_not_lost(tmp_path: Path) -> None:
    d = two_chunks()
    for seq in (0, 1, 3):
        d.push(0, 0, seq, G)
        d.push(1, 0, seq, G)
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    hello(back, 0, done=1)
    for seq in (1, 2, 3, 4):
        back.push(0, 0, seq, G)
    assert (back.shard.stats.lost, back.shard.stats.repeats) == (0, 2)
    back.push(1, 0, 5, G)
    assert back.shard.stats.lost == 2, "2 and 4"


def test_a_worker_that_pushes_no_more_says_where_it_was(tmp_path: Path) -> None:
    d = two_chunks()
    for seq in range(3):
        d.push(0, 0, seq, G)
        d.push(1, 0, seq, G)
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    back.answer(m.Leave(back.number(), JOB, 0, 0, 7))
    assert back.shard.stats.losses() == {"lost": 8, "lost_pushes": {"0": 4}}


def test_a_worker_of_which_the_checkpoint_knows_nothing_has_lost_all_since_the_start(tmp_path: Path) -> None:
    d = two_chunks()
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d, first_seq=100)
    hello(back, 1, done=103)
    assert back.shard.stats.lost_pushes == {1: 3}


def test_whoever_begins_anew_has_lost_nothing(tmp_path: Path) -> None:
    d = two_chunks()
    for seq in range(3):
        d.push(0, 0, seq, G)
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    back.members(1, (0, 1), (1, 0))
    hello(back, 0, epoch=1)
    back.push(0, 0, 4, G, worker_epoch=1)
    assert back.shard.stats.lost == 0


def test_a_refused_contribution_settles_nothing(tmp_path: Path) -> None:
    d = two_chunks()
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    hello(back, 0, done=0)
    assert back.push_pull(0, 0, 9, G, shard_epoch=5) is None
    assert isinstance(back.push(0, 0, 9, G * float("nan")), m.Refused)
    assert back.shard.stats.lost == 0
    back.push(0, 0, 7, G)
    assert back.shard.stats.lost == 7


def test_what_workers_lost_that_have_left_is_counted_at_once(tmp_path: Path) -> None:
    d = two_chunks()
    for seq in range(3):
        d.push(0, 0, seq, G)
        d.push(1, 0, seq, G)
    checkpoint(tmp_path, d)
    d.push(0, 0, 3, G)
    d.push(1, 0, 3, G)
    back = come_back(tmp_path, d)
    left = (0, 0, 0, 4, 1, 2, 30, 32)  # slot 1: one that joined later, after the checkpoint
    for version in (1, 1, 2):
        back.shard.take_members(m.SetMembers(version, (0, 0), (), left))
    assert back.shard.stats.lost == 2 + 4
    assert back.shard.stats.lost_pushes == {0: 1, 1: 2}
    hello(back, 0, done=4)
    assert back.shard.stats.lost == 6, "once"


def test_what_was_lost_stands_in_later_checkpoints(tmp_path: Path) -> None:
    d = two_chunks()
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    hello(back, 0, done=2)
    entry = checkpoint(tmp_path, back)["files"][0]
    assert (entry["lost"], entry["lost_pushes"]) == (4, {"0": 2})


def test_a_shard_that_has_not_come_back_ignores_it() -> None:
    d = two_chunks()
    hello(d, 0, done=5)
    d.push(0, 0, 6, G)
    d.answer(m.Leave(d.number(), JOB, 0, 0, 9))
    assert d.shard.stats.lost == 0


def test_in_ssp_a_recovered_shard_hears_of_clocks_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    d = ShardDriver(model(tensor("w", 4)), "ssp:1", 2)
    d.shard.start_from(10)
    d.init_all()
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d, first_seq=10, mode="ssp:1")
    hello(back, 0, done=25)
    waiting = back.pushed(0, 0, 25, G)
    assert back.send(waiting) is None, "worker/1 has not spoken yet"
    hello(back, 1, done=25)
    assert values_of(back.answers[waiting.request]) == [1, 1, 1, 1]
    assert back.push_pull(0, 0, 26, G) is None, "two ahead"
    assert back.shard.stats.lost_pushes == {0: 15, 1: 15}


@pytest.mark.parametrize("seed", range(40))
def test_lost_and_applied_agree_with_the_ledger(tmp_path: Path, seed: int) -> None:
    """Each push is one-hot at a place of its own, and is added: so weights tell how often it was applied."""
    choices = random.Random(seed)
    workers, places = 3, 40
    d = ShardDriver(LEDGER, "async", workers, chunk_bytes=512 * 2)
    d.init_all()
    chunks = [chunk.index for chunk in d.chunks]
    sent = [dict.fromkeys(chunks, 0) for _ in range(workers)]
    """by worker and chunk: contributions that have an answer"""
    checkpoint(tmp_path, d)
    cut = past = 0
    """lost before the newest checkpoint; and before that from which the newest process came back"""

    def push(slot: int, chunk: int) -> None:
        gradient = torch.zeros(d.layout.chunks[chunk].numel)
        gradient[slot * places + sent[slot][chunk]] = 1.0
        answer = d.push_pull(chunk, slot, sent[slot][chunk], gradient)
        assert isinstance(answer, m.Weights)
        sent[slot][chunk] += 1

    for _ in range(choices.randint(1, 4)):
        for _ in range(choices.randint(0, 25)):
            slot = choices.randrange(workers)
            low = min(sent[slot].values())
            chunk = choices.choice([c for c in chunks if sent[slot][c] == low])
            if low < places - 1:
                push(slot, chunk)
            if choices.random() < 0.1:
                cut = past + checkpoint(tmp_path, d)["files"][0]["lost"]
        before, past = [dict(row) for row in sent], cut
        d = come_back(tmp_path, d, workers)
        for slot in range(workers):
            low = min(before[slot].values())
            hello(d, slot, done=low)
            # the step that was under way is finished, in answer to which chunks of it were open
            for chunk in chunks:
                if before[slot][chunk] == low and choices.random() < 0.7:
                    push(slot, chunk)
    for slot in range(workers):
        number = max(sent[slot].values())
        for chunk in chunks:
            if sent[slot][chunk] < number:
                push(slot, chunk)
        d.answer(m.Leave(d.number(), JOB, slot, 0, number))

    missing = 0
    for slot in range(workers):
        for chunk in chunks:
            ledger = d.weights(chunk)[slot * places : slot * places + sent[slot][chunk]].tolist()
            assert set(ledger) <= {0.0, 1.0}, "never twice"
            missing += ledger.count(0.0)
    assert past + d.shard.stats.lost == missing


def test_hello_of_a_worker_that_takes_its_time_changes_no_window_of_others(tmp_path: Path) -> None:
    d = two_chunks()
    d.push(0, 1, 0, G)
    checkpoint(tmp_path, d)
    back = come_back(tmp_path, d)
    hello(back, 0, done=4)
    back.push(0, 1, 1, G)
    assert back.shard.stats.lost_pushes == {0: 4}
