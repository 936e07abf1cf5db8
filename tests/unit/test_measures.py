"""Throughput, noise scale, efficiency, goodput, staleness and targets, as the coordinator adds them up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coordinator_kit import Job, World, spec_of, through_json

from downpour_common import messages as m
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.measures import unmeasured
from downpour_common.modes import parse_mode
from downpour_common.targets import Target, parse_target
from downpour_coordinator.effects import LogRow
from downpour_coordinator.measures import Measures, efficiency, measure, of_bins, quantiles, samples_together
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.recorder import EVERY_S
from downpour_coordinator.summary import forget_summary, write_summary
from downpour_coordinator.target import WINDOW, TargetWatch
from downpour_deploy.figures import measure_rows, target_text

# ---------------------------------------------------------------- formulas


def test_efficiency_is_that_of_pollux() -> None:
    assert efficiency(100.0, 32.0, 32.0) == 1.0
    assert efficiency(96.0, 32.0, 128.0) == pytest.approx(128 / 224)
    assert efficiency(0.0, 32.0, 128.0) == pytest.approx(0.25)
    assert efficiency(1e9, 32.0, 4096.0) == pytest.approx(1.0, abs=1e-4)
    assert efficiency(10.0, 32.0, 16.0) == 1.0


@pytest.mark.parametrize(
    ("mode", "together"),
    [("sync", 128.0), ("sync,backup=1", 96.0), ("async", 112.0), ("ssp:3", 112.0), ("sync;1=async", 128.0)],
)
def test_how_many_samples_an_update_stands_for(mode: str, together: float) -> None:
    assert samples_together(parse_mode(mode), 32.0, 4, 2.5) == together


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"mode": "sync"}, ""),
        ({"compress": "push=bf16,pull=topk:0.1"}, ""),
        ({"mode": "average:8"}, "weights, not gradients"),
        ({"mode": "lbfgs"}, "all data"),
        ({"settings": {"n_push": 5}}, "n_push"),
        ({"compress": "push=topk:0.01"}, "topk:0.01 distorts"),
    ],
    ids=repr,
)
def test_where_gradients_do_not_arrive_as_they_are_nothing_is_measured(fields: dict[str, Any], reason: str) -> None:
    assert reason in unmeasured(spec_of(**fields)) if reason else unmeasured(spec_of(**fields)) == ""


def test_quantiles_of_bins() -> None:
    assert quantiles({}) == {}
    assert quantiles({0: 98, 3: 1, 9: 1}) == {"p50": 0, "p99": 3, "max": 9}
    assert of_bins([7, 7, 2, 0, 0, 0, 1]) == {"mean": 2.333, "p50": 0, "p99": 7, "max": 7}
    assert of_bins([40, 6, 0, 0, 5, 5]) == {"mean": 4.0, "p50": 2, "p99": 4, "max": 6}


# ---------------------------------------------------------------- over shards, lives and workers


def measured(job: Job, train_s: float = 10.0, **fields: Any) -> Measures:
    return measure(job.state, spec_of(job.workers, job.shards, str(job.facts.mode), **fields), train_s)


def test_shards_are_summed_before_the_quotient_is_taken() -> None:
    job = Job(mode="sync").start()
    job.report(0, noise=[30.0, 1.0, 20])
    job.report(1, noise=[10.0, 0.25, 12])
    for slot in (0, 1):
        job.progress(slot, clock=10, samples=320)
    found = measured(job)
    assert (found.noise_scale, found.unmeasured) == (32.0, "")
    assert (found.batch, found.batch_total, found.throughput) == (32.0, 64.0, 64.0)
    assert found.efficiency == pytest.approx(64 / 96)
    assert found.goodput == pytest.approx(64 * 64 / 96)


@pytest.mark.parametrize(
    ("noise", "samples", "why"),
    [
        ([], 320, "too few"),
        ([0.0, 0.0, 0], 320, "too few"),
        ([1.0, 1.0, 9], 320, "too few"),
        ([1.0, -0.1, 50], 320, "too large"),
        ([1.0, 1.0, 50], 0, "samples are not counted"),
    ],
)
def test_what_is_not_known_is_said_and_not_invented(noise: list[float], samples: int, why: str) -> None:
    job = Job().start()
    for index in (0, 1):
        job.report(index, noise=noise)
    job.progress(0, clock=10, samples=samples)
    found = measured(job)
    assert (found.noise_scale, found.efficiency, found.goodput) == (None, None, None)
    assert why in found.unmeasured
    assert json.loads(json.dumps(found.document()))["noise_scale"] is None


def test_staleness_by_worker_outlives_shards_and_the_coordinator() -> None:
    job = Job().start()
    job.report(0, staleness={"0": 1, "3": 1}, slots={"0": [3, 3, 1, 0, 0, 1]})
    job.report(1, staleness={"1": 2}, slots={"1": [2, 1, 0, 2]})
    job.shard_dies(0)
    job.restarted()
    job.report(0, ready=True, staleness={"6": 1}, slots={"0": [6, 6, 0, 0, 0, 0, 1]})
    assert job.state.staleness_by_slot() == {0: [9, 6, 1, 0, 0, 1, 1], 1: [2, 1, 0, 2]}
    job.progress(0, clock=4, samples=8)
    job.progress(1, clock=4, samples=16)
    found = measured(job, 2.0)
    assert found.staleness == {"mean": 2.2, "p50": 1, "p99": 6, "max": 6}
    assert found.workers["worker/0"]["staleness"] == {"mean": 3.0, "p50": 4, "p99": 6, "max": 6}
    assert [worker["throughput"] for worker in found.workers.values()] == [4.0, 8.0]


def test_how_busy_shards_are() -> None:
    job = Job().start()
    job.report(0, cpu_s=2.5, up_s=10.0, bytes_in=100, bytes_out=50, refused=2)
    servers = measured(job).servers
    assert servers["server/0"] == {"busy": 0.25, "bytes": 150, "refused": 2}
    assert servers["server/1"]["busy"] is None


@pytest.mark.parametrize(
    "document",
    [
        {"slots": []},
        {"slots": {"x": [1, 1, 1]}},
        {"slots": {"0": 3}},
        {"slots": {"0": [1, 1]}},
        {"slots": {"0": [1, 1, -1]}},
        {"slots": {"0": [0] * 100}},
        {"noise": {}},
        {"noise": [1.0, 2.0]},
        {"noise": [1.0, float("nan"), 3]},
        {"noise": [True, 1.0, 3]},
        {"cpu_s": "1"},
        {"up_s": -1.0},
        {"bytes_in": -1},
    ],
    ids=repr,
)
def test_a_report_that_makes_no_sense_is_refused(document: dict[str, Any]) -> None:
    job = Job().start()
    with pytest.raises(ProtocolError):
        job.report(0, **document)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("loss=0.1", Target("loss", 0.1, False)),
        ("loss<=-2e-3", Target("loss", -0.002, False)),
        ("test_accuracy=+0.97", Target("test_accuracy", 0.97, True)),
        ("return >= 475", Target("return", 475.0, True)),
        ("val/accuracy<=0.5", Target("val/accuracy", 0.5, False)),
        ("x=+-1", None),
    ],
)
def test_targets(text: str, target: Target | None) -> None:
    if target is None:
        with pytest.raises(ConfigError, match="no number"):
            parse_target(text)
        return
    assert parse_target(text) == target == parse_target(str(target))
    assert spec_of(target=text).target == str(target)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("loss=low", "no number"),
        ("loss=nan", "no number"),
        ("test_accuracy=0.9", r"write test_accuracy=\+0.9 for at least"),
        ("mean-return=475", "means at most"),
    ],
)
def test_targets_that_say_too_little(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_of(target=text)


def test_a_target_is_reached_by_the_median_of_the_newest_values() -> None:
    watch = TargetWatch("loss=0.5")
    values = [1.0, 0.4, 0.9, 0.4, float("nan"), 0.4, 0.45, 0.4]
    reached = [watch.logged({"loss": v, "worker": 0}, 2, at, at, 32 * at) for at, v in enumerate(values)]
    assert reached == [False] * 5 + [True] + [False] * 2
    assert watch.reached == {"seconds": 5, "clock": 5, "samples": 160, "value": 0.4}
    assert watch.figures() == {"wanted": "loss<=0.5", "value": 0.4, "reached": watch.reached}
    assert not watch.trained()


def test_few_values_count_once_no_more_come() -> None:
    watch = TargetWatch("accuracy=+0.9")
    assert not watch.trained()
    assert not watch.logged({"accuracy": 0.95}, 2, 3.25, 40, 1280)
    again = TargetWatch("accuracy=+0.9")
    again.restore(through_json(watch.document()))
    assert again.reached is None
    assert again.trained()
    assert again.reached == {"seconds": 3.25, "clock": 40, "samples": 1280, "value": 0.95}
    assert not again.trained()


def test_with_many_workers_more_values_count() -> None:
    watch = TargetWatch("reward=+10.5")
    for at in range(2 * WINDOW):
        watch.logged({"reward": 9.0}, 2 * WINDOW, at, at, at)
    fresh = [watch.logged({"reward": 11.0}, 2 * WINDOW, 0, 0, 0) for _ in range(WINDOW + 1)]
    assert fresh == [False] * WINDOW + [True]
    assert TargetWatch("").figures() is None
    assert TargetWatch("loss=1").figures() == {"wanted": "loss<=1", "value": None, "reached": None}


# ---------------------------------------------------------------- a job's life


def rows_of(effects: list[Any]) -> list[dict[str, Any]]:
    return [effect.row for effect in effects if isinstance(effect, LogRow)]


def test_a_job_tells_its_measures_every_ten_seconds_and_at_its_end() -> None:
    world = World(mode="sync", target="accuracy=+0.9").start()
    life, began_s = world.life, world.now_s
    assert rows_of(life.tick(began_s + EVERY_S / 2)) == []
    world.progress(0, clock=10, samples=320)
    [row] = rows_of(life.tick(began_s + EVERY_S))
    assert row["measures"]["throughput"] == 32.0
    assert (row["clock"], row["samples"], row["train_s"]) == (10, 320, EVERY_S)
    assert rows_of(life.tick(began_s + EVERY_S + 1)) == []
    world.progress(0, clock=20, samples=960)
    [row] = rows_of(life.tick(began_s + 2 * EVERY_S))
    assert (row["measures"]["throughput"], row["samples"]) == (64.0, 960)
    life.handle(b"worker/0", m.LogMetrics(world.number(), *world.me(0), 15, {"accuracy": 0.95}), world.now_s)
    life.stop("INTERRUPTED", True, began_s + 2 * EVERY_S)
    [row, reached] = rows_of(life.tick(began_s + 2 * EVERY_S))
    assert row["measures"]["throughput"] == 48.0
    assert (reached["reached"], reached["clock"], reached["samples"]) == ("accuracy>=0.9", 15, 960)
    assert rows_of(life.tick(began_s + 2 * EVERY_S)) == []


def test_the_time_to_a_target_is_told_once_and_survives_the_coordinator() -> None:
    world = World(target="loss=0.5").start()
    world.progress(0, clock=7, samples=224)
    for _ in range(WINDOW - 1):
        world.life.handle(b"worker/0", m.LogMetrics(world.number(), *world.me(0), 6, {"loss": 0.25}), world.now_s)
    request = m.LogMetrics(world.number(), *world.me(0), 7, {"loss": 0.25, "note": "x"})
    at_s = world.now_s + 3.0
    began_s = world.life.first_step_s
    assert began_s is not None
    told = rows_of(world.life.handle(b"worker/0", request, at_s))
    reached = {"seconds": round(at_s - began_s, 3), "clock": 7, "samples": 224, "value": 0.25}
    assert told == [{"loss": 0.25, "worker": 0, "clock": 7}, {"reached": "loss<=0.5", **reached}]
    assert rows_of(world.life.handle(b"worker/0", request, at_s + 1)) == []  # a repeat
    world.restarted()
    outcome = outcome_of(world.life, "out", at_s)
    assert outcome.target == {"wanted": "loss<=0.5", "value": 0.25, "reached": reached}
    assert outcome.document()["target"]["reached"] == reached


def test_the_figures_are_told_to_people_and_left_in_the_folder(tmp_path: Path) -> None:
    world = World(mode="sync", target="loss=0.5").start()
    report = {"noise": [32.0, 1.0, 20], "staleness": {"0": 4}, "slots": {"0": [0, 0, 4]}, "cpu_s": 1.0, "up_s": 4.0}
    world.hear(("server", 0), m.ShardReport("job-1", 0, 0, {"ready": True, **report}))
    world.settle()
    world.progress(0, clock=10, samples=320)
    world.progress(1, clock=10, samples=320)
    document = outcome_of(world.life, "out", world.now_s + 10.0).document()
    rows = dict(measure_rows(document, by_worker=True))
    assert rows["noise scale"] == "32 samples"
    assert rows["efficiency"] == "66.7% of a lone worker's per sample (batches of 32 as one of 64)"
    assert rows["staleness"] == "mean 0, median 0, 99 % 0, largest 0 updates"
    assert rows["target"] == "loss<=0.5 not reached (no such value was logged)"
    assert rows["worker/0"].endswith("0% waiting, staleness mean 0, median 0, 99 % 0, largest 0")
    write_summary(str(tmp_path), document)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == through_json(document)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    forget_summary(str(tmp_path))
    forget_summary(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_target_in_words() -> None:
    reached = {"seconds": 1234.56, "clock": 4000, "samples": 128_000, "value": 0.1}
    assert target_text({"wanted": "loss<=0.1", "value": 0.1, "reached": reached}) == (
        "loss<=0.1 reached after 1,234.6 s, at clock 4,000, 128,000 samples"
    )
    assert target_text({"wanted": "loss<=0.1", "value": 0.3, "reached": None}) == "loss<=0.1 not reached (last 0.3)"
    assert target_text(None) == ""
