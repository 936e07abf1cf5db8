"""Replicas that are groups of workers: what may be asked for, what processes are told, where they are placed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from coordinator_kit import Hosts, World, spec_of
from test_choices import _resolved
from test_placement import nodes, servers, workers

from downpour.context import VARIABLE, WorkerContext, from_environment
from downpour.jobs.status import job_status
from downpour.jobs.submission import describe
from downpour_common.config import job_spec, to_toml
from downpour_common.errors import ConfigError
from downpour_common.jobfile import load
from downpour_common.replicas import counted, multiple_of_ranks, ranks_given, titled
from downpour_coordinator.describe import job_document
from downpour_coordinator.placement import place_gang
from downpour_deploy import launch
from downpour_deploy.jobs.tables import job_details

GOOD: dict[str, Any] = {"name": "a", "script": "train.py", "workers": 12, "shards": 1}


def problems(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job_spec(**{**GOOD, **fields})
    return "\n".join(caught.value.problems)


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        ({}, (1,)),
        ({"tensor": 2}, (2,)),
        ({"tensor": "2", "pipeline": 3}, (2, 2, 2)),
        ({"tensor": "1,2", "pipeline": "2"}, (1, 2)),
        ({"tensor": [3, 1], "pipeline": 2}, (3, 1)),
        ({"pipeline": 4, "schedule": "interleaved", "interleave": 3}, (1, 1, 1, 1)),
    ],
)
def test_a_replica_is_described_by_its_stages_widths(fields: dict[str, Any], widths: tuple[int, ...]) -> None:
    spec = job_spec(**GOOD, **fields)
    assert (spec.widths, spec.ranks, spec.replicas) == (widths, sum(widths), 12 // sum(widths))
    assert ranks_given(fields.get("tensor"), fields.get("pipeline")) == spec.ranks


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor": 5}, "a replica has 5 workers, so give a multiple of 5, such as 10 (found 12)"),
        ({"workers": 2, "pipeline": 3}, "a multiple of 3, such as 3 (found 2)"),
        ({"tensor": 2, "min_workers": 3}, "min_workers: a replica has 2 workers"),
        ({"tensor": "1,2"}, "tensor: one number, or one for each of the 1 stage(s) of the pipeline (found 2)"),
        ({"tensor": "1,2", "pipeline": 3}, "--pipeline 2 makes as many stages"),
        ({"tensor": ""}, "tensor.0"),
        ({"tensor": 0}, "tensor.0"),
        ({"tensor": []}, "tensor"),
        ({"tensor": True}, "true or false makes no sense here"),
        ({"schedule": "gpipe"}, "gpipe needs a pipeline of 2 stages or more"),
        ({"schedule": "zigzag", "pipeline": 2}, "'gpipe', '1f1b' or 'interleaved'"),
        ({"pipeline": 2, "interleave": 3}, "interleave: belongs to schedule interleaved (found 1f1b)"),
        ({"tensor": 2, "settings": {"fetch_ahead": True}}, "fetch_ahead belongs to replicas of one worker each"),
    ],
)
def test_what_cannot_be_is_told_with_what_to_do(fields: dict[str, Any], words: str) -> None:
    assert words in problems(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "async", "settings": {"n_push": 2, "n_fetch": 3}},
        {"mode": "ssp:2", "replication": 2},
        {"mode": "sync", "microbatches": 3, "min_workers": 6},
    ],
)
def test_replicas_of_several_go_with_every_mode(fields: dict[str, Any]) -> None:
    assert job_spec(**GOOD, tensor=2, pipeline=3, **fields).replicas == 2


def test_a_job_file_says_it_too(tmp_path: Path) -> None:
    spec = job_spec(**GOOD, tensor="1,2", pipeline=2, schedule="gpipe", microbatches=8)
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.toml"
    path.write_text(to_toml(spec))
    assert job_spec(**load(str(path))).widths == (1, 2)
    path.write_text('script = "train.py"\nname = "a"\ntensor = 2\npipeline = 2\n')
    submitted, _ = describe(str(path), {"shards": 1, "tensor": None})
    assert (submitted.workers, submitted.ranks) == (4, 4), "one replica, unless told otherwise"


@pytest.mark.parametrize(("given", "count"), [((None, None), 1), (("2", 3), 6), (("x", 2), 1), (((1, 2), 2), 3)])
def test_what_is_given_may_be_nonsense(given: tuple[Any, Any], count: int) -> None:
    assert ranks_given(*given) == count


def test_as_many_workers_as_there_are_cores_in_whole_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    for cores, tensor, pipeline, expected in (
        (7, "2", None, 6),
        (7, "1,2", 2, 6),
        (2, "4", None, 4),
        (5, None, None, 5),
    ):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: range(cores))
        found = _resolved(script, monkeypatch, workers="auto", tensor=tensor, pipeline=pipeline)
        assert found.spec.workers == expected
    assert [multiple_of_ranks(n, 4) for n in (1, 4, 7, 8)] == [4, 4, 4, 8]


def test_the_command_lines_words_reach_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    wishes = {"pipeline": 2, "schedule": "interleaved", "microbatches": 6, "interleave": 4}
    spec = _resolved(script, monkeypatch, workers="2", **wishes).spec
    assert {name: getattr(spec, name) for name in wishes} == wishes


# ---------------------------------------------------------------- what processes are told


def context(slot: int, **fields: Any) -> tuple[WorkerContext, dict[str, str]]:
    _, environment = launch.worker_process(
        job_spec(**{**GOOD, **fields}), "job", "ipc://c", slot, launch.Place(environment={"A": "b"})
    )
    found = from_environment({VARIABLE: environment[VARIABLE]})
    assert found is not None
    return found, environment


def test_a_worker_knows_its_place() -> None:
    told, environment = context(7, tensor="1,2", pipeline=2, schedule="gpipe", microbatches=5)
    assert (told.widths, told.ranks, told.replica, told.rank, told.parts) == ((1, 2), 3, 2, 1, 5)
    assert (told.place.stage, told.place.tensor_rank) == (1, 0)
    assert (told.schedule, told.interleave, told.in_place) == ("gpipe", 2, False)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_who_is_alone_is_told_nothing_new() -> None:
    told, environment = context(7)
    assert (told.ranks, told.rank, told.replica, told.parts, told.in_place) == (1, 0, 7, 1, True)
    assert "GLOO_SOCKET_IFNAME" not in environment
    old = {k: v for k, v in json.loads(environment[VARIABLE]).items() if k not in ("widths", "schedule")}
    assert from_environment({VARIABLE: json.dumps(old)}) == told


def test_a_user_may_choose_the_interface_and_the_parts() -> None:
    told, environment = context(0, pipeline=3, env={"GLOO_SOCKET_IFNAME": "eth1"})
    assert (told.parts, environment["GLOO_SOCKET_IFNAME"]) == (6, "eth1")


# ---------------------------------------------------------------- places


def test_a_replicas_workers_are_on_one_node() -> None:
    found = place_gang(spec_of(6, tensor=3), [servers("s"), workers("a", 4), workers("b", 4)], 6, 6)
    assert nodes(found, "worker") == ["a"] * 3 + ["b"] * 3


def test_a_job_whose_replicas_fit_on_no_node_says_so() -> None:
    spec = spec_of(6, tensor=3)
    found = place_gang(spec, [servers("s"), *(workers(name, 2) for name in "abc")], 6, 6)
    assert found == "6 of 6 worker slots are missing; the 3 workers of a replica need a node with as many free"


def test_an_elastic_job_takes_whole_replicas() -> None:
    found = place_gang(spec_of(6, tensor=2, min_workers=2), [servers("s"), workers("a", 3), workers("b", 3)], 2, 6)
    assert Counter(nodes(found, "worker")) == {"a": 2, "b": 2}


@pytest.mark.parametrize(("device", "expected"), [("auto", [0, 1, -1, -1]), ("cpu", [-1] * 4)])
def test_all_workers_of_a_replica_have_gpus_or_none(device: str, expected: list[int]) -> None:
    found = place_gang(spec_of(4, tensor=2, device=device), [servers("s"), workers("a", 4, gpus=[0, 1, 2])], 4, 4)
    assert not isinstance(found, str)
    assert [place.gpu for (role, _), place in found.items() if role == "worker"] == expected
    wants = place_gang(spec_of(4, tensor=2, device="cuda"), [servers("s"), workers("a", 4, gpus=[0, 1, 2])], 4, 4)
    assert isinstance(wants, str)
    assert wants.startswith("2 of 4 worker slots with a GPU are missing")


def test_in_a_cluster_a_replica_moves_as_one() -> None:
    hosts = Hosts()
    hosts.add("s1", "server")
    for name in ("w1", "w2"):
        hosts.add(name, slots=3)
    record = hosts.submit(workers=4, tensor=2, restarts=1)
    hosts.join(record)
    at = {p.index: p.node for p in record.life.roster.workers()}
    assert at == {0: "w1", 1: "w1", 2: "w2", 3: "w2"}
    hosts.add("w3", slots=3)
    hosts.do(hosts.cluster.drain("w1", False, hosts.now_s))
    hosts.wait(3.0)
    for key in list(hosts.agents["w1"].processes):
        hosts.agents["w1"].end(*key, 143)
    hosts.wait(2.0)
    after = [record.life.processes["worker", slot] for slot in (0, 1)]
    assert [(p.node, p.epoch) for p in after] == [("w3", 1)] * 2
    document = job_document(hosts.cluster, record, hosts.now_s)
    assert (document["replicas"], document["ranks"]) == (2, 2)
    parts = [p["part"] for p in document["processes"] if p["role"] == "worker"]
    assert parts[:2] == ["replica 0, rank 0", "replica 0, rank 1"]
    lines = job_details(job_status(document))
    assert any(line.endswith("of 4, in 2 replicas of 2") for line in lines)


# ---------------------------------------------------------------- words


def test_words() -> None:
    assert [counted(*n) for n in ((1, 1), (4, 1), (4, 2), (2, 2))] == [
        "1 worker",
        "4 workers",
        "4 workers in 2 replicas of 2",
        "2 workers in 1 replica of 2",
    ]
    assert titled("worker", 3, 2) == "worker/3 (replica 1, rank 1)"
    assert (titled("worker", 3, 1), titled("server", 3, 2)) == ("worker/3", "server/3")


def test_a_failure_names_the_rank() -> None:
    there = World(4, tensor=2).start()
    there.fails(3)
    assert there.life.failure is not None
    document = there.life.failure.document()
    shown = job_status({"failure": document}).failure
    assert shown is not None
    assert shown.who == there.life.failure.who == "worker/3 (replica 1, rank 1)"


def test_a_budget_belongs_to_layers_or_to_a_pipeline() -> None:
    given = {"name": "job", "script": "train.py", "workers": 2, "shards": 1, "settings": {"memory": "64MiB"}}
    assert job_spec(**given, pipeline=2).settings.memory == 64 << 20
    with pytest.raises(ConfigError, match="belongs to fetch=layers, or to a pipeline"):
        job_spec(**given)
