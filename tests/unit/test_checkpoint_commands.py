"""downpour checkpoint: what it prints, where it looks, and its exit codes; wishes for a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from coordinator_kit import World
from job_kit import FakeCoordinator, Line, job_document, line_to, served
from test_checkpoints import SPEC, save, train
from typer.testing import CliRunner

from downpour.jobs.client import ClusterClient
from downpour_common.errors import ConfigError
from downpour_common.messages import CheckpointNow
from downpour_deploy import running
from downpour_deploy.checkpoint import checkpoint_app
from downpour_deploy.checkpoint.now import await_commit
from downpour_deploy.jobs import named
from downpour_deploy.jobs.tables import job_details

JOB = "digits-3f2a9c"
SHARD = "checkpoints/000002/shard-1.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; not to be changed."""
    run = tmp_path_factory.mktemp("run")
    drivers = train(SPEC, 2, 100)
    for number in (1, 2):
        save(run, drivers, number)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two checkpoints, called ``run``; and no cluster."""
    import shutil

    monkeypatch.chdir(tmp_path)
    for name in ("DOWNPOUR_COORDINATOR", "DOWNPOUR_KEYS"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def cluster(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A cluster that has the run as its job."""
    line = line_to(job_document(JOB))
    files = (p for p in run.rglob("*") if p.is_file())
    line.coordinator.files = {str(p.relative_to(run)): p.read_bytes() for p in files}

    def client(join: str | None, keys: str | None, security: str | None, timeout_s: float) -> ClusterClient:
        return line.client(timeout_s)

    monkeypatch.setattr(named, "ClusterClient", client)
    yield line
    assert line.opened == line.closed


def command(*arguments: object) -> Any:
    """Run a command."""
    return CliRunner().invoke(checkpoint_app, list(map(str, arguments)), catch_exceptions=False)


def flip(path: Path, at: int = -1) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------- ls, verify


@pytest.mark.parametrize("where", ["run", "run/checkpoints/000002", "url", JOB])
def test_ls_and_verify_read_folders_urls_and_jobs(run: Path, cluster: Line, where: str) -> None:
    place = f"file://{run}" if where == "url" else where
    listed = command("ls", place, "--json")
    assert (listed.exit_code, listed.stderr) == (0, "")
    found = json.loads(listed.stdout)["checkpoints"]
    assert [each["number"] for each in found] == ([2] if "000002" in where else [1, 2])
    assert all((c["clock"], c["shards"], c["sound"], c["problems"]) == (3, 2, None, []) for c in found)
    assert all(c["bytes"] > 0 and c["written_s"] > 0 for c in found)
    checked = command("verify", place, "--json")
    assert checked.exit_code == 0
    assert all(c["sound"] for c in json.loads(checked.stdout)["checkpoints"])


def test_ls_for_people(run: Path) -> None:
    result = command("ls", "run", "--check")
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["NUMBER", "CLOCK", "SIZE", "AGE", "MODE", "SHARDS"]
    assert [row.split()[:2] + row.split()[-1:] for row in rows] == [["1", "3", "sound"], ["2", "3", "sound"]]


@pytest.mark.parametrize("where", ["run", "url", JOB])
def test_verify_names_each_damaged_file_and_goes_on(run: Path, cluster: Line, where: str) -> None:
    flip(run / SHARD)
    (run / "checkpoints/000002/shard-0.safetensors").unlink()
    flip(run / "checkpoints/000001/manifest.json", 20)
    cluster.coordinator.files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    result = command("verify", f"file://{run}" if where == "url" else where)
    assert result.exit_code == 1
    text = result.stdout
    for words in ("000001/manifest.json", "000002/shard-0.safetensors: is missing", "digest: it is damaged"):
        assert words in text
    assert text.count("DAMAGED") == 2
    listed = json.loads(command("ls", "run", "--check", "--json").stdout)["checkpoints"]
    assert [c["sound"] for c in listed] == [False, False]
    assert len(listed[1]["problems"]) == 2


def test_verify_of_one_number(run: Path) -> None:
    flip(run / SHARD)
    assert command("verify", "run", "--number", 1).exit_code == 0
    assert command("verify", "run", "--number", 2).exit_code == 1
    missing = command("verify", "run", "--number", 7)
    assert (missing.exit_code, missing.stderr) == (2, "downpour: run has no checkpoint 7; there: 1, 2\n")


def test_nothing_to_verify_is_not_sound(tmp_path: Path) -> None:
    assert command("verify", tmp_path).exit_code == 1
    assert command("ls", tmp_path).exit_code == 0


