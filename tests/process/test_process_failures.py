"""Jobs that cannot end well: a prompt end, the right exit code, one clear message, nothing left running."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]


@pytest.mark.parametrize(
    ("way", "mode", "code", "message"),
    [
        ("raise", "sync", 1, r"^RuntimeError: the cat sat on the keyboard$"),
        ("kill", "sync", 137, r"killed by signal 9 \(SIGKILL\)"),
        ("nan", "async", 1, r"step 3: the gradient of 1\.bias holds NaN or Inf.*Lower the learning rate"),
        ("differs", "sync", 1, r"model differs.*expected 0\.weight .*\[4, 3\].*found 0\.weight .*\[5, 3\]"),
        ("unprepared", "async", 1, r"failing\.py ended without calling downpour\.prepare\(\)"),
    ],
    ids=["raise", "kill", "nan", "differs", "unprepared"],
)
def test_a_script_that_fails_on_one_rank_ends_the_job(box: Box, way: str, mode: str, code: int, message: str) -> None:
    ended = box.run("-w", "2", "-s", "1", "--mode", mode, "--json", "failing.py", way)
    who = "worker/[01]" if way == "unprepared" else "worker/1"
    found = re.search(r"^(worker/\d) failed: ", ended.stderr, re.MULTILINE)
    assert found is not None, ended.text
    assert re.fullmatch(who, found[1]), ended.text
    failure = ended.expect_failure(found[1], code, message)
    if way in ("raise", "nan", "differs"):
        assert failure["details"].startswith("Traceback (most recent call last):")
        assert "failing.py" in failure["details"]
    log = (ended.out / "logs" / "worker-1.log").read_text()
    assert ("Traceback" in log) == (way in ("raise", "nan", "differs"))


def test_a_killed_shard_is_named(box: Box) -> None:
    running = box.start("-w", "1", "-s", "2", "--json", "ledger.py")
    running.wait_line("worker/0 is training")
    os.kill(running.children()["server/1"], signal.SIGKILL)
    ended = running.end(30.0)
    ended.expect_failure("server/1", 137, r"killed by signal 9 \(SIGKILL\)")


def test_what_cannot_be_distributed_is_refused_with_the_way_out(box: Box) -> None:
    ended = box.run("-w", "1", "-s", "1", "--json", "refused.py")
    ended.expect_failure("worker/0", 1, r"ModelError: optimizer\.step\(closure\) cannot be distributed; compute")
    said = dict(re.findall(r"^worker/0 ([a-z ]+): (.*)$", ended.stderr, re.MULTILINE))
    assert re.match(r"ModelError: nothing to train: .*check requires_grad", said["frozen"])
    assert re.match(
        r"ModelError: optimizer torch\.optim\.\S*Adafactor has no update rule .*use one of.*SGD.*Adam",
        said["adafactor"],
    )
    assert re.match(r"ModelError: torch\.optim\.LBFGS needs the loss of all data .*--mode lbfgs", said["lbfgs"])
    assert re.match(r"ModelError: the optimizer holds 2 parameter\(s\) that the model .* not", said["stranger"])
    assert re.match(r"ConfigError: .*at most one nn\.Module.*given: Linear, Linear", said["two models"])
    assert re.match(r"ModelError: .*called twice", said["twice"])


def test_every_problem_of_the_command_line_is_told_at_once_and_nothing_is_left(box: Box) -> None:
    (box.folder / "full").mkdir()
    (box.folder / "full" / "thesis.txt").write_text("do not touch")
    before = sorted(box.folder.rglob("*"))
    options = ("--mode", "snyc", "--set", "n_psh=3", "--set", "foo", "-w", "none", "-s", "0", "--name", "A b")
    ended = box.run(*options, "missing.py", out="full")
    assert ended.code == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert all(line.startswith("downpour: ") for line in lines), ended.stderr
    for part in (
        "missing.py: no such file",
        "mode: unknown mode 'snyc'; did you mean 'sync'?",
        "--set n_psh: no such setting; did you mean n_push?",
        "--set foo: expected key=value",
        "--workers none: expected a positive number, or auto",
        "shards: ",
        "name: ",
        "--out full: is not empty",
    ):
        assert sum(part in line for line in lines) == 1, (part, ended.stderr)
    assert len(lines) == 8
    assert sorted(box.folder.rglob("*")) == before


@pytest.mark.parametrize(("out", "code"), [("ledger.py", 2), ("ledger.py/below", 74)])
def test_a_run_directory_that_cannot_be_made_is_told_in_one_line(box: Box, out: str, code: int) -> None:
    ended = box.run("ledger.py", out=out)
    assert ended.code == code, ended.text
    assert "Traceback" not in ended.text
    assert re.search(rf"^downpour: .*{out}", ended.stderr, re.MULTILINE)


def test_a_port_in_use_is_a_usage_error_that_leaves_no_run_directory(box: Box) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = box.run("--set", "transport=tcp", "--set", f"port={port}", "ledger.py")
    assert ended.code == 2, ended.text
    [line] = ended.stderr.splitlines()
    assert re.search(rf"127\.0\.0\.1:{port}.*[Aa]ddress already in use.*port", line)
    assert not ended.out.exists()


def test_a_full_disk_does_not_stop_training_and_is_told_at_the_end(box: Box, small_disk: Path) -> None:
    out = small_disk / "run"
    ended = box.run("-w", "1", "-s", "2", "--json", "big.py", str(small_disk), out=out)
    assert "worker/0 disk is full: No space left on device" in ended.stderr
    assert "worker/0 trained to the end" in ended.stderr
    failure = ended.expect_failure("run", 74, r"could not be written: .*No space left on device")
    assert str(out) in failure["message"]
    assert not ended.manifests()
    assert not [p for p in out.rglob("*") if ".tmp" in p.name]


def test_what_goes_wrong_after_the_scripts_last_line_does_not_pass_for_success(box: Box) -> None:
    ended = box.run("-w", "1", "-s", "1", "--set", "n_push=5", "--set", "n_fetch=5", "--json", "ends_badly.py")
    ended.expect_failure("worker/0", 1, r"NonFiniteContribution.*gradient of weight holds NaN")
