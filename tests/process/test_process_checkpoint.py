"""A running job makes a checkpoint when it is asked to, copies it to a URL, and goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


def command(box: Box, *arguments: str) -> tuple[int, Any]:
    """``downpour checkpoint … --json`` in the box's folder: exit code and document."""
    ended = subprocess.run(
        [sys.executable, "-m", "downpour_deploy", "checkpoint", *arguments, "--json"],
        cwd=box.folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else ended.stderr


def test_a_checkpoint_now_is_copied_and_gone_on_from(box: Box) -> None:
    url = f"file://{box.folder}/copies"
    settings = ("--set", "checkpoint_s=0", "--set", f"checkpoint_url={url}")
    running = box.start("-w", "1", "-s", "2", *settings, "ledger.py")
    running.wait_line("worker/0 is training")
    code, first = command(box, "now", "out")
    assert (code, first["number"]) == (0, 1)
    running.interrupt()
    assert running.end(30.0).code == 130

    code, there = command(box, "verify", url)
    assert (code, there["sound"], [c["number"] for c in there["checkpoints"]]) == (0, True, [1, 2])
    clock = there["checkpoints"][-1]["clock"]

    second = box.run("--resume", url, "-w", "1", "-s", "1", "ledger.py", "--steps", "3", out="second")
    assert second.code == 0, second.text
    assert f"worker/0 starts at clock {clock}" in second.text
