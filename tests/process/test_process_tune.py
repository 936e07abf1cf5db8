"""``downpour tune`` with real processes: results, errors, and nothing left behind."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box, Running

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


def tune(box: Box, *arguments: str) -> Running:
    command = [sys.executable, "-m", "downpour_deploy", "tune", "--seconds", "0", *arguments]
    return box.command(command, box.folder)


@pytest.mark.long
def test_sizes_are_tried_until_one_does_not_fit(box: Box) -> None:
    ended = tune(box, "--json", "tuned.py", "memory").end()
    assert ended.code == 0, ended.text
    assert [row["batch_size"] for row in ended.document["rows"]] == [8]
    assert ended.document["stopped"] == "16: out of memory"
    assert ended.document["knee"] == 8
    assert ended.document["own_batch_size"] == 16
    row = ended.document["rows"][0]
    assert row["peak_bytes"] > row["baseline_bytes"] > 0
    assert row["samples_per_s"] == pytest.approx(8 / row["step_s"])
    assert (box.folder / "tidied").read_text() == "memory", "the script's finally blocks have run"


def test_ctrl_c_leaves_nothing_and_a_script_without_steps_is_an_error(box: Box) -> None:
    interrupted, idle = tune(box, "tuned.py", "hangs"), tune(box, "tuned.py", "never")
    interrupted.wait_until((box.folder / "there").exists, "script")
    interrupted.interrupt()
    ended = interrupted.end()
    assert ended.code == 130, ended.text
    assert "Traceback" not in ended.text
    ended = idle.end()
    assert ended.code == 1
    assert ended.stdout == ""
    assert "never took a step" in ended.stderr
    assert "pass 2" in ended.stderr, "what the script wrote"
