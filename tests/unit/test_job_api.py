"""``downpour.submit``, ``downpour.job``, ``downpour.nodes`` and what a Job can do."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_kit import FAILURE, Line, job_document, line_to

import downpour
from downpour.jobs import api
from downpour.jobs.client import ClusterClient
from downpour.jobs.errors import Unknown
from downpour.jobs.status import job_status
from downpour_common.messages import CancelJob, ScaleJob, SubmitJob

WHERE = "127.0.0.1:7000"


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The cluster that every call reaches."""
    line = line_to(job_document())
    asked: list[api.Cluster] = []

    def client(cluster: api.Cluster) -> ClusterClient:
        asked.append(cluster)
        return line.client(cluster.timeout_s)

    monkeypatch.setattr(api.Cluster, "client", client)
    yield line
    assert {cluster.join for cluster in asked} <= {WHERE}
    assert line.opened == line.closed, "every connection is given up"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "train.py"
    path.parent.mkdir()
    path.write_text("")
    return path


def test_submit(line: Line, script: Path) -> None:
    job = downpour.submit(
        script,
        [1, "--x"],
        workers=8,
        shards=4,
        mode="sync",
        join=WHERE,
        env={"A": "b"},
        shard_memory="2GiB",
        anyway=True,
    )
    (sent,) = line.coordinator.of(SubmitJob)
    spec = sent.document["spec"]
    assert sent.document["anyway"] is True
    assert (spec["args"], spec["workers"], spec["shards"], spec["mode"]) == (["1", "--x"], 8, 4, "sync")
    assert (spec["env"], spec["shard_memory"], spec["script"]) == ({"A": "b"}, 2 << 30, "train.py")
    assert isinstance(job, downpour.Job)
    assert job.id == "train-0"
    assert job.status().state == "PENDING"


