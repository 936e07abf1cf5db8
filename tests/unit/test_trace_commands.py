"""downpour trace and downpour report: where they look, what they write, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from job_kit import Line, job_document, line_to
from trace_kit import pipeline
from typer.testing import CliRunner

from downpour.jobs.client import ClusterClient
from downpour_deploy.jobs import named
from downpour_deploy.trace import register

JOB = "digits-3f2a9c"
APP = typer.Typer()
register(APP)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A traced run called ``run``, and one that was not, ``plain``; and no cluster."""
    monkeypatch.chdir(tmp_path)
    for name in ("DOWNPOUR_COORDINATOR", "DOWNPOUR_KEYS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("run", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/spans.jsonl").write_text("\n".join(pipeline("1f1b", 3, 4, steps=8)) + "\n", encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def cluster(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A cluster that has the run as its job."""
    line = line_to(job_document(JOB))
    line.coordinator.files = {"spans.jsonl": (run / "spans.jsonl").read_bytes()}

    def client(join: str | None, keys: str | None, security: str | None, timeout_s: float) -> ClusterClient:
        return line.client(timeout_s)

    monkeypatch.setattr(named, "ClusterClient", client)
    yield line
    assert line.opened == line.closed


def command(*arguments: object) -> Any:
    """Run a command."""
    return CliRunner().invoke(APP, list(map(str, arguments)), catch_exceptions=False)


def test_trace_writes_a_file_for_perfetto_and_replaces_none(run: Path) -> None:
    done = command("trace", run, "-o", "t.json")
    assert (done.exit_code, done.stdout) == (
        0,
        "t.json: 216 spans of 3 processes; open it at https://ui.perfetto.dev\n",
    )
    events = json.loads(Path("t.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 216
    assert command("trace", run, "-o", "t.json").exit_code == 74
    assert command("trace", run, "-o", "t.json", "--force").exit_code == 0


def test_report_says_how_busy_the_pipeline_was_and_draws_it(run: Path) -> None:
    done = command("report", run, "-o", "r.svg", "--from", 3)
    assert done.exit_code == 0
    assert "pipeline 66.7% busy over 6 steps (1f1b, 3 stages, 4 micro-batches: at best 66.7%" in done.stdout
    assert done.stdout.startswith("step 3, ")
    assert done.stdout.endswith("\nr.svg: step 3\n")
    assert "<svg" in Path("r.svg").read_text(encoding="utf-8")
    assert command("report", run, "-o", "r.svg").exit_code == 74
    page = command("report", run, "-o", "r.html", "--json")
    assert json.loads(page.stdout)["replicas"][0]["theory"] == pytest.approx(4 / 6)
    assert Path("r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("verb", ["trace", "report"])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("plain", "started with --trace"),
        ("gone/run", "no such folder"),
        ("run/spans.jsonl", "give the run directory"),
        ("s3://bucket/run", "give the run directory"),
        ("digits", "no such folder here; for a job of a cluster"),
    ],
)
def test_where_there_is_no_trace_the_exit_code_is_2(run: Path, verb: str, where: str, says: str) -> None:
    done = command(verb, where)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not Path("trace.json").exists()


def test_a_step_that_is_not_there_leaves_no_file(run: Path) -> None:
    done = command("report", run, "--from", 99, "-o", "r.svg")
    assert (done.exit_code, "steps 0 to 7" in done.stderr) == (2, True)
    assert not Path("r.svg").exists()


def test_the_trace_of_a_job_of_a_cluster(cluster: Line) -> None:
    assert "216 spans of 3 processes" in command("trace", JOB).stdout
    assert json.loads(command("report", JOB, "--json").stdout)["job"] == JOB
    cluster.coordinator.files = {}
    done = command("report", JOB)
    assert (done.exit_code, "started with --trace" in done.stderr) == (2, True)
