"""``downpour tune`` without processes: which batch sizes are tried, which is the knee, what is said."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from downpour.tuning import OUT_OF_MEMORY, Report, Trial, read_report, trial_asked_for, write_report
from downpour_common.errors import ConfigError
from downpour_deploy.main import app
from downpour_deploy.tune import register
from downpour_deploy.tune.attempt import Ended, ScriptError, judge
from downpour_deploy.tune.search import Row, Search, knee, row_of
from downpour_deploy.tune.show import conclusion, document, table

MIB = 1 << 20


def report(step_s: float, count: int, peak: int = 100, **fields: int) -> Report:
    found = Report("cpu", 16, step_s=[9 * step_s, step_s, step_s], step_samples=[count] * 3, baseline_bytes=50 * MIB)
    found.peak_bytes = peak * MIB
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def run(search: Search, speeds: dict[int, float], **fields: int) -> Search:
    """``speeds``: samples/s by batch size; the steps of size n take n MiB beyond 100."""
    while (size := search.next()) is not None:
        search.take(report(size / speeds[size], size, 100 + size, **fields))
    return search


def sizes(search: Search) -> list[int]:
    return [row.batch_size for row in search.rows]


def test_a_row_is_made_of_medians() -> None:
    row = row_of(8, report(0.5, 24))
    assert (row.samples_per_s, row.step_s, row.peak_bytes) == (48.0, 0.5, 100 * MIB)


def test_it_stops_when_two_doublings_bring_nothing() -> None:
    speeds = {8: 100.0, 16: 180.0, 32: 181.0, 64: 170.0, 128: 500.0}
    search = run(Search(8, 0, 0), speeds)
    assert sizes(search) == [8, 16, 32, 64]
    assert "2 doublings" in search.stopped
    assert search.knee is not None
    assert search.knee.batch_size == 16
    assert "take 16: 99% of the best throughput, which 32 has" in conclusion(search)


def test_one_doubling_without_gain_is_forgiven() -> None:
    speeds = {8: 100.0, 16: 90.0, 32: 300.0, 64: 305.0, 128: 305.0}
    assert sizes(run(Search(8, 0, 0), speeds)) == [8, 16, 32, 64, 128]


def test_it_stops_at_the_last_size_and_at_the_end_of_the_data() -> None:
    speeds = {4 << n: float(4 << n) for n in range(12)}
    assert sizes(run(Search(4, 20, 0), speeds)) == [4, 8, 16]
    search = run(Search(4, 0, 0), speeds, samples=40)
    assert sizes(search) == [4, 8, 16, 32]
    assert search.stopped == "the data set has 40 samples"


def test_it_stops_before_what_would_not_fit() -> None:
    speeds = {4 << n: float(4 << n) for n in range(12)}
    search = run(Search(4, 0, 200 * MIB), speeds)
    assert sizes(search) == [4, 8, 16, 32, 64], "128 would take 164 + 2 * 32"
    assert search.stopped == "128 would take about 228 MiB, and there are 200 MiB"
    shared = run(Search(4, 0, 0, share=2), speeds, capacity_bytes=460 * MIB)
    assert sizes(shared) == [4, 8, 16, 32, 64], "half of it, a little spared"
    alone = run(Search(4, 128, 0), speeds, capacity_bytes=460 * MIB)
    assert sizes(alone) == [4, 8, 16, 32, 64, 128]


def test_what_took_too_much_is_not_a_result() -> None:
    search = Search(8, 0, 90 * MIB)
    search.take(report(1.0, 8))
    assert search.next() is None
    assert search.rows == []
    assert search.stopped == "8 took 100 MiB, and there are 90 MiB"
    assert conclusion(search).startswith("nothing was measured")
    assert document(search, "a.py", 1)["knee"] is None


def test_the_knee_is_the_smallest_with_most_of_the_best() -> None:
    rows = [Row(n, speed, 1.0, 0, 0) for n, speed in ((1, 10.0), (2, 89.9), (4, 90.0), (8, 100.0), (16, 95.0))]
    assert knee(rows) is rows[2]
    assert knee([]) is None


def test_the_table_and_the_document() -> None:
    search = run(Search(8, 32, 0), {8: 50.0, 16: 75.0, 32: 100.0})
    out = io.StringIO()
    Console(file=out, width=100).print(table(search))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[1] == ["8", "50", "160.0", "108", "MiB", "58", "MiB", "1.00"]
    assert lines[2][-3:] == ["the", "script's", "own"]
    assert lines[3][-2:] == ["2.00", "knee"]
    found = document(search, "a.py", 2)
    assert (found["knee"], found["best"], found["workers"], found["own_batch_size"]) == (32, 32, 2, 16)
    assert found["rows"][1]["speed_up"] == 1.5
    assert "no smaller one has 90%" in conclusion(search)


# ---------------------------------------------------------------- what a run means


def test_a_run_that_was_measured() -> None:
    found = report(1.0, 8)
    assert judge(Ended(0, found, ""), "a.py", 9.0) is found
    found.problem = "the script ended before it had taken enough steps"
    assert judge(Ended(0, found, ""), "a.py", 9.0) is found, "some steps are better than none"


def test_runs_that_were_too_large() -> None:
    assert judge(Ended(1, Report(problem=OUT_OF_MEMORY), "…"), "a.py", 9.0) == OUT_OF_MEMORY
    assert judge(Ended(-signal.SIGKILL, None, ""), "a.py", 9.0) == OUT_OF_MEMORY
    assert (
        judge(Ended(0, Report(problem="the data set has 7 samples"), ""), "a.py", 9.0) == "the data set has 7 samples"
    )


@pytest.mark.parametrize(
    ("ended", "message", "code"),
    [
        (Ended(None, None, "x"), r"within 9 s.*--timeout", 1),
        (Ended(3, None, "x"), r"failed before downpour\.prepare", 3),
        (Ended(1, Report(problem="ValueError: no"), "x"), "a.py: ValueError: no", 1),
        (Ended(-signal.SIGSEGV, Report(), "x"), "a.py", 139),
        (Ended(0, None, "x"), r"without a call of downpour\.prepare", 1),
        (Ended(0, Report(), "x"), "never took a step", 1),
        (Ended(0, Report(steps=2), "x"), r"after 2 step\(s\), too few", 1),
    ],
)
def test_runs_that_say_nothing(ended: Ended, message: str, code: int) -> None:
    with pytest.raises(ScriptError, match=message) as caught:
        judge(ended, "a.py", 9.0)
    assert (caught.value.code, caught.value.output) == (code, "x")


def test_trial_and_report_travel(tmp_path: Path) -> None:
    trial = Trial(8, 2, 5, 0.5, str(tmp_path / "report"), "bfloat16", True)
    assert trial_asked_for(trial.to_environment()) == trial
    assert trial_asked_for({}) is None
    with pytest.raises(ConfigError, match="DOWNPOUR_TUNE"):
        trial_asked_for({"DOWNPOUR_TUNE": "[1]"})
    assert read_report(trial.report) is None
    write_report(trial.report, report(1.0, 8))
    assert read_report(trial.report) == report(1.0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py: no such file"),
        (["--from", "8", "--to", "4", __file__], "--to 4: less than --from"),
        (["--memory", "8G", __file__], "--memory '8G'"),
        (["--set", "n_push=2", __file__], "--set n_push: changes nothing here"),
        (["--set", "autocast=half", __file__], "--set autocast"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments: list[str], message: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        if not any(command.name == "tune" for command in app.registered_commands):
            register(app)
        result = CliRunner().invoke(app, ["tune", *arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 2
    assert message in result.output
