"""What the training benchmark makes of its samples, and how it looks at memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def section(turns_s: dict[str, list[float]], workload: str = "mlp25m-sgd") -> Any:
    from bench_lib import machine
    from bench_lib.runner import Outcome
    from bench_lib.training import WORKLOADS, trainers_for
    from bench_lib.training_results import conclude

    chosen = next(w for w in WORKLOADS if w.name == workload)
    return conclude(chosen, trainers_for(chosen), 3, machine.look(), Outcome(samples_s=turns_s))


def test_samples_per_second_count_all_workers_and_the_median_turn() -> None:
    found = section({"plain": [1.0, 2.0, 30.0], "ddp-gloo": [4.0, 4.0, 4.0]})
    plain, ddp = found.results
    assert plain.step_s == pytest.approx(0.2)
    assert plain.samples_per_s == pytest.approx(320)
    assert ddp.samples_per_s == pytest.approx(2 * 64 / 0.4)
    assert found.ratios["ddp-gloo"]["plain"] == pytest.approx(1.0)


@pytest.mark.parametrize(("ours_s", "passed"), [(2.0, True), (2.1, False)])
def test_an_aim_of_at_least(ours_s: float, passed: bool) -> None:
    found = section({"ddp-gloo": [3.0], "downpour-async-2": [ours_s]})
    (reached,) = found.aims
    assert (reached.measured, reached.passed) == (pytest.approx(3.0 / ours_s), passed)


@pytest.mark.parametrize(("ours_s", "passed"), [(1.09, True), (1.11, False)])
def test_an_aim_of_at_most(ours_s: float, passed: bool) -> None:
    found = section({"plain": [1.0], "downpour-1": [ours_s]})
    (reached,) = found.aims
    assert (reached.measured, reached.passed) == (pytest.approx(ours_s), passed)


def test_an_aim_in_milliseconds() -> None:
    found = section({"downpour-sync-2": [0.3]}, "digits-adam")
    (reached,) = found.aims
    assert (reached.measured, reached.passed) == (pytest.approx(1.0), True)


def test_sections_of_other_workloads_stay_in_the_file(tmp_path: Path) -> None:
    from bench_lib.training_results import write_json

    path = tmp_path / "training.json"
    write_json([section({"plain": [1.0]})], path)
    write_json([section({"plain": [1.0]}, "digits-adam")], path)
    write_json([section({"plain": [2.0]})], path)
    sections = json.loads(path.read_text())["sections"]
    assert set(sections) == {"mlp25m-sgd", "digits-adam"}
    assert sections["mlp25m-sgd"]["results"][0]["turns_s"] == [2.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["training.json"]


def test_every_aim_is_about_contenders_and_workloads_that_exist() -> None:
    from bench_lib.training import TRAINERS, WORKLOADS
    from bench_lib.training_results import AIMS

    names = {trainer.name for trainer in TRAINERS}
    assert {aim.contender for aim in AIMS} <= names
    assert {aim.reference for aim in AIMS} - {""} <= names
    assert {aim.workload for aim in AIMS} <= {workload.name for workload in WORKLOADS}


def test_a_peak_of_this_process() -> None:
    from bench_lib.peaks import Watch

    watch = Watch(lambda: [os.getpid()])
    watch.look(os.getpid())
    peak = watch.peaks[os.getpid()]
    assert 0 < peak.own <= peak.resident
    watch.look(2**30)  # no such process
    assert set(watch.peaks) == {os.getpid()}


def test_a_gate_refuses_a_value_that_is_not_finite(tmp_path: Path) -> None:
    from bench_lib.contender import ContenderError
    from bench_lib.gate import conclude

    report = {"begun_s": 1.0, "ended_s": 3.0, "value": 0.5}
    taken = conclude([report, {"begun_s": 1.5, "ended_s": 3.5, "value": 1.5}])
    assert (taken.seconds, taken.value) == (2.5, 1.0)
    with pytest.raises(ContenderError, match="nan"):
        conclude([{**report, "value": math.nan}])
