"""The coordinator's memory on disk: all or nothing, one process at a time, and nothing that was told is forgotten."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from downpour_common.errors import ConfigError
from downpour_coordinator.journal import VERSION, Journal


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "coordinator.db")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a lock."""
    connect = sqlite3.connect

    def at_once(*args: Any, **fields: Any) -> sqlite3.Connection:
        return connect(*args, **{**fields, "timeout": 0.0})

    monkeypatch.setattr(sqlite3, "connect", at_once)


def opened(path: str) -> closing[Journal]:
    return closing(Journal(path, durable=False))


def contents(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with opened(path) as journal:
        return {job: (document, model) for job, document, model in journal.jobs()}, dict(journal.nodes())


def test_what_was_written_is_there_again(path: str) -> None:
    with opened(path) as journal:
        journal.write({"a": {"n": 1}, "b": {"n": 2}}, {"a": {"m": 1}}, {"w1": {"x": 1}, "w2": {"x": 2}})
        journal.write({"b": {"n": 3}}, {}, {"w1": None, "w3": {"x": None}, "never": None})
    assert contents(path) == ({"a": ({"n": 1}, {"m": 1}), "b": ({"n": 3}, None)}, {"w2": {"x": 2}, "w3": {"x": None}})


def test_strange_values_survive(path: str) -> None:
    document = {"nan": float("inf"), "text": "\u00e9 \U0001f600 '\"; DROP TABLE jobs", "list": [1, [2.5, None, True]]}
    with opened(path) as journal:
        journal.write({"'; --": document}, {}, {})
    assert contents(path)[0] == {"'; --": (document, None)}


def test_a_model_that_is_written_twice_is_there_once(path: str) -> None:
    with opened(path) as journal:
        for m in (1, 2):
            journal.write({"a": {}}, {"a": {"m": m}}, {})
    assert contents(path)[0] == {"a": ({}, {"m": 2})}


def test_what_cannot_be_written_is_not_written_in_part(path: str) -> None:
    with opened(path) as journal:
        journal.write({"a": {"n": 1}}, {}, {})
        with pytest.raises(TypeError):
            journal.write({"a": {"n": 2}}, {}, {"w": {"x": object()}})
        journal.write({"b": {"n": 1}}, {}, {})
    assert contents(path) == ({"a": ({"n": 1}, None), "b": ({"n": 1}, None)}, {})


def test_only_its_owner_may_read_it(path: str) -> None:
    """It holds the jobs' keys."""
    with opened(path) as journal:
        journal.write({"a": {}}, {}, {})
        for name in os.listdir(os.path.dirname(path)):
            assert os.stat(os.path.join(os.path.dirname(path), name)).st_mode & 0o077 == 0, name


@pytest.mark.parametrize("text", [b"this is no database, but long enough to be looked at" * 100])
def test_a_file_of_another_kind_is_refused_and_left_alone(path: str, text: bytes) -> None:
    Path(path).write_bytes(text)
    with pytest.raises(ConfigError, match="no coordinator's database"):
        Journal(path)
    assert Path(path).read_bytes() == text


def test_a_database_of_another_program_is_refused(path: str) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE jobs (x)")
        other.commit()
    with pytest.raises(ConfigError, match="another program"):
        Journal(path)
    with closing(sqlite3.connect(path)) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["jobs"]


def test_a_database_of_another_version_is_refused(path: str) -> None:
    with opened(path):
        pass
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA user_version={VERSION + 1}")
    with pytest.raises(ConfigError, match=f"schema {VERSION + 1}.* uses {VERSION}"):
        Journal(path)


def test_a_damaged_database_is_refused(path: str) -> None:
    with opened(path) as journal:
        journal.write({f"job-{i}": {"text": "x" * 500} for i in range(100)}, {}, {})
    data = bytearray(Path(path).read_bytes())
    assert len(data) > 6 * 4096
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    Path(path).write_bytes(data)
    with pytest.raises(ConfigError, match="no coordinator's database"):
        Journal(path)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Journal(str(tmp_path / "nowhere" / "coordinator.db"))


@pytest.mark.usefixtures("impatient")
def test_a_second_coordinator_is_kept_out(path: str) -> None:
    with opened(path) as journal:
        with pytest.raises(ConfigError, match="another coordinator uses this folder"):
            Journal(path)
        journal.write({"a": {}}, {}, {})
    assert contents(path)[0] == {"a": ({}, None)}


@pytest.mark.usefixtures("impatient")
def test_it_is_kept_out_even_if_nothing_was_written_yet(path: str) -> None:
    with opened(path):
        pass
    with opened(path), pytest.raises(ConfigError, match="another coordinator"):
        Journal(path)


WRITER = """
import sys
from downpour_coordinator.journal import Journal
journal = Journal(sys.argv[1])
for n in range(1_000_000):
    journal.write({"a": {"n": n, "x": "x" * 3000}, "b": {"n": n}}, {"a": {"n": n}}, {"w": {"n": n}})
    print(n, flush=True)
"""


@pytest.mark.parametrize("after", [1, 40])
def test_a_coordinator_that_is_killed_while_it_writes_has_written_all_or_nothing(path: str, after: int) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout as told:
        for _ in range(after):
            last = int(told.readline())
        writer.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in told.read().splitlines() if line)])
    assert writer.wait() == -signal.SIGKILL
    jobs, nodes = contents(path)
    numbers = {jobs["a"][0]["n"], jobs["a"][1]["n"], jobs["b"][0]["n"], nodes["w"]["n"]}
    assert len(numbers) == 1
    assert numbers.pop() >= last, "what was told is there"
