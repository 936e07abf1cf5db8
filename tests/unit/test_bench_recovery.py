"""What the recovery benchmark makes of the times that workers have noted."""

from __future__ import annotations

import json
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def trace(slot: int, joined_s: float, *steps_s: float, pid: int = 1) -> Any:
    from bench_lib.recovery import Trace

    return Trace(slot, pid, joined_s, list(steps_s))


def test_a_gap_ends_after_the_kill_however_much_was_answered_before() -> None:
    from bench_lib.recovery import longest_gap

    assert longest_gap([0.0, 5.0, 6.0, 7.1, 9.1, 9.5], kill_s=7.0) == (pytest.approx(2.0), 9.1)
    assert longest_gap([0.0, 1.0, 1.5], kill_s=0.5) == (1.0, 1.0), "what began before it counts"
    with pytest.raises(ValueError, match="no step"):
        longest_gap([0.0, 1.0], kill_s=1.0)


def test_a_shard_s_recovery_is_that_of_the_worker_that_waits_longest() -> None:
    from bench_lib.recovery import evaluate

    traces = [trace(0, 0.0, 1.0, 2.0, 3.0, 5.0, 6.0), trace(1, 0.0, 1.1, 2.1, 3.1, 5.6, 6.0)]
    found = evaluate(traces, 3.05, None, 0.0, commit_s=1.05)
    assert (found.gap_s, found.back_s) == (pytest.approx(2.5), pytest.approx(2.55))
    assert (found.joined_s, found.trains_s, found.during_s) == (None, None, [])
    assert found.checkpoint_age_s == pytest.approx(2.0)
    assert found.steps_since == 4, "1.1, 2.0, 2.1 and 3.0"


def test_a_job_that_begins_again_is_seen_by_slots() -> None:
    from bench_lib.recovery import evaluate

    traces = [trace(0, 0.0, 1.0, 2.0), trace(1, 0.0, 1.0, 2.0), trace(0, 4.0, 5.0, 5.5), trace(1, 4.1, 5.1, 5.5)]
    found = evaluate(traces, 2.5, None, 0.0, 0.0)
    assert (found.gap_s, found.back_s) == (pytest.approx(3.1), pytest.approx(2.6))


def test_a_worker_s_death_is_compared_with_the_time_before() -> None:
    from bench_lib.recovery import evaluate

    other = [0.5, 10.0, 11.0, 12.0, 12.5, 13.0, 13.5, 14.0, 20.0]
    traces = [trace(0, 0.0, 11.9, 12.1), trace(1, 0.0, *other), trace(0, 13.0, 13.6, 14.0)]
    found = evaluate(traces, 12.2, 0, since_s=9.0, commit_s=0.0)
    assert (found.joined_s, found.trains_s) == (pytest.approx(0.8), pytest.approx(1.4))
    assert found.before_s == [9.5, 1.0, 1.0]
    assert found.during_s == [0.5, 0.5, 0.5]
    assert evaluate(traces, 12.2, 0, since_s=10.5, commit_s=0.0).before_s == [1.0, 1.0]
    with pytest.raises(ValueError, match="worker/1 has not been replaced"):
        evaluate(traces, 12.2, 1, 0.0, 0.0)


