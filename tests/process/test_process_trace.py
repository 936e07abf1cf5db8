"""A traced job of two workers: its spans, and what downpour trace and report make of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from downpour_deploy.trace import register

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

EPOCHS = 3
APP = typer.Typer()
register(APP)


def command(*arguments: object) -> str:
    """Run ``downpour ARGUMENTS`` here; its output."""
    done = CliRunner().invoke(APP, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_traced_job_tells_what_its_workers_did(box: Box) -> None:
    ended = box.run(
        "-w", "2", "-s", "1", "--mode", "sync", "--trace", "--json", "own_modules/train.py", str(EPOCHS), "x"
    )
    assert ended.code == 0, ended.text
    steps = ended.document["steps"]
    assert ended.job["trace"] is True
    workers = json.loads(command("report", ended.out, "--json"))["workers"]
    assert [(w["worker"], w["missing_lines"], w["dropped"]) for w in workers] == [(0, 0, 0), (1, 0, 0)]
    for worker in workers:
        assert {"forward", "backward", "push", "pull", "wait"} <= worker["shares"].keys()
        assert sum(worker["shares"].values()) <= 1.0 + 1e-9
        assert min(worker["moved"]["pushed"], worker["sizes"]["weights"], worker["sizes"]["peak_memory"]) > 0
    command("trace", ended.out, "-o", box.folder / "t.json")
    events = json.loads((box.folder / "t.json").read_text(encoding="utf-8"))["traceEvents"]
    named = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert named == {"worker/0", "worker/1"}
    count = Counter((e["pid"], e["name"]) for e in events if e["ph"] == "X")
    assert {count[pid, name] for pid in (1, 2) for name in ("forward", "backward", "push")} == {steps}
