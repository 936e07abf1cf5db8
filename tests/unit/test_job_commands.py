"""The commands on jobs and nodes: what they print, where, and their exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from job_kit import FAILURE, FakeCoordinator, Line, job_document, line_to, served
from typer.testing import CliRunner

from downpour.jobs import api
from downpour.jobs.client import ClusterClient
from downpour.jobs.logs import LogLine, LogName
from downpour.jobs.status import job_status
from downpour_common.messages import CancelJob, DrainNode, ListJobs, PutBundle, ScaleJob, SubmitJob
from downpour_deploy.jobs import options, register
from downpour_deploy.jobs.tables import columns, duration, jobs_table, nodes_table, placement_lines
from downpour_deploy.jobs.view import View

JOB = "digits-3f2a9c"
Run = Callable[..., Any]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The cluster that every command reaches."""
    line = line_to(job_document())
    monkeypatch.setenv("DOWNPOUR_COORDINATOR", "127.0.0.1:7000")
    monkeypatch.delenv("DOWNPOUR_KEYS", raising=False)
    monkeypatch.setattr(api.Cluster, "client", lambda cluster: line.client(cluster.timeout_s))
    yield line
    assert line.opened == line.closed, "every connection is given up"


@pytest.fixture
def run(line: Line) -> Run:
    """Runs a command; stdout and stderr apart."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    register(app)

    @app.callback()
    def _root() -> None:
        pass

    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "train.py"
    path.parent.mkdir()
    path.write_text("")
    return path


def at(line: Line, seconds: float, **fields: Any) -> None:
    """Change the job ``seconds`` from now."""
    line.clock.at.append((line.clock.now_s + seconds, lambda: line.coordinator.jobs[JOB].update(fields)))


def interrupt(line: Line, seconds: float) -> None:
    """Ctrl-C ``seconds`` from now."""

    def press() -> None:
        raise KeyboardInterrupt

    line.clock.at.append((line.clock.now_s + seconds, press))


# ---------------------------------------------------------------- submit


def test_submit_prints_the_id_and_nothing_else_on_stdout(run: Run, line: Line, script: Path) -> None:
    result = run("submit", "-w", 4, "-s", 2, "--mode", "sync", "--set", "grace_s=1", "--env", "A=b", script, "--lr", 3)
    assert (result.exit_code, result.stdout) == (0, "train-0\n")
    assert "job train-0: 4 workers, 2 shards, mode sync; in the queue, position 1" in result.stderr
    assert "downpour logs -f train-0" in result.stderr
    (sent,) = line.coordinator.of(SubmitJob)
    spec = sent.document["spec"]
    assert (spec["workers"], spec["args"], spec["settings"]["grace_s"], spec["env"]) == (
        4,
        ["--lr", "3"],
        1.0,
        {"A": "b"},
    )


def test_submit_passes_every_option_on(run: Run, line: Line, script: Path) -> None:
    options = {
        "--min-workers": 2, "--restarts": 3, "--shard-memory": "1GiB", "--worker-label": "gpu=a100", "--seed": 7,
        "--server-label": "disk=ssd", "--name": "mine", "--device": "cpu", "--threads": "auto", "--resume": "digits",
        "--folder": script.parent,
    }  # fmt: skip
    flat = [word for pair in options.items() for word in pair]
    result = run("submit", "-w", 4, *flat, "--anyway", "--json", "--", script)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    spec = document["spec"]
    assert document["job"] == "mine-0"
    assert (spec["min_workers"], spec["restarts"], spec["shard_memory"], spec["seed"]) == (2, 3, 1 << 30, 7)
    assert (spec["worker_labels"], spec["server_labels"]) == ({"gpu": "a100"}, {"disk": "ssd"})
    assert (spec["device"], spec["threads"], spec["resume"], spec["folder"]) == ("cpu", 0, "digits", ".")
    assert line.coordinator.of(SubmitJob)[0].document["anyway"] is True


def test_submit_tells_all_problems_at_once_and_sends_nothing(run: Run, line: Line) -> None:
    result = run("submit", "--set", "n_pusch=3", "--env", "x", "--threads", "0", "--mode", "quick", "nowhere.py")
    assert (result.exit_code, result.stdout) == (2, "")
    for text in ("did you mean n_push", "--env x", "--threads 0: expected", "nowhere.py: no such file", "unknown mode"):
        assert text in result.stderr
    assert all(text.startswith("downpour: ") for text in result.stderr.splitlines())
    assert line.opened == 0


def test_submit_of_a_job_file(run: Run, line: Line, script: Path) -> None:
    file = script.parent / "job.toml"
    file.write_text('script = "train.py"\nname = "digits"\nworkers = 3\n')
    assert run("submit", file).exit_code == 0
    assert line.coordinator.of(SubmitJob)[0].document["spec"]["workers"] == 3
    file.write_text("workers = \n")
    result = run("submit", file)
    assert result.exit_code == 78
    assert "job.toml:1" in result.stderr
    line.coordinator.refuse = {SubmitJob: ("unusable", "no such label: gpu")}
    file.write_text('script = "train.py"\n')
    result = run("submit", file)
    assert (result.exit_code, result.stderr) == (78, "downpour: no such label: gpu\n")
    assert run("submit", script).exit_code == 2


def test_submit_of_a_folder_that_cannot_travel(run: Run, line: Line, script: Path) -> None:
    (script.parent / "link").symlink_to("/etc/passwd")
    result = run("submit", script)
    assert result.exit_code == 2
    assert "link" in result.stderr
    assert line.coordinator.heard == []


def test_a_dry_run_shows_and_starts_nothing(run: Run, line: Line, script: Path) -> None:
    result = run("submit", "--dry-run", script)
    assert result.exit_code == 0
    assert 'script = "train.py"' in result.stdout
    assert f"folder  {script.parent}: 1 file" in result.stdout
    assert "would start now\n  node-a  server/0\n  b       worker/0" in result.stdout
    assert line.coordinator.of(PutBundle) == []
    document = json.loads(run("submit", "--dry-run", "--json", script).stdout)
    assert document["fits"] is True
    assert document["bundle"]["files"] == [["train.py", 0]]
    assert JOB in line.coordinator.jobs
    assert len(line.coordinator.jobs) == 1


def test_submit_and_follow_to_the_end(run: Run, line: Line, script: Path) -> None:
    line.coordinator.files = {"logs/worker-0.log": b"hello\n"}

    def end() -> None:
        done = {"state": "SUCCEEDED", "model": True, "result": {"metrics": {"accuracy": 0.97}, "steps": 40}}
        line.coordinator.jobs["train-0"].update(done)

    line.clock.at.append((1004.0, end))
    result = run("submit", "--follow", script)
    assert result.exit_code == 0
    out = result.stdout.splitlines()
    assert out[0].startswith("downpour: train-0: in the queue, position 1")
    assert out[1] == "worker/0 hello"
    assert out[2] == "job         train-0  SUCCEEDED"
    assert out[3] == "accuracy    0.97 (last logged)"
    assert out[-1] == "weights     downpour get train-0 -o FOLDER"


def test_submit_follow_json_keeps_stdout_for_the_document(run: Run, line: Line, script: Path) -> None:
    line.coordinator.files = {"logs/worker-0.log": b"hello\n"}
    line.clock.at.append((1004.0, lambda: line.coordinator.jobs["train-0"].update(state="FAILED", failure=FAILURE)))
    result = run("submit", "--follow", "--json", script)
    assert result.exit_code == 100
    assert json.loads(result.stdout)["state"] == "FAILED"
    assert "worker/0 hello" in result.stderr
    assert "worker/1 on node-b failed: ValueError: no data (exit code 1)" in result.stderr
    assert '      File "train.py", line 7' in result.stderr


def test_ctrl_c_while_following_leaves_the_job_running(run: Run, line: Line, script: Path) -> None:
    interrupt(line, 3.0)
    result = run("submit", "--follow", script)
    assert result.exit_code == 101
    assert "detached; job train-0 goes on. Back to it: downpour logs -f train-0" in result.stdout
    assert line.coordinator.of(CancelJob) == []


# ---------------------------------------------------------------- list, status, nodes


def test_list(run: Run, line: Line) -> None:
    other = job_document("cnn-1", "PENDING", position=1, message="needs 2", workers={"wanted": 4, "live": 0})
    bad = job_document("mlp-2", "FAILED", failure={**FAILURE, "message": "bad\x1b[31m news"}, elapsed_s=3700.0)
    line.coordinator.jobs |= {"cnn-1": other, "mlp-2": bad}
    result = run("list")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "JOB            STATE    WORKERS  SHARDS  MODE  STEP  AGE      USER",
        "digits-3f2a9c  RUNNING  2/2      1       sync  120   41 s     alice  loss 0.25",
        "cnn-1          PENDING  0/4      1       sync  120   41 s     alice  in the queue, position 1: needs 2 (41 s)",
        "mlp-2          FAILED   2/2      1       sync  120   1:01:40  alice  worker/1: bad\ufffd[31m news",
    ]  # fmt: skip
    assert [job["job"] for job in json.loads(run("list", "--json").stdout)["jobs"]] == [JOB, "cnn-1", "mlp-2"]
    assert jobs_table([]) == ["no jobs; `downpour submit SCRIPT` starts one"]


def test_status(run: Run, line: Line) -> None:
    line.coordinator.jobs[JOB].update(
        processes=[
            {"role": "worker", "index": 1, "epoch": 1, "node": "b", "state": "running", "exit_code": None, "pid": 7},
            {"role": "server", "index": 0, "epoch": 0, "node": "a", "state": "ended", "exit_code": 0, "pid": 5},
        ],
        warnings=["slow disk"],
        restarts=1,
        restarts_limit=3,
        checkpoints=[1, 2],
        metrics={"loss": None},
    )
    result = run("status", "digits")
    assert result.exit_code == 0
    for text in (
        f"job          {JOB}  RUNNING",
        "workers      2 of 2",
        "restarts     1 of 3",
        "checkpoints  1, 2",
        "loss         -",
        "warning      slow disk",
    ):
        assert text in result.stdout.splitlines()
    assert result.stdout.splitlines()[-3:] == [
        "PROCESS   NODE  STATE    PID  EXIT  STARTED AGAIN",
        "server/0  a     ended    5    0     -",
        "worker/1  b     running  7    -     1",
    ]
    line.coordinator.jobs[JOB].update(state="FAILED", failure=FAILURE, metrics={"loss": float("nan")})
    failed = run("status", JOB)
    assert failed.exit_code == 0
    assert "worker/1 on node-b failed: ValueError: no data (exit code 1)\n    Traceback" in failed.stdout
    assert json.loads(run("status", JOB, "--json").stdout)["metrics"] == {"loss": None}


def test_nodes_and_drain(run: Run, line: Line) -> None:
    line.coordinator.nodes = [
        {
            "node": "a", "role": "worker", "state": "READY", "host": "a.lan", "address": "", "cores": 8, "gpus": 1,
            "memory_bytes": 16 << 30, "memory_used": 0, "labels": {"gpu": "a100"}, "slots": 4, "used": 2,
            "last_seen_s": 0.4, "processes": [{"job": JOB, "role": "worker", "index": i} for i in (0, 1)],
        }
    ]  # fmt: skip
    assert run("nodes").stdout.splitlines() == [
        "the coordinator runs WITHOUT KEYS: whoever reaches it can run code on these hosts",
        "",
        "NODE  ROLE    STATE  HOST   CORES  GPUS  MEMORY  USED  SEEN",
        f"a     worker  READY  a.lan  8      1     16 GiB  2/4   0 s ago  gpu=a100; {JOB}: worker/0, worker/1",
    ]
    assert json.loads(run("nodes", "--json").stdout)["nodes"][0]["node"] == "a"
    assert run("drain", "a").stdout == "node a: DRAINING\n"
    assert run("drain", "a", "--undo").stdout == "node a: READY\n"
    assert [m.undo for m in line.coordinator.of(DrainNode)] == [False, True]
    result = run("drain", "b")
    assert (result.exit_code, result.stderr) == (2, "downpour: no node b; `downpour nodes` lists them\n")
    assert nodes_table({})[0].startswith("no nodes; ")


# ---------------------------------------------------------------- logs


def test_logs(run: Run, line: Line) -> None:
    line.coordinator.files = {
        "logs/worker-0.log": b"one\n\ttab\nlast",
        "logs/worker-0.1.log": b"again\n",
        "logs/server-0.log": b"\x1b[31mshard\x1b[0m\n",
    }
    assert run("logs", JOB).stdout.splitlines() == [
        "server/0 \x1b[31mshard\x1b[0m",
        "worker/0 one",
        "worker/0 \ttab",
        "worker/0 --- started again (1) ---",
        "worker/0 again",
        "worker/0 last",
    ]
    assert run("logs", f"{JOB}/server/0").stdout == "\x1b[31mshard\x1b[0m\n", "as it was written"
    assert run("logs", f"{JOB}/worker", "--tail", 1).stdout.splitlines()[0] == "worker/0 --- started again (1) ---"
    missing = run("logs", f"{JOB}/worker/9")
    assert missing.exit_code == 2
    assert "that process has not written anything" in missing.stderr
    assert run("logs", f"{JOB}/shard/9").exit_code == 2


def test_logs_are_followed(run: Run, line: Line) -> None:
    line.coordinator.files = {"logs/worker-0.log": b"one\n"}
    at(line, 3.0, state="SUCCEEDED")
    result = run("logs", "-f", JOB)
    assert (result.exit_code, result.stdout) == (0, "worker/0 one\n")
    assert result.stderr.endswith(f"downpour: job {JOB}: SUCCEEDED\n")
    line.coordinator.jobs[JOB]["state"] = "RUNNING"
    interrupt(line, 3.0)
    left = run("logs", "-f", JOB)
    assert left.exit_code == 101
    assert "goes on" in left.stderr


# ---------------------------------------------------------------- wait, cancel, scale


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("FAILED", 100), ("CANCELLED", 103)])
def test_wait(run: Run, line: Line, state: str, code: int) -> None:
    line.coordinator.jobs[JOB].update(state="STARTING", waiting_for=["server/1", "worker/3"], waiting_s=41.0)
    at(line, 25.0, state=state)
    result = run("wait", JOB)
    assert (result.exit_code, result.stdout) == (code, "")
    told = [text for text in result.stderr.splitlines() if "waiting for server/1, worker/3 (41 s)" in text]
    assert len(told) == 3, "at once, then every 10 s"
    assert f"{JOB}  {state}" in result.stderr
    assert json.loads(run("wait", JOB, "--json").stdout)["state"] == state


def test_wait_no_longer_than_told(run: Run, line: Line) -> None:
    result = run("wait", JOB, "--timeout", 5, "--json")
    assert result.exit_code == 101
    assert f"job {JOB} has not ended within 5 s: step 120" in result.stderr
    assert json.loads(result.stdout)["state"] == "RUNNING"
    interrupt(line, 3.0)
    assert run("wait", JOB).exit_code == 101


def test_wait_while_the_coordinator_is_away(run: Run, line: Line) -> None:
    line.clock.at.append((1002.0, lambda: setattr(line, "cut", True)))
    line.clock.at.append((1062.0, lambda: setattr(line, "cut", False)))
    at(line, 63.0, state="SUCCEEDED")
    result = run("wait", JOB)
    assert result.exit_code == 0
    assert len([text for text in result.stderr.splitlines() if "waiting for the coordinator (" in text]) == 6


def test_cancel(run: Run, line: Line) -> None:
    at(line, 4.0, state="CANCELLED")
    result = run("cancel", JOB, "--json")
    assert result.exit_code == 0
    assert f"downpour: job {JOB}: CANCELLED" in result.stderr
    assert json.loads(result.stdout)["state"] == "CANCELLED"
    again = run("cancel", JOB)
    assert (again.exit_code, again.stderr) == (0, f"downpour: job {JOB} has ended: CANCELLED\n")


def test_cancel_does_not_wait_for_ever(run: Run, line: Line) -> None:
    line.coordinator.jobs[JOB]["spec"] = {"settings": {"grace_s": 5.0}}
    assert run("cancel", JOB, "--no-wait").exit_code == 0
    assert line.clock.now_s < 1001
    result = run("cancel", JOB)
    assert result.exit_code == 101
    assert f"job {JOB} has not ended within 65 s" in result.stderr


def test_scale(run: Run, line: Line) -> None:
    result = run("scale", JOB, "-w", 8)
    assert (result.exit_code, result.stdout) == (0, f"job {JOB}: 8 workers wanted, 2 there now\n")
    line.coordinator.refuse = {ScaleJob: ("unusable", "fewer than --min-workers 2")}
    refused = run("scale", JOB, "-w", 1)
    assert (refused.exit_code, refused.stderr) == (2, "downpour: fewer than --min-workers 2\n")
    assert run("scale", JOB, "-w", 0).exit_code == 2
    assert run("scale", JOB).exit_code == 2


# ---------------------------------------------------------------- get


def test_get(run: Run, line: Line, tmp_path: Path) -> None:
    line.coordinator.files = {"job.toml": b"", "checkpoints/000001/manifest.json": b"{}"}
    result = run("get", JOB, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}: 1 file (0 B)\n")
    assert result.stderr == f"downpour: there is no model.safetensors yet: job {JOB} is RUNNING\n"
    line.coordinator.files["model.safetensors"] = b"weights"
    result = run("get", JOB, "-o", tmp_path / "out", "--all", "--json")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["written"] == ["checkpoints/000001/manifest.json", "model.safetensors"]
    assert document["unchanged"] == ["job.toml"]
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    blocked = run("get", JOB, "-o", tmp_path / "out")
    assert blocked.exit_code == 74
    assert "model.safetensors: there already, with other content" in blocked.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"
    assert run("get", JOB, "-o", tmp_path / "out", "--force").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"


def test_get_without_a_folder_makes_one_called_as_the_job(
    run: Run, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line.coordinator.files = {"model.safetensors": b"weights"}
    assert run("get", "digits").stdout == f"{JOB}: 1 file (7 B)\n"
    assert (tmp_path / JOB / "model.safetensors").exists()


def test_get_to_where_nothing_can_be_written(run: Run, line: Line, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line.coordinator.files = {"model.safetensors": b"weights"}
    result = run("get", JOB, "-o", tmp_path / "file" / "out")
    assert result.exit_code == 74
    assert str(tmp_path / "file") in result.stderr


# ---------------------------------------------------------------- errors of all


@pytest.mark.parametrize(
    "command", [("list",), ("status", "x"), ("logs", "x"), ("wait", "x"), ("cancel", "x"), ("get", "x"), ("nodes",)]
)
def test_no_coordinator_and_refused_keys(run: Run, line: Line, command: tuple[str, ...]) -> None:
    line.cut = True
    result = run(*command)
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.startswith("downpour: no coordinator answers at 127.0.0.1:7000")
    line.problem = "refused"
    result = run(*command)
    assert (result.exit_code, result.stdout) == (77, "")
    assert "asks for a key" in result.stderr


def test_a_job_that_is_not_there(run: Run, line: Line) -> None:
    for command in ("status", "logs", "wait", "cancel", "get"):
        result = run(command, "other")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "downpour: no job other; `downpour list` shows the jobs\n"


def test_ctrl_c(run: Run, line: Line) -> None:
    line.cut = True
    interrupt(line, 1.0)
    result = run("list")
    assert (result.exit_code, result.stderr) == (130, "downpour: interrupted\n")


# ---------------------------------------------------------------- completion, view, text


def test_completion_is_quick_and_silent(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def client(join: str | None, keys: str | None, security: str | None, timeout_s: float) -> ClusterClient:
        made.append(timeout_s)
        return line.client(timeout_s)

    monkeypatch.setattr("downpour.jobs.client.ClusterClient", client)
    line.coordinator.nodes = [{"node": "node-a", "role": "worker", "state": "READY"}]
    context: Any = typer.Context(typer.main.get_command(_one_command()))
    context.params = {}
    assert options._complete_jobs(context, "") == [(JOB, "digits RUNNING")]
    assert set(options._complete_jobs(context, "dig")) == {(JOB, "digits RUNNING"), ("digits", "its newest job")}
    assert options._complete_jobs(context, "x") == []
    assert options._complete_nodes(context, "node") == [("node-a", "worker READY")]
    line.cut = True
    assert options._complete_jobs(context, "") == []
    assert max(made) < 1.0
    line.cut = False
    line.coordinator.refuse = {ListJobs: ("forbidden", "no")}
    assert options._complete_jobs(context, "") == []


def _one_command() -> typer.Typer:
    app = typer.Typer()
    app.command()(lambda: None)
    return app


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_status_stays_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    running = job_document()
    with View(stream) as view:
        view.status(job_status(running))
        view.line(LogLine(LogName("worker", 0, 0), "a\x1b[2Jb"))
        view.silence(5.0)
        view.finish(job_status({**running, "state": "SUCCEEDED"}))
    text = stream.getvalue()
    assert "\x1b[?25h" in text, "the cursor is back"
    assert "\x1b[2J" not in text, "a script's output does not clear the screen"
    assert "waiting for the coordinator (5 s); the job goes on without it" in text
    assert "SUCCEEDED" in text


def test_warnings_are_told_once() -> None:
    stream = io.StringIO()
    with View(stream) as view:
        for _ in range(3):
            view.status(job_status(job_document(warnings=["slow disk"])))
    assert stream.getvalue().count("slow disk") == 1


def test_texts() -> None:
    assert [duration(s) for s in (0, 59.9, 60, 3599, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
    assert columns([("a", 1), ("bcd", "\x07")]) == ["a    1", "bcd  \ufffd"]
    assert placement_lines({"fits": False}) == ["would wait"]


# ---------------------------------------------------------------- as processes


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import typer, sys; from downpour_deploy.jobs import register; app = typer.Typer(); register(app); app()"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DOWNPOUR_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_over_sockets(script: Path, tmp_path: Path) -> None:
    coordinator = FakeCoordinator(job_document(state="SUCCEEDED"))
    (script.parent / "data.bin").write_bytes(os.urandom(700_000))
    coordinator.files = {"model.safetensors": os.urandom(3_000_000)}
    with served(coordinator) as address:
        submitted = command("submit", "--join", address, str(script))
        assert (submitted.returncode, submitted.stdout) == (0, "train-0\n"), submitted.stderr
        (bundle,) = coordinator.bundles.values()
        assert len(bundle) > 700_000
        got = command("get", JOB, "-o", str(tmp_path / "out"), DOWNPOUR_COORDINATOR=address)
        assert got.returncode == 0, got.stderr
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == coordinator.files["model.safetensors"]
    gone = command("list", "--timeout", "0.5", DOWNPOUR_COORDINATOR=address)
    assert gone.returncode == 69
    assert gone.stderr.startswith(f"downpour: nothing listens at {address} (tried for")
    nowhere = command("list")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    assert "which cluster? give --join HOST:PORT, or set DOWNPOUR_COORDINATOR" in nowhere.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, downpour_deploy.jobs; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) & {"torch", "numpy", "pydantic", "zmq", "msgpack", "uvloop", "downpour", "tomllib"} == set()
