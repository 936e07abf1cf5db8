"""SIGKILL to shards and workers of jobs that may start them again."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box, Running

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


def kill(running: Running, name: str) -> None:
    """SIGKILL to a shard, or to any worker."""
    found = [pid for process, pid in sorted(running.children().items()) if process.startswith(name)]
    os.kill(found[-1], signal.SIGKILL)


def test_a_killed_shard_comes_back_alone_and_says_what_was_lost(box: Box) -> None:
    steps = 200
    options = ("-w", "2", "-s", "2", "--restarts", "1", "--json")
    running = box.start(*options, "ledger.py", "--slow", "--steps", str(steps))
    running.wait_line("worker/1 is training")
    running.wait_until(lambda: any(running.out.glob("checkpoints/*/manifest.json")), "checkpoint")
    kill(running, "server/1")
    ended = running.end()
    assert ended.code == 0, ended.text
    document = ended.document
    assert (document["state"], document["restarts"], document["pushes"]) == ("SUCCEEDED", 1, 2 * steps)
    lost = document["lost_pushes"]
    assert document["lost"] == ({"server/1": lost} if lost else {})
    weights = ended.tensors()["weight"].flatten().tolist()
    here, there = 2.0 * steps - lost, 2.0 * steps
    assert sorted(weights) in ([here] * 4 + [there] * 5, [here] * 5 + [there] * 4), "server/0 has missed nothing"
    killed, *others = document["warnings"]
    assert killed == "server/1 killed by signal 9 (SIGKILL); it comes back from the last checkpoint"
    assert others == ([f"{lost:,} push{'es were' if lost != 1 else ' was'} lost with server/1"] if lost else [])
    assert ended.text.count("starts at clock") == 2, "no worker was started again"


def test_in_sync_a_killed_worker_and_a_killed_shard_change_no_bit(box: Box) -> None:
    options = ("-w", "2", "-s", "2", "--mode", "sync", "--threads", "1", "--json")
    plain = box.start(*options, "survivor.py", "30", out="plain")
    running = box.start(*options, "--restarts", "2", "--set", "checkpoint_s=0.5", "survivor.py", "30", out="killed")
    running.wait_line("worker/1 clock 30$")
    kill(running, "worker")
    running.wait_line("begins at clock [1-9]")
    running.wait_line("clock 150$")
    kill(running, "server/0")
    ended, reference = running.end(), plain.end()
    assert (reference.code, ended.code) == (0, 0), ended.text
    taken_over, begun_again = ended.document["warnings"]
    assert taken_over.endswith("killed by signal 9 (SIGKILL); another process takes over")
    assert begun_again.startswith("server/0 killed by signal 9 (SIGKILL); the job was started again")
    assert ended.document["restarts"] == 2
    expected = (reference.out / "model.safetensors").read_bytes()
    assert (ended.out / "model.safetensors").read_bytes() == expected
