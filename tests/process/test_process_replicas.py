"""Replicas that are groups of workers when one of their processes dies, stands still, raises, or the job is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING

import pytest
from conftest import environment_of

if TYPE_CHECKING:
    from conftest import Box, Ended, Running

pytestmark = [pytest.mark.process, pytest.mark.timeout(200)]

STEPS = 80
LONG_S = 90.0
"""Time for processes to be missed, ended and started again on a busy machine."""


def signalled(running: Running, slot: int, number: int) -> None:
    """Send a signal to the worker of a slot."""
    for pid in running.children().values():
        context = environment_of(pid).get(b"DOWNPOUR_WORKER")
        if context and json.loads(context)["slot"] == slot:
            os.kill(pid, number)
            return
    raise AssertionError(f"no worker/{slot}:\n{running.text}")


def clocks(ended: Ended, name: str) -> list[int]:
    """After each step, as the log of a worker has them."""
    return [int(n) for n in re.findall(r"^clock (\d+)", (ended.out / "logs" / name).read_text(), re.MULTILINE)]


def losses(ended: Ended, name: str) -> list[str]:
    """Of each step."""
    return re.findall(r"^clock.* loss (.*)$", (ended.out / "logs" / name).read_text(), re.MULTILINE)


@pytest.mark.long
def test_a_replica_of_which_a_rank_dies_or_stands_still_comes_back_as_one(box: Box) -> None:
    options = ("-w", "4", "-s", "2", "--tensor", "2", "--restarts", "2", "--set", "timeout_s=6", "--json")
    running = box.start(*options, "grouped.py", "until", "0")
    running.wait_line("worker/3 clock 5 ", LONG_S)
    signalled(running, 3, signal.SIGSTOP)
    running.wait_line("worker/1 ends", LONG_S)
    ended = running.end(LONG_S)
    assert ended.code == 0, ended.text
    document = ended.document
    assert (document["state"], document["restarts"]) == ("SUCCEEDED", 1)
    [warning] = document["warnings"]
    silent = r"has not been heard of for \d+ s, and worker/2 \(replica 1, rank 0\) waited for it in vain"
    assert re.fullmatch(rf"worker/3 \(replica 1, rank 1\) {silent}; its replica is started again", warning)
    before, after = clocks(ended, "worker-2.log"), clocks(ended, "worker-2.1.log")
    assert len(after) >= 3
    assert after == clocks(ended, "worker-3.1.log")
    assert clocks(ended, "worker-0.log")[-1] > before[-1] + 50, "the other replica has gone on"
    assert losses(ended, "worker-0.log") == losses(ended, "worker-1.log"), "all ranks of a replica draw the same"
    assert "MateLost: worker/3 has not done its part" in (ended.out / "logs" / "worker-2.log").read_text()


def test_one_rank_that_raises_is_shown_and_not_what_becomes_of_the_others(box: Box) -> None:
    options = ("-w", "4", "-s", "1", "--mode", "ssp:2", "--pipeline", "2", "--json")
    ended = box.start(*options, "grouped.py", "raise", "3").end(LONG_S)
    failure = ended.document["failure"]
    assert (ended.code, failure["index"], failure["message"]) == (1, 3, "RuntimeError: the cat sat on the keyboard")
    assert failure["details"].startswith("Traceback (most recent call last):")
    assert "worker/3 (replica 1, rank 1) failed: RuntimeError: the cat" in ended.stderr
    assert "gloo" not in ended.text
    assert "Traceback" not in (ended.out / "logs" / "worker-2.log").read_text()


def test_in_sync_a_killed_rank_changes_no_bit(box: Box) -> None:
    options = ("-w", "2", "-s", "2", "--tensor", "2", "--mode", "sync", "--threads", "1", "--json")
    plain = box.start(*options, "grouped.py", "steps", str(STEPS), out="plain")
    plain.wait_line("worker/1 clock 5 ", LONG_S)
    signalled(plain, 1, signal.SIGTERM)  # a replica leaves by its lead's word only
    running = box.start(*options, "--restarts", "1", "grouped.py", "steps", str(STEPS), out="killed")
    running.wait_line("worker/1 clock 10 ", LONG_S)
    signalled(running, 1, signal.SIGKILL)
    ended, reference = running.end(LONG_S), plain.end(LONG_S)
    assert (reference.code, ended.code) == (0, 0), ended.text
    assert reference.document["warnings"] == []
    [warning] = ended.document["warnings"]
    assert warning == "worker/1 (replica 0, rank 1) killed by signal 9 (SIGKILL); others take over its replica"
    assert (ended.out / "model.safetensors").read_bytes() == (reference.out / "model.safetensors").read_bytes()


@pytest.mark.long
def test_a_stopped_pipeline_goes_on_without_one(box: Box) -> None:
    options = ("--mode", "sync", "--threads", "1", "--json")
    stages = ("-w", "2", "-s", "2", "--pipeline", "2", "--microbatches", "1")
    running = box.start(*options, *stages, "grouped.py", "steps", "4000", out="stages")
    running.wait_line("worker/1 clock 10 ", LONG_S)
    running.interrupt()
    stopped = running.end(LONG_S)
    assert stopped.code in (0, 130), stopped.text  # by should_stop(), or by SIGTERM once a checkpoint is made
    first, second = losses(stopped, "worker-0.log"), losses(stopped, "worker-1.log")
    assert abs(len(first) - len(second)) <= 1
    assert all(mine == other for mine, other in zip(first, second, strict=False))
    until = clocks(stopped, "worker-0.log")[-1] + 5
    alone = box.start(*options, "-w", "1", "--resume", "stages", "grouped.py", "steps", str(until), out="alone")
    ended = alone.end(LONG_S)
    assert ended.code == 0, ended.text
    steps = clocks(ended, "worker-0.log")
    assert steps == list(range(until - len(steps) + 1, until + 1))
    assert 5 <= len(steps) < until, "it goes on from a checkpoint"
    assert ended.tensors().keys() == {f"{layer}.{kind}" for layer in (0, 3, 5) for kind in ("weight", "bias")}