def test_shares() -> None:
    from bench_lib.recovery import share

    values = [float(n) for n in range(100, 0, -1)]
    assert [share(values, part) for part in (0.01, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert share([3.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="no values"):
        share([], 0.5)


def test_a_cost_is_the_median_of_the_pairs() -> None:
    from bench_lib.recovery import paired

    found = paired([1.0, 2.0, 4.0], [1.1, 2.0, 4.8])
    assert found["ratio"] == pytest.approx(1.1)
    assert (found["without_s"], found["with_s"]) == (2.0, 2.0)
    assert found["ratios"] == pytest.approx([1.1, 1.0, 1.2])
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_a_summary_and_its_table() -> None:
    from bench_lib.markdown import recovery
    from bench_lib.recovery import CASES, evaluate, summary
    from bench_lib.recovery_report import show
    from bench_lib.report import console

    by_name = {case.name: case for case in CASES}
    other = [float(n) / 10 for n in range(100)]
    traces = [trace(0, 0.0, 1.0, 2.0), trace(1, 0.0, *other), trace(0, 4.0, 5.0, 9.0)]
    document = {"lost_pushes": 7, "restarts": 1}
    died = summary(by_name["worker-async-digits"], [evaluate(traces, 2.05, 0, 0.0, 0.0)], [document], [0.2])
    assert died["steps_ratio_to_control"] == {"p50": pytest.approx(0.5), "p99": pytest.approx(0.5)}
    assert died["steps_ratio"] == {"p50": pytest.approx(1.0), "p99": pytest.approx(1.0)}
    assert died["trains_s"] == pytest.approx(2.95)
    shard = summary(by_name["shard-async-digits"], [evaluate(traces, 2.05, None, 0.0, 1.0)] * 2, [document, document])
    assert (shard["lost_pushes"], shard["kills"], len(shard["checkpoint_age_s"])) == (14, 2, 2)
    assert "trains_s" not in shard
    assert "steps_ratio" not in summary(
        by_name["worker-sync-digits"], [evaluate(traces, 2.05, 0, 0.0, 0.0)], [document]
    )
    machine = {"cpu_model": "Abacus", "cores": 2, "torch": "2.13.0", "libzmq": "4.3.5"}
    cost = {"what": "replication", "mode": "sync", "model": "digits", "without_s": 0.002, "with_s": 0.003}
    results = {
        "recoveries": {row["case"]: row for row in (died, shard)},
        "costs": {"replication-sync-digits": {**cost, "ratio": 1.5, "ratios": [1.4, 1.6]}},
    }
    lines = recovery(
        {"date": "2026-11-21T12:00:00+00:00", "machine": machine, "failed": {"leader-sync-digits": "?"}, **results}
    )
    assert "| a worker, `async`, the digits MLP, Adam | 0.10 s | 0.10 s | 3.0 s | 100.0 → 100.0 ms | 7 |" in lines
    assert "| `--replication 2`, `sync`, the digits MLP, Adam | 2.00 ms | 3.00 ms | 1.50 |" in lines
    assert lines[-1] == "Without a result: leader-sync-digits."
    show(results, console())


def test_other_results_stay_in_the_file(tmp_path: Path) -> None:
    import recovery
    from bench_lib import machine

    path, facts = tmp_path / "recovery.json", machine.look()
    one, two = {"leader-sync-digits": {"gap_s": 1.0}}, {"shard-sync-digits": {"gap_s": 2.0}}
    recovery._write(path, facts, {"recoveries": one, "costs": {}}, {"shard-sync-digits": "it fell over"})
    recovery._write(path, facts, {"recoveries": two, "costs": {}}, {})
    document = json.loads(path.read_text())
    assert list(document["recoveries"]) == ["shard-sync-digits", "leader-sync-digits"], "in the order of the cases"
    assert document["failed"] == {}


def test_times_are_read_while_they_are_written(tmp_path: Path) -> None:
    from bench_lib.recovery_job import _times

    path = tmp_path / "0-1"
    path.write_bytes(array("d", [1.0, 2.0, 3.0]).tobytes() + b"half")
    assert list(_times(path, 0)) == [1.0, 2.0, 3.0]
    assert list(_times(path, 0, 1)) == [1.0]
    assert list(_times(path, -2)) == [2.0, 3.0]
    assert list(_times(path, -9)) == [1.0, 2.0, 3.0]
    path.write_bytes(b"")
    assert list(_times(path, 0, 1)) == list(_times(path, -6)) == []


def test_names_are_unique() -> None:
    from bench_lib.recovery import NAMES, QUICK

    assert all(a < b for a, b in pairwise(sorted(NAMES)))
    assert set(QUICK) < set(NAMES)