@pytest.mark.parametrize("name", ["nowhere", "no/where", "nothing://x"])
@pytest.mark.parametrize("verb", ["ls", "verify", "export", "now"])
def test_what_is_nowhere_is_a_usage_error(run: Path, name: str, verb: str) -> None:
    result = command(verb, name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert name in result.stderr


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("where", ["run", "url", JOB])
def test_export_takes_the_newest_sound_one_and_names_what_it_skipped(run: Path, cluster: Line, where: str) -> None:
    flip(run / SHARD)
    cluster.coordinator.files[SHARD] = (run / SHARD).read_bytes()
    place = f"file://{run}" if where == "url" else where
    result = command("export", place, "-o", "out.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["number"] == 1
    assert "skipped a damaged checkpoint" in result.stderr
    assert "shard-1.safetensors" in result.stderr
    assert "embed.weight" in safetensors.torch.load_file("out.safetensors")
    assert sorted(os.listdir()) == ["out.safetensors", "run"], "nothing is left behind"
    assert command("export", place, "-o", "out.safetensors").exit_code == 74, "it is there already"
    assert command("export", place, "-o", "out.safetensors", "--force").exit_code == 0


def test_a_damaged_one_that_was_asked_for_is_not_exported(run: Path) -> None:
    flip(run / SHARD)
    result = command("export", "run", "--number", 2)
    assert result.exit_code == 1
    assert "there is no sound checkpoint" in result.stderr
    assert not os.path.exists("model.safetensors")


# ---------------------------------------------------------------- now


def wish(state: str, number: int = 0, error: str = "") -> dict[str, Any]:
    """A coordinator's answer."""
    return {"job": JOB, "state": state, "number": number, "error": error}


@pytest.mark.parametrize(
    ("answers", "code", "words"),
    [
        ([wish("waiting"), wish("writing", 4), wish("committed", 4)], 0, "checkpoint 4 is committed"),
        ([wish("writing", 4), wish("failed", 4, "the job has ended before it")], 1, "ended before"),
        ([wish("writing", 4, "disk full")], 101, "within 5 s; it may be later: disk full"),
    ],
)
def test_now_waits_for_the_commit(cluster: Line, answers: list[Any], code: int, words: str) -> None:
    cluster.coordinator.wishes = answers
    result = command("now", JOB, "--timeout", 5)
    assert result.exit_code == code
    assert words in result.stdout + result.stderr
    assert len({message.token for message in cluster.coordinator.of(CheckpointNow)}) == 1, "it is one wish"


def test_now_in_json(cluster: Line) -> None:
    cluster.coordinator.wishes = [wish("committed", 4)]
    assert json.loads(command("now", JOB, "--json").stdout) == wish("committed", 4)


def test_a_wish_survives_lost_answers(cluster: Line) -> None:
    cluster.coordinator.wishes = [wish("writing", 4), wish("committed", 4)]
    cluster.deaf = 1
    with cluster.client(30.0) as client:
        assert await_commit(client, JOB, 60.0)["state"] == "committed"


def test_now_finds_a_job_of_downpour_run_by_its_file(run: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.wishes = [wish("committed", 7)]
    with served(coordinator) as address:
        running.write(str(run), JOB, f"tcp://{address}")
        assert os.stat(run / running.NAME).st_mode & 0o77 == 0
        result = command("now", "run")
    assert (result.exit_code, result.stdout) == (0, f"job {JOB}: checkpoint 7 is committed\n")
    assert [message.job for message in coordinator.of(CheckpointNow)] == [JOB]
    running.remove(str(run))
    assert command("now", "run").exit_code == 2


def test_a_launcher_that_was_killed_is_not_asked(run: Path) -> None:
    gone = 1 << 22  # above what the kernel gives as a process' number
    (run / running.NAME).write_text(json.dumps({"job": JOB, "address": "ipc:///nowhere", "pid": gone}))
    result = command("now", "run")
    assert (result.exit_code, "no job of `downpour run` is under way" in result.stderr) == (2, True)
    (run / running.NAME).write_text("{}")
    assert command("now", "run").exit_code == 1


# ---------------------------------------------------------------- what a job makes of a wish


def test_a_wish_is_met_by_the_first_checkpoint_that_begins_after_it() -> None:
    world = World(workers=1, settings={"checkpoint_s": 0.0}).start()
    assert world.life.checkpoint_now("a")["state"] == "waiting"
    world.tick()
    assert world.life.checkpoint_now("a") == {"job": "job-1", "state": "committed", "number": 1, "error": ""}
    world.tick(10.0)
    assert world.committed == [1], "the same wish again is no second checkpoint"
    world.life.checkpoint_now("b")
    world.tick()
    assert world.committed == [1, 2]


def test_a_wish_while_another_is_written_is_met_by_the_next() -> None:
    world = World(workers=1, settings={"checkpoint_s": 20.0}).start()
    world.slow = True
    world.tick(20.0)
    assert world.life.checkpoint_now("a")["state"] == "waiting"
    world.tick()
    assert world.life.checkpoint_now("a")["number"] == 0
    world.slow = False
    world.work()
    world.tick()
    assert world.life.checkpoint_now("a")["number"] == 2
    assert world.life.checkpoint_now("a")["state"] == "committed"


def test_a_wish_that_fails_is_tried_again_and_says_why() -> None:
    world = World(workers=1, settings={"checkpoint_s": 0.0}).start()
    world.disk_full = "no space"
    world.life.checkpoint_now("a")
    for _ in range(3):
        world.tick(6.0)
    found = world.life.checkpoint_now("a")
    assert (found["state"], found["error"]) == ("writing", "no space")
    assert "no space" in world.life.degraded
    world.disk_full = ""
    world.tick(6.0)
    assert world.life.checkpoint_now("a")["state"] == "committed"
    assert world.life.checkpoints.degraded == ""


def test_a_job_that_does_not_train_refuses_and_one_that_has_ended_says_so() -> None:
    world = World(workers=1)
    with pytest.raises(ConfigError, match="PENDING; only a running job"):
        world.life.checkpoint_now("a")
    world.start()
    world.disk_full = "no space"
    world.life.checkpoint_now("a")
    world.life.stop("CANCELLED", keep=False, now_s=world.now_s)
    for _ in range(100):
        world.obey()
        world.tick()
    assert world.life.over
    assert world.life.checkpoint_now("a")["state"] == "failed"


# ---------------------------------------------------------------- the interval


def _measured(world: World, *costs: float) -> float:
    files = [{"cost_s": cost} for cost in costs]
    world.life.checkpoints.measured(files, {0: "a", 1: "a", 2: "b"})
    return world.life.checkpoints.interval_s


def test_auto_is_youngs_formula_within_bounds() -> None:
    world = World(settings={"checkpoint_s": "auto", "mtbf_s": 20_000.0}).start()
    assert world.life.checkpoints.interval_s == 30.0, "nobody knows yet"
    assert _measured(world, 0.1) == pytest.approx((2 * 0.1 * 20_000) ** 0.5)
    assert world.life.checkpoints.document(world.now_s)["cost_s"] == 0.1
    assert _measured(world, 1e-9) == pytest.approx((2 * 0.05 * 20_000) ** 0.5), "the mean with what was before"
    for _ in range(30):
        _measured(world, 0.0)
    assert world.life.checkpoints.interval_s == 10.0
    for _ in range(30):
        _measured(world, 100.0)
    assert world.life.checkpoints.interval_s == 600.0


def test_shards_of_one_host_add_up_and_hosts_do_not() -> None:
    world = World(settings={"checkpoint_s": "auto", "mtbf_s": 20_000.0}).start()
    assert _measured(world, 0.1, 0.1, 0.15) == pytest.approx((2 * 0.2 * 20_000) ** 0.5)


def test_failures_shorten_the_interval() -> None:
    world = World(settings={"checkpoint_s": "auto", "mtbf_s": 20_000.0}).start()
    calm_s = _measured(world, 0.1)
    world.life.checkpoints.failures_seen(0, 1e6)
    assert world.life.checkpoints.interval_s == calm_s
    world.life.checkpoints.failures_seen(4, 5_000.0)
    assert world.life.checkpoints.interval_s == pytest.approx((2 * 0.1 * 25_000 / 5) ** 0.5)


def test_status_tells_the_interval() -> None:
    from downpour.jobs.status import job_status

    world = World(settings={"checkpoint_s": "auto"}).start()
    document = job_document(checkpointing=world.life.checkpoints.document(world.now_s))
    assert any("every 30 s (auto: one costs not known yet" in line for line in job_details(job_status(document)))
    _measured(world, 0.1)
    document = job_document(checkpointing=world.life.checkpoints.document(world.now_s))
    assert any(
        "every 53.7 s (auto: one costs 0.1 s, a failure every 4:00:00)" in x for x in job_details(job_status(document))
    )
