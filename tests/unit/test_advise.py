"""downpour advise: each rule with figures that make it speak and others that do not; where it looks; what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from coordinator_kit import spec_of
from job_kit import Line, job_document, line_to
from trace_kit import pipeline
from typer.testing import CliRunner

from downpour.jobs.client import ClusterClient
from downpour_common.config import to_toml
from downpour_deploy.advise import register
from downpour_deploy.advise.advice import Advice, setting, to
from downpour_deploy.advise.facts import Facts, facts_of, losses_in, measured_last, read_rows
from downpour_deploy.advise.rules import RULES, advise, rough
from downpour_deploy.advise.rules_noise import samples_for
from downpour_deploy.advise.rules_staleness import unsteady
from downpour_deploy.jobs import named

FALLING = tuple(2.0 * 0.97**at for at in range(200))
RISING = (*FALLING[:100], *(0.5 * 1.02**at for at in range(100)))
SPEC = {"workers", "shards", "mode", "settings", "compress", "target", "tensor"}


def worker(wait_share: float, throughput: float = 100.0) -> dict[str, Any]:
    return {"throughput": throughput, "wait_share": wait_share, "staleness": {"mean": 1.0}}


def server(busy: float | None) -> dict[str, Any]:
    return {"busy": busy, "bytes": 1000, "refused": 0}


def facts(losses: tuple[float, ...] = FALLING, **fields: Any) -> Facts:
    """A run of four workers that gives no reason to complain, but for ``fields`` of its description and its figures."""
    spec = spec_of(**{"workers": 4, **{k: v for k, v in fields.items() if k in SPEC}})
    figures = {
        "job": "digits",
        "state": "SUCCEEDED",
        "steps": 1000,
        "samples": 128_000,
        "train_s": 100.0,
        "throughput": 1280.0,
        "wait_share": 0.05,
        "bytes": 10_000_000,
        "pushes": 4000,
        "batch": 32.0,
        "batch_total": 128.0,
        "noise_scale": 200.0,
        "unmeasured": "",
        "efficiency": 0.71,
        "goodput": 900.0,
        "staleness": {"mean": 1.5, "p50": 1, "p99": 4, "max": 9},
        "by_worker": {f"worker/{slot}": worker(0.05) for slot in range(4)},
        "by_server": {"server/0": server(0.2)},
        **{k: v for k, v in fields.items() if k not in SPEC and k not in ("shares", "sent")},
    }
    rows = [{"loss": loss, "worker": 0} for loss in losses]
    return facts_of(spec, figures, rows, fields.get("shares"), sent=fields.get("sent", True))


def waiting(share: float, slow: float | None = None, workers: int = 4) -> dict[str, Any]:
    """Workers that wait, but for worker/0 if ``slow``."""
    shares = [share if slow is None or slot else slow for slot in range(workers)]
    return {"wait_share": sum(shares) / workers, "by_worker": {f"worker/{s}": worker(w) for s, w in enumerate(shares)}}


NOISY = {"efficiency": 0.3, "noise_scale": 10.0}
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("not-finite", {"non_finite": {"worker/1": 3}}, ("--set clip=1.0",)),
    ("not-finite", {"non_finite": {"worker/1": 3}, "settings": {"clip": 4.0}}, ("--set clip=2.0",)),
    ("diverges", {"losses": RISING, "mode": "sync"}, ("--set clip=1.0",)),
    ("pushes-lost", {"lost_pushes": 12}, ("--replication 2", "--set checkpoint_s=10")),
    (
        "stale-and-unsteady",
        {"losses": RISING, "staleness": {"mean": 9.0}},
        ("--set compensation=stale-lr", "--set compensation=dc-adaptive:2", "--mode ssp:3", "-w 2"),
    ),
    (
        "stale-and-unsteady",
        {"losses": RISING, "staleness": {"mean": 9.0}, "mode": "ssp:9", "settings": {"compensation": "gap"}},
        ("-w 2",),
    ),
    ("own-delays", {"losses": RISING, "staleness": {"mean": 9.0}, "settings": {"n_fetch": 8}}, ("--set n_fetch=4",)),
    ("late-rounds", {"mode": "sync,backup=1", "late": {"worker/3": 990}}, ("--mode ssp:3", "--mode sync")),
    (
        "straggler",
        {"mode": "sync", **waiting(0.5, slow=0.02)},
        ("--mode sync,backup=1", "--mode ssp:4", "--mode async"),
    ),
    ("straggler", {"mode": "sync", "workers": 2, **waiting(0.5, 0.0, 2)}, ("--mode ssp:4", "--mode async")),
    ("straggler", {"mode": "ssp:3", **waiting(0.5, slow=0.0)}, ("--mode ssp:6", "--mode async")),
    ("rounds-wait", {"mode": "sync", **waiting(0.4)}, ("--mode ssp:3", "--mode async", "--mode average:8")),
    ("bound-too-tight", {"mode": "ssp:3", "clock_gap_max": 4, **waiting(0.4)}, ("--mode ssp:6", "--mode async")),
    (
        "short-steps",
        {"steps": 50_000, **waiting(0.4)},
        ("--set n_push=5 --set n_fetch=5", "--mode average:8"),
    ),
    ("local-steps", {"mode": "diloco:8,lr=0.5", **waiting(0.4)}, ("--mode diloco:16,lr=0.5",)),
    ("local-steps", {"mode": "average:50", "wait_share": 0.001}, ("--mode average:25",)),
    ("loading", {"shares": {"forward": 0.2, "backward": 0.3}}, ()),
    (
        "much-traffic",
        {"bytes": 20_000_000_000, **waiting(0.4)},
        (
            "--compress push=bf16,pull=bf16",
            "--compress push=topk:0.01,pull=bf16",
            "--mode diloco:50",
            "--set n_push=5 --set n_fetch=5",
        ),
    ),
    (
        "much-traffic",
        {"bytes": 20_000_000_000, "compress": "pull=bf16", **waiting(0.4)},
        ("--compress push=bf16,pull=bf16",),
    ),
    ("saturated", {"by_server": {"server/0": server(0.95)}, **waiting(0.4)}, ("-s 2",)),
    (
        "uneven-shards",
        {"shards": 3, "by_server": {f"server/{i}": server(0.9 if i == 1 else 0.2) for i in range(3)}, **waiting(0.2)},
        ("-s 2",),
    ),
    ("more-pays", {"noise_scale": 2000.0, "efficiency": 0.95}, ("-w 16",)),
    ("less-is-enough", NOISY, ("-w 1",)),
    ("only-noise", {"noise_scale": None, "efficiency": None, "unmeasured": "too large for what a batch shows"}, ()),
    ("not-counted", {"noise_scale": None, "efficiency": None, "unmeasured": "samples are not counted; …"}, ()),
]


def of_rule(found: list[Advice], rule: str) -> Advice:
    [advice] = [each for each in found if each.rule == rule]
    return advice


@pytest.mark.parametrize(("rule", "fields", "options"), CASES, ids=[f"{at}-{case[0]}" for at, case in enumerate(CASES)])
def test_each_rule_names_its_figures_and_what_the_job_can_take(
    rule: str, fields: dict[str, Any], options: tuple[str, ...]
) -> None:
    run = facts(**fields)
    found = of_rule(advise(run), rule)
    typed = [change.options for change in found.changes]
    assert set(options) <= set(typed)
    assert typed[:1] == list(options[:1])
    assert all(change.suits(run.spec) for change in found.changes)
    assert found.figures
    assert any(character.isdigit() for character in found.why) or rule in ("only-noise", "not-counted")
    json.dumps(found.document())


def test_every_rule_is_tried_above() -> None:
    assert {rule.__name__.replace("_", "-") for rule in RULES} == {case[0] for case in CASES}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": "sync"},
        {"mode": "ssp:3", "clock_gap_max": 4},
        {"mode": "sync,backup=1", "late": {"worker/0": 40}},
        {"mode": "average:4", "wait_share": 0.1, "noise_scale": None, "efficiency": None},
        {"mode": "sync", **waiting(0.4, workers=1), "workers": 1, "efficiency": 1.0},
        {"sent": False, "bytes": 20_000_000_000},
        {"staleness": {"mean": 9.0}},
        {"shares": {"forward": 0.5, "backward": 0.4}},
        {"by_server": {"server/0": server(None)}, **waiting(0.2)},
        {"by_server": {"server/0": server(0.95)}},
    ],
    ids=repr,
)
def test_what_gives_no_reason_to_change_anything_is_left_alone(fields: dict[str, Any]) -> None:
    assert advise(facts(**fields)) == []


def test_the_weightiest_comes_first() -> None:
    found = advise(facts(non_finite={"worker/0": 1}, lost_pushes=1, **NOISY))
    assert [each.rule for each in found] == ["not-finite", "less-is-enough", "pushes-lost"]


def test_changes_that_the_job_cannot_take_are_not_recommended() -> None:
    run = facts(mode="sync")
    unusable = Advice("x", "do", "since", {"a": 1}, 1.0, (setting(compensation="gap"), to(workers=0)))
    assert unusable.for_job(run.spec) is None
    partly = Advice("x", "do", "since", {"a": 1}, 1.0, (setting(compensation="gap"), to(workers=8), to(workers=4)))
    usable = partly.for_job(run.spec)
    assert usable is not None
    assert [change.options for change in usable.changes] == ["-w 8"]
    assert to(mode="sync;1=async").options == "--mode 'sync;1=async'"


def test_workers_are_counted_in_replicas() -> None:
    found = of_rule(advise(facts(tensor="2", workers=8, noise_scale=2000.0, efficiency=0.95)), "more-pays")
    assert found.changes[0].fields == {"workers": 32}


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (FALLING, ""),
        (RISING, "has risen"),
        ((1.0,) * 100, ""),
        ((1.0, float("nan")), "not finite"),
        ((1.0, 2.0, 4.0), ""),
        (tuple(1.0 if at % 2 else 9.0 for at in range(200)), "spreads"),
        ((*FALLING, 0.006), ""),
    ],
    ids=range(7),
)
def test_losses_that_trouble(losses: tuple[float, ...], words: str) -> None:
    assert words in unsteady(losses) if words else unsteady(losses) == ""


def test_how_many_samples_keep_an_efficiency() -> None:
    most = samples_for(0.7, 200.0, 32.0)
    assert (200.0 + 32.0) / (200.0 + most) == pytest.approx(0.7)


def test_figures_of_the_start_are_called_rough() -> None:
    assert rough(facts()) == ""
    assert "only 12 steps" in rough(facts(steps=12))
    assert "nothing has been trained" in rough(facts(steps=0))


# ---------------------------------------------------------------- what it reads


def test_rows_are_read_leniently() -> None:
    lines = ['{"loss": 1.0, "worker": 0}', "{torn", "3", '{"chaos": "x"}', '{"loss": "nan"}']
    lines += ['{"measures": {"throughput": 5.0}, "clock": 3}']
    rows = read_rows(lines)
    assert len(rows) == 4
    assert str(losses_in(rows)) == "(1.0, nan)"
    assert measured_last(rows) == {"measures": {"throughput": 5.0}, "clock": 3, "throughput": 5.0}
    assert (measured_last([]), losses_in([])) == ({}, ())


def test_documents_of_other_versions_do_no_harm() -> None:
    odd = {"staleness": 3, "by_worker": [1], "by_server": {"server/0": 5}, "late": 7, "target": "x", "wait_share": "x"}
    assert advise(facts_of(spec_of(), odd)) == []


APP = typer.Typer()
register(APP)
JOB = "digits-3f2a9c"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run that waits, and is traced."""
    monkeypatch.chdir(tmp_path)
    for name in ("DOWNPOUR_COORDINATOR", "DOWNPOUR_KEYS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "job.toml").write_text(to_toml(spec_of(mode="sync", workers=4)), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary()), encoding="utf-8")
    rows = [{"loss": loss, "worker": 0, "clock": at} for at, loss in enumerate(FALLING)]
    rows.append({"measures": {"throughput": 99.0, "wait_share": 0.5}, "clock": 80, "samples": 9, "train_s": 60.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "spans.jsonl").write_text("\n".join(pipeline("1f1b", 3, 4, steps=8)) + "\n", encoding="utf-8")
    return folder


def summary() -> dict[str, Any]:
    return {
        "job": "digits",
        "state": "SUCCEEDED",
        "steps": 1000,
        "train_s": 50.0,
        "throughput": 1280.0,
        "batch": 32.0,
        "batch_total": 128.0,
        "noise_scale": 200.0,
        "efficiency": 0.7073,
        "goodput": 905.0,
        "staleness": {"mean": 0.0, "p50": 0, "p99": 0, "max": 0},
        **waiting(0.4),
    }


def command(*arguments: object) -> Any:
    return CliRunner().invoke(APP, list(map(str, arguments)), catch_exceptions=False)


def test_a_run_directory_is_judged_by_its_summary(run: Path) -> None:
    done = command(run)
    assert done.exit_code == 0, done.output
    assert "noise scale  200 samples" in done.stdout
    assert "Exchange without waiting for all" in done.stdout
    assert "Workers wait 40% of their time for the round, 50.0 ms a step" in done.stdout
    assert "   try: --mode ssp:3\n   or:  --mode async\n   or:  --mode average:8" in done.stdout
    document = json.loads(command(run, "--json").stdout)
    assert (document["throughput"], document["note"]) == (1280.0, "")
    advice = next(each for each in document["advice"] if each["rule"] == "rounds-wait")
    assert advice["figures"]["wait_share"] == 0.4
    assert advice["changes"][0] == {"options": "--mode ssp:3", "fields": {"mode": "ssp:3"}}


def test_without_a_summary_the_newest_row_counts(run: Path) -> None:
    (run / "summary.json").unlink()
    document = json.loads(command(run, "--json").stdout)
    assert (document["throughput"], document["steps"], document["train_s"]) == (99.0, 80, 60.0)


def test_nothing_stands_out(run: Path) -> None:
    (run / "spans.jsonl").unlink()
    (run / "summary.json").write_text(json.dumps({**summary(), **waiting(0.05)}), encoding="utf-8")
    done = command(run)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "Nothing to change: no figure stands out.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "has no job.toml"),
        ("started", "nothing was measured"),
        ("job.toml", "is a file"),
        ("gone/x", "no such"),
    ],
)
def test_where_there_is_nothing_to_go_by(run: Path, name: str, words: str) -> None:
    for folder in ("empty", "started"):
        (run.parent / folder).mkdir()
    text = (run / "job.toml").read_text(encoding="utf-8")
    (run.parent / "started" / "job.toml").write_text(text, encoding="utf-8")
    (run.parent / "job.toml").write_text(text, encoding="utf-8")
    done = command(name)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.fixture
def cluster(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A cluster that has the run as its job."""
    spec = spec_of(mode="sync", workers=4).model_dump(mode="json")
    line = line_to(job_document(JOB, "SUCCEEDED", spec=spec, result=summary()))
    line.coordinator.files = {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}

    def client(join: str | None, keys: str | None, security: str | None, timeout_s: float) -> ClusterClient:
        return line.client(timeout_s)

    monkeypatch.setattr(named, "ClusterClient", client)
    yield line
    assert line.opened == line.closed


def test_a_job_of_a_cluster_is_judged_alike(cluster: Line) -> None:
    done = command(JOB, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["job"], document["state"], document["throughput"]) == (JOB, "SUCCEEDED", 1280.0)
    assert [each["rule"] for each in document["advice"]] == ["rounds-wait"]


def test_a_job_that_has_just_begun_has_nothing_to_tell(cluster: Line) -> None:
    cluster.coordinator.files.clear()
    cluster.coordinator.jobs[JOB] |= {"result": None, "state": "RUNNING"}
    done = command(JOB)
    assert done.exit_code == 2
    assert "nothing was measured there yet" in done.stderr
