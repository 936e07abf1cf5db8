"""``benchmarks/profile.py`` on a real, small job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(120)]


def test_both_sides_of_a_job_are_profiled(box: Box) -> None:
    arguments = ["--model", "tiny", "-w", "2", "--mode", "sync", "--steps", "8", "--warmup", "2", "--json", "p.json"]
    ended = box.benchmark("profile", *arguments).end()
    assert ended.code == 0, ended.text
    document = json.loads((box.folder / "p.json").read_text())
    assert document["missing"] == []
    names = {(s["side"], s["rank"]): {p["name"] for p in s["phases"]} for s in document["sides"]}
    assert set(names) == {("worker", 0), ("worker", 1), ("shard", 0)}
    assert {"forward", "backward", "send", "wait and receive"} <= names["worker", 0]
    assert {"update rule", "check for NaN", "send", "wait and receive"} <= names["shard", 0]
    assert "shard/0" in ended.stdout


def test_a_job_that_fails_is_told(box: Box) -> None:
    ended = box.benchmark("profile", "--model", "tiny", "--set", "chunk_bytes=1").end()
    assert ended.code == 1
    assert "chunk_bytes" in ended.text
