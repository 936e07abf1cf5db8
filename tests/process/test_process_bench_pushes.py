"""The benchmarks that push and pull in real jobs, at sizes that say nothing about speed: they end well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(180)]


def test_pushes_beside_a_busy_thread(box: Box) -> None:
    ended = box.benchmark("busy", "--mb", "1", "--runs", "1", "--json", "busy.json").end(120.0)
    assert ended.code == 0, ended.text
    results = json.loads((box.folder / "busy.json").read_text())["results"]
    assert set(results) == {"memory", "tcp"}
    assert all(row["busy_push_gb_per_s"] > 0 and row["loops_per_s"] > 0 for row in results.values())


def test_push_and_pull_under_the_launcher_and_with_keys(box: Box) -> None:
    contenders = ["downpour-tcp-2s", "downpour-curve"]
    wanted = ["--mb", "2", "--runs", "1", "--only", *contenders]
    ended = box.benchmark("pushpull", *wanted, "--json", "pushpull.json").end(120.0)
    assert ended.code == 0, ended.text
    document = json.loads((box.folder / "pushpull.json").read_text())
    assert [result["name"] for result in document["results"]] == contenders
