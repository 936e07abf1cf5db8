"""SIGKILL to leaders and backups of jobs whose shards have two processes each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


def test_killed_leaders_and_a_killed_backup_cost_no_push_and_no_restart(box: Box) -> None:
    steps = 150
    options = ("-w", "2", "-s", "2", "--replication", "2", "--json")
    chaos = ("--chaos", "kill:leader/0@step:20,kill:backup/1@step:40")
    ended = box.run(*options, *chaos, "ledger.py", "--slow", "--steps", str(steps))
    assert ended.code == 0, ended.text
    document = ended.document
    assert (document["state"], document["restarts"], document["lost_pushes"]) == ("SUCCEEDED", 0, 0), ended.text
    assert document["warnings"] == [
        "server/0 killed by signal 9 (SIGKILL); server/0b leads now",
        "server/1b killed by signal 9 (SIGKILL); another one is started",
    ]
    assert ended.tensors()["weight"].flatten().tolist() == [2.0 * steps] * 9
    assert ended.text.count("starts at clock") == 2, "no worker was started again"


def test_in_sync_a_killed_leader_changes_no_bit(box: Box) -> None:
    options = ("-w", "2", "--mode", "sync", "--threads", "1", "--json")
    plain = box.start(*options, "survivor.py", "8", out="plain")
    chaos = ("--chaos", "kill:leader/0@step:20")
    killed = box.start(*options, "--replication", "2", *chaos, "survivor.py", "8", out="killed")
    ended, reference = killed.end(), plain.end()
    assert (reference.code, ended.code) == (0, 0), ended.text
    assert ended.document["warnings"] == ["server/0 killed by signal 9 (SIGKILL); server/0b leads now"]
    assert ended.document["restarts"] == 0
    expected = (reference.out / "model.safetensors").read_bytes()
    assert (ended.out / "model.safetensors").read_bytes() == expected
