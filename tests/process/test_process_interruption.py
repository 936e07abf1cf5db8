"""Ctrl-C, resuming, and the death of the launcher."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


def test_ctrl_c_keeps_a_checkpoint_that_other_counts_of_workers_and_shards_go_on_from(box: Box) -> None:
    running = box.start("-w", "2", "-s", "1", "--mode", "sync", "--json", "ledger.py")
    running.wait_line("worker/0 is training")
    at_s = running.interrupt()
    first = running.end(30.0)
    assert time.monotonic() - at_s < 15
    assert (first.code, first.document["state"], first.document["exit_code"]) == (130, "INTERRUPTED", 130)
    assert first.document["failure"] is None
    [advice] = first.document["warnings"]
    assert advice == "interrupted; go on with --resume out"
    assert advice in first.stderr
    [manifest] = first.manifests()
    clock = json.loads(manifest.read_text())["clock"]
    assert clock >= 5

    options = ("--resume", "out", "-w", "1", "-s", "2", "--mode", "sync", "--json")
    second = box.run(*options, "ledger.py", "--steps", "20")
    assert second.code == 0, second.text
    weights = [float(clock)] * 9
    assert f"worker/0 starts at clock {clock} with weights {weights}\n" in second.stderr
    assert f"worker/0 ends at clock {clock + 20}\n" in second.stderr
    assert re.search(rf"going on from \S*{manifest.parent.name}, clock {clock}", second.stderr)
    assert second.tensors()["weight"].flatten().tolist() == [float(clock + 20)] * 9
    assert second.document["steps"] == 20
    assert json.loads(second.manifests()[-1].read_text())["clock"] == clock + 20
    assert len(second.manifests()) == 2


def test_a_second_ctrl_c_ends_at_once_even_a_script_that_ignores_sigterm(box: Box) -> None:
    running = box.start("-w", "1", "-s", "1", "--set", "grace_s=60", "ledger.py", "--deaf")
    running.wait_line("worker/0 is training")
    running.interrupt()
    running.wait_line("stopping; a second Ctrl-C ends everything at once")
    kept = running.out / "checkpoints" / "000001" / "manifest.json"
    running.wait_until(kept.exists, "checkpoint")
    at_s = running.interrupt()
    ended = running.end(10.0)
    assert time.monotonic() - at_s < 3.0
    assert ended.code == 130
    assert "Traceback" not in ended.text


def test_ctrl_c_before_training_waits_for_nobody(box: Box) -> None:
    running = box.start("-w", "1", "-s", "1", "--json", "asleep.py")
    running.wait_line("worker/0 is asleep")
    at_s = running.interrupt()
    ended = running.end(15.0)
    assert time.monotonic() - at_s < 3.0
    assert (ended.code, ended.document["state"]) == (130, "INTERRUPTED")
    assert ended.document["warnings"] == ["no checkpoint was made at the interruption: training had not begun"]


def test_the_death_of_the_launcher_ends_workers_and_shards(box: Box) -> None:
    box.leaves_runtime_folder = True
    running = box.start("-w", "1", "-s", "1", "ledger.py")
    running.wait_line("worker/0 is training")
    everyone = box.processes()
    assert len(everyone) == 3
    assert len(running.children()) == 2
    running.kill()
    assert running.end(10.0).code == -9
    assert box.wait_gone(everyone, 10.0) == []
