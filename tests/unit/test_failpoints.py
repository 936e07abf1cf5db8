"""Failpoints: what the variable means, for whom, how often, and what it costs where there are none."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from downpour_common import failpoints
from downpour_common.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    failpoints.arm("nobody")


def times_of(text: str, times: int, process: str = "server/0", epoch: int = 0) -> list[int]:
    """Which of so many arrivals at shard.receive fail."""
    os.environ[failpoints.VARIABLE] = text
    failpoints.arm(process, epoch)
    found = []
    for number in range(1, times + 1):
        try:
            failpoints.hit("shard.receive")
        except OSError:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shard.receive=error", [1, 2, 3, 4, 5, 6]),
        ("shard.receive=error@3", [3]),
        ("shard.receive=error@4+", [4, 5, 6]),
        ("shard.receive=error@p0", []),
        ("shard.receive=error@p1", [1, 2, 3, 4, 5, 6]),
        ("shard.receive=error@2; shard.receive=error:ENOSPC@5", [2, 5]),
        ("shard.receive[server/0]=error@1", [1]),
        ("shard.receive[server/1]=error@1", []),
        ("shard.receive[server]=error@1", [1]),
        ("shard.receive[worker]=error@1", []),
        ("shard.receive[server/0#0]=error@1", [1]),
        ("shard.receive[server/0#1]=error@1", []),
        ("shard.receive[server#0]=error@1", [1]),
        ("shard.apply.after=error", []),
        ("", []),
    ],
)
def test_when_and_for_whom(armed: pytest.MonkeyPatch, text: str, expected: list[int]) -> None:
    armed.setenv(failpoints.VARIABLE, text)
    assert times_of(text, 6) == expected


def test_a_probability_follows_from_the_seed_and_differs_between_processes(armed: pytest.MonkeyPatch) -> None:
    armed.setenv(failpoints.VARIABLE, "")
    drawn = [times_of(f"seed={seed}; shard.receive=error@p0.5", 40) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 5 < len(drawn[0]) < 35
    assert times_of("seed=1; shard.receive=error@p0.5", 40, "server/1") != drawn[0]
    assert times_of("seed=1; shard.receive=error@p0.5", 40, epoch=1) != drawn[0]


def test_the_error_is_the_one_asked_for_and_names_the_point(armed: pytest.MonkeyPatch) -> None:
    armed.setenv(failpoints.VARIABLE, "file.rename.before=error:ENOSPC")
    failpoints.arm("coordinator")
    with pytest.raises(OSError, match=r"No space left on device.*file\.rename\.before") as caught:
        failpoints.hit("file.rename.before")
    assert caught.value.errno == errno.ENOSPC


def test_off_is_off_and_arming_again_forgets(armed: pytest.MonkeyPatch) -> None:
    armed.setenv(failpoints.VARIABLE, "shard.receive=error")
    failpoints.arm("server/0")
    assert failpoints.on
    armed.delenv(failpoints.VARIABLE)
    failpoints.arm("server/0")
    assert not failpoints.on
    failpoints.hit("shard.receive")


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("delay:1", 0)])
def test_a_process_kills_itself_or_waits(action: str, code: int) -> None:
    program = "from downpour_common import failpoints as f; f.arm('server/2', 1); f.hit('shard.receive')"
    environment = {**os.environ, failpoints.VARIABLE: f"shard.receive[server/2#1]={action}"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == code


def test_a_process_stops_itself_and_can_go_on() -> None:
    program = "from downpour_common import failpoints as f; f.arm('worker/0'); f.hit('worker.push.before')"
    environment = {**os.environ, failpoints.VARIABLE: "worker.push.before=stop"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shard.aply.after=kill", r"no such point; known: shard\.receive, "),
        ("shard.receive", r"expected POINT\[PROCESS\]=ACTION@WHEN"),
        ("shard.receive=die", r"unknown action die"),
        ("shard.receive=kill:9", r"unknown action kill:9"),
        ("shard.receive=delay", r"nothing is not a number"),
        ("shard.receive=delay:-1", r"-1 is not a number"),
        ("shard.receive=error:EWHAT", r"no error EWHAT"),
        ("shard.receive=kill@0", r"@0: expected 17"),
        ("shard.receive=kill@soon", r"@soon: expected 17"),
        ("shard.receive=kill@p1.5", r"at most 1"),
        ("shard.receive[master/0]=kill", r"\[master/0\] is no process"),
    ],
)
def test_nonsense_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        failpoints.parse(text)


def test_all_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        failpoints.parse("nowhere=kill; shard.receive=die; shard.receive=kill@3")
    assert len(caught.value.problems) == 2


def test_every_point_is_somewhere_and_none_is_elsewhere() -> None:
    used = set()
    for root in ("common", "paramserver", "worker", "deploy"):
        for path in (ROOT / root).rglob("*.py"):
            if path.name != "failpoints.py" and "failpoints" in (text := path.read_text(encoding="utf-8")):
                strings = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
                used |= {s for s in strings if isinstance(s, str) and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", s)}
    assert set(failpoints.POINTS) <= used
    prefixes = {point.partition(".")[0] for point in failpoints.POINTS}
    meant = {s for s in used if s.partition(".")[0] in prefixes - {"file"}}
    assert {s for s in meant if s.endswith((".before", ".after"))} <= set(failpoints.POINTS)