def test_submit_tells_all_problems_before_it_connects(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOWNPOUR_COORDINATOR", raising=False)
    with pytest.raises(downpour.ConfigError) as caught:
        downpour.submit("nowhere.py", mod="sync")
    text = "\n".join(caught.value.problems)
    assert "which cluster?" in text
    assert "nowhere.py: no such file" in text
    assert "mod" in text
    assert line.opened == 0


def test_attach(line: Line) -> None:
    assert downpour.job("digits", join=WHERE).id == "digits-3f2a9c"
    with pytest.raises(downpour.ClusterError, match="no job other"):
        downpour.job("other", join=WHERE)


def test_nodes(line: Line) -> None:
    line.coordinator.nodes = [{"node": "a"}]
    assert downpour.nodes(join=WHERE) == [{"node": "a"}]


def test_the_result_of_a_job_that_succeeds(line: Line) -> None:
    job = downpour.job("digits", join=WHERE)

    def end() -> None:
        line.coordinator.jobs[job.id].update(state="SUCCEEDED", result={"metrics": {"loss": 0.1}, "steps": 7})

    line.clock.at.append((1003.0, end))
    assert job.result()["metrics"] == {"loss": 0.1}
    assert job.wait(0.0).succeeded


def test_the_result_of_a_job_that_fails_is_the_traceback_of_the_first(line: Line) -> None:
    job = downpour.job("digits", join=WHERE)
    line.coordinator.jobs[job.id].update(state="FAILED", failure=FAILURE)
    with pytest.raises(downpour.JobFailed) as caught:
        job.result()
    error = caught.value
    assert (error.job, error.role, error.index, error.host, error.exit_code) == (job.id, "worker", 1, "node-b", 1)
    assert error.traceback == FAILURE["details"]
    first, _, rest = str(error).partition("\n\n")
    assert first == f"job {job.id}: worker/1 on node-b failed (exit code 1): ValueError: no data"
    assert rest == FAILURE["details"]
    assert job.wait().state == "FAILED", "waiting is no judgement"


def test_a_job_that_fails_without_a_process_to_blame(line: Line) -> None:
    line.coordinator.jobs["digits-3f2a9c"].update(state="FAILED", message="no room within 600 s")
    with pytest.raises(downpour.JobFailed, match="job failed: no room within 600 s") as caught:
        downpour.job("digits", join=WHERE).result()
    assert (caught.value.index, caught.value.exit_code, caught.value.traceback) == (-1, None, "")


def test_the_result_of_a_cancelled_job(line: Line) -> None:
    line.coordinator.jobs["digits-3f2a9c"].update(state="CANCELLED", message="by user/alice")
    with pytest.raises(downpour.JobCancelled, match="job digits-3f2a9c was cancelled: by user/alice"):
        downpour.job("digits", join=WHERE).result()


def test_the_time_to_wait(line: Line) -> None:
    job = downpour.job("digits", join=WHERE)
    with pytest.raises(downpour.NotFinished):
        job.result(timeout=5)
    with pytest.raises(TimeoutError):
        job.wait(timeout=5)


def test_following_to_a_stream(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.coordinator.files = {"logs/worker-0.log": b"one\ntwo"}
    line.coordinator.jobs["digits-3f2a9c"].update(state="SUCCEEDED")
    stream = io.StringIO()
    job = downpour.job("digits", join=WHERE)
    assert job.follow(stream).succeeded
    assert stream.getvalue() == "worker/0 one\nworker/0 two\n"
    job.follow()
    assert capsys.readouterr().out == stream.getvalue()


def test_logs(line: Line) -> None:
    line.coordinator.files = {"logs/worker-0.log": b"one\n", "logs/server-0.log": b"s\n"}
    job = downpour.job("digits", join=WHERE)
    assert job.logs("worker/0") == "one\n"
    assert job.logs() == "server/0 s\nworker/0 one\n"
    with pytest.raises(Unknown, match="worker/7; that process has not written anything"):
        job.logs("worker/7")
    with pytest.raises(downpour.ConfigError):
        job.logs("shard/0")


def test_cancel_and_scale(line: Line) -> None:
    job = downpour.job("digits", join=WHERE)
    assert job.scale(5).workers_wanted == 5
    assert job.cancel().state == "STOPPING"
    assert [m.workers for m in line.coordinator.of(ScaleJob)] == [5]
    assert [m.job for m in line.coordinator.of(CancelJob)] == [job.id]


def test_download(line: Line, tmp_path: Path) -> None:
    job = downpour.job("digits", join=WHERE)
    with pytest.raises(Unknown, match=r"no file model\.safetensors; job digits-3f2a9c is RUNNING"):
        job.download(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    line.coordinator.files = {"model.safetensors": b"weights", "checkpoints/000001/manifest.json": b"{}"}
    path = job.download(tmp_path / "out")
    assert path == str(tmp_path / "out" / "model.safetensors")
    assert Path(path).read_bytes() == b"weights"
    assert not (tmp_path / "out" / "checkpoints").exists()
    job.download(tmp_path / "out", checkpoints=True)
    assert (tmp_path / "out" / "checkpoints" / "000001" / "manifest.json").exists()


def test_a_document_of_another_version_is_read_as_far_as_it_goes() -> None:
    status = job_status({"job": "x-1", "state": "RUNNING", "metrics": {"loss": None}, "failure": {}, "workers": None})
    assert (status.id, status.workers, status.metrics) == ("x-1", 0, {"loss": None})
    assert "step 0" in status.line()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "step 120  epoch 2  1,234 samples/s  loss 0.25  staleness 0/1/2"),
        ({"workers": {"wanted": 4, "live": 3}, "degraded": "disk full", "staleness": {}, "metrics": {}},
         "step 120  epoch 2  1,234 samples/s  3 of 4 workers  DEGRADED: disk full"),
        ({"state": "STARTING", "waiting_for": ["server/1", "worker/3"], "waiting_s": 41.2},
         "waiting for server/1, worker/3 (41 s)"),
        ({"state": "STARTING", "waiting_for": [f"worker/{i}" for i in range(10)]},
         "waiting for " + ", ".join(f"worker/{i}" for i in range(8)) + " and 2 more (0 s)"),
        ({"state": "PENDING", "position": 2, "message": "needs 2 more slots"},
         "in the queue, position 2: needs 2 more slots (41 s)"),
        ({"state": "PENDING"}, "waiting for room (41 s)"),
        ({"state": "CANCELLED", "message": "by you", "waiting_for": ["worker/0"]}, "CANCELLED: by you"),
    ],
)  # fmt: skip
def test_a_job_in_one_line(fields: dict[str, object], text: str) -> None:
    assert job_status({**job_document(), **fields}).line() == text


def test_a_training_script_does_not_pay_for_it() -> None:
    code = (
        "import sys, downpour\n"
        "assert not [m for m in sys.modules if m.startswith('downpour.jobs') or m in ('pydantic', 'zmq', 'torch')]\n"
        "later = {n for n in downpour.__all__ if n not in dir(downpour)}\n"
        "assert 'zmq' not in sys.modules and 'torch' not in sys.modules\n"
        "assert all(hasattr(downpour, n) for n in later)\n"
        "assert not hasattr(downpour, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
