"""What is chosen where the user leaves it open: threads, chunks, how idle threads wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from downpour_common.config import SENT_CHUNK_BYTES, SHARED_CHUNK_BYTES, JobSpec, job_spec
from downpour_common.errors import ConfigError
from downpour_deploy import launch, resolve
from downpour_deploy.threads import Threads, on_one_host


def spec(**fields: Any) -> JobSpec:
    return job_spec(**{"name": "a", "script": "a.py", "workers": 1, "shards": 1, **fields})


@pytest.mark.parametrize(
    ("cores", "fields", "expected"),
    [
        (8, {}, (8, 8)),
        (8, {"shards": 2}, (8, 4)),
        (8, {"workers": 3}, (2, 1)),
        (8, {"workers": 3, "mode": "ssp:1"}, (2, 1)),
        (8, {"workers": 3, "mode": "sync"}, (2, 8)),
        (8, {"workers": 2, "shards": 3, "mode": "sync"}, (4, 2)),
        (2, {"workers": 9, "shards": 9, "mode": "sync"}, (1, 1)),
        (8, {"threads": 5, "workers": 2}, (5, 5)),
    ],
)
def test_workers_share_the_cores_and_shards_have_them_while_workers_wait(
    cores: int, fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert on_one_host(spec(**fields), cores) == Threads(*expected)


def _resolved(script: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, **fields: Any) -> resolve.ResolvedJob:
    found = ("0",) if fields.pop("gpu", False) else ()
    monkeypatch.setattr(resolve, "gpus", lambda: found)
    wishes = {"script": str(script), "args": (), "workers": "1", "shards": 1, "mode": "async", "device": "auto"}
    wishes |= {"threads": "auto", "seed": None, "out": str(script.parent / "out"), "resume": None, "name": None}
    return resolve.resolve(resolve.Wishes(**{**wishes, "settings": settings, **fields}))


@pytest.mark.parametrize(
    ("settings", "fields", "expected"),
    [
        ([], {}, SHARED_CHUNK_BYTES),
        ([], {"workers": "3", "mode": "sync"}, SHARED_CHUNK_BYTES),
        (["chunk_bytes=0"], {}, SHARED_CHUNK_BYTES),
        (["shared_memory=false"], {}, SENT_CHUNK_BYTES),
        (["transport=tcp"], {}, SENT_CHUNK_BYTES),
        (["n_push=2"], {}, SENT_CHUNK_BYTES),
        ([], {"device": "cuda"}, SENT_CHUNK_BYTES),
        ([], {"gpu": True}, SENT_CHUNK_BYTES),
        ([], {"gpu": True, "device": "cpu"}, SHARED_CHUNK_BYTES),
        (["chunk_bytes=12345"], {}, 12345),
    ],
)
def test_chunks_are_large_where_only_headers_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], fields: dict[str, Any], expected: int
) -> None:
    script = tmp_path / "train.py"
    script.touch()
    assert _resolved(script, monkeypatch, *settings, **fields).spec.settings.chunk_bytes == expected


def test_threads_of_the_environment_hold_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    job = _resolved(script, monkeypatch)
    assert (job.spec.threads, job.threads) == (3, Threads(3, 3))
    assert _resolved(script, monkeypatch, threads="2").threads == Threads(2, 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    job = _resolved(script, monkeypatch)
    assert (job.spec.threads, job.threads) == (0, on_one_host(job.spec, job.cores)), "0 can be submitted elsewhere"


def test_chunks_too_small_to_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1024"):
        spec(settings={"chunk_bytes": 1})


@pytest.mark.parametrize(
    ("inherited", "env", "expected"),
    [
        ({}, {}, launch.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, {}, "7"),
        ({}, {"GOMP_SPINCOUNT": "8"}, "8"),
        ({"OMP_WAIT_POLICY": "active"}, {}, None),
        ({}, {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_idle_threads_give_way_soon_unless_the_user_says_otherwise(
    inherited: dict[str, str], env: dict[str, str], expected: str | None
) -> None:
    place = launch.Place(threads=2, environment=inherited)
    job = spec(settings={"chunk_bytes": 4096}, env=env)
    for _, environment in (
        launch.worker_process(job, "j", "ipc:///c", 0, place),
        launch.shard_process(job, "j", "ipc:///c", 0, "ipc:///s", place),
    ):
        assert environment.get("GOMP_SPINCOUNT") == expected
        assert environment["OMP_NUM_THREADS"] == "2"


def test_whether_weights_may_lie_in_place_is_told_to_the_worker() -> None:
    for wanted in (True, False):
        job = spec(settings={"in_place": wanted})
        _, environment = launch.worker_process(job, "j", "ipc:///c", 0, launch.Place(environment={}))
        assert f'"in_place": {str(wanted).lower()}' in environment["DOWNPOUR_WORKER"]
