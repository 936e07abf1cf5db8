"""The benchmarks that start real jobs, at sizes that say nothing about speed: they end well and leave nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(180)]


def test_training_loops_of_all_kinds(box: Box) -> None:
    contenders = ["plain", "downpour-tcp-async-2"]
    wanted = ["--workloads", "tiny-adam", "--runs", "2", "--only", *contenders]
    ended = box.benchmark("training", *wanted, "--json", "training.json").end(120.0)
    assert ended.code == 0, ended.text
    section = json.loads((box.folder / "training.json").read_text())["sections"]["tiny-adam"]
    assert section["failed"] == {}
    assert [(r["name"], len(r["turns_s"])) for r in section["results"]] == [(name, 2) for name in contenders]
    assert all(r["samples_per_s"] > 0 for r in section["results"])


def test_killed_in_the_middle_no_contender_outlives_it(box: Box) -> None:
    wanted = ["--workloads", "tiny-adam", "--runs", "100000", "--only", "ddp-gloo", "downpour-sync-2"]
    running = box.benchmark("training", *wanted)
    running.wait_line("round 2 of")
    box.leaves_runtime_folder = True
    running.kill()
    running.end()
    assert box.wait_gone(box.processes(), 5.0) == []


def test_ctrl_c_ends_the_contenders(box: Box) -> None:
    wanted = ["--workloads", "tiny-adam", "--runs", "100000", "--only", "two-plain", "downpour-1"]
    running = box.benchmark("training", *wanted)
    running.wait_line("round 2 of")
    running.interrupt()
    ended = running.end(60.0)
    assert ended.code == 130, ended.text
    assert box.processes() == []


def test_a_job_that_cannot_start_is_reported_and_the_others_go_on(box: Box) -> None:
    wanted = ["--workloads", "tiny-adam", "--runs", "1", "--only", "plain", "downpour-1"]
    broken = {"PYTHONPATH": str(box.folder / "broken")}
    (box.folder / "broken" / "downpour_deploy").mkdir(parents=True)
    (box.folder / "broken" / "downpour_deploy" / "__init__.py").write_text("raise SystemExit('out of order')\n")
    ended = box.benchmark("training", *wanted, **broken).end(60.0)
    assert ended.code == 1
    assert "out of order" in ended.stdout
    assert "downpour-1 failed" in ended.stdout
    assert "plain failed" not in ended.stdout
