"""downpour trace and report: reading spans on one clock, utilisation of known timetables, shares of time, drawings."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from trace_kit import batch, lines, pipeline

from downpour_common.errors import ConfigError
from downpour_deploy.trace.chrome import document
from downpour_deploy.trace.lanes import draw
from downpour_deploy.trace.measure import measure, merged, own_time, theory, utilisation, window
from downpour_deploy.trace.picture import picture
from downpour_deploy.trace.read import Span, Trace, parse
from downpour_deploy.trace.show import as_document, remarks, text


def span(name: str, begin: int, end: int, thread: int = 0, step: int = 0, **facts: Any) -> Span:
    """A span of a process."""
    return Span(name, begin, end, thread, step, facts)


def read(*batches: dict[str, Any]) -> Trace:
    """Lines of these."""
    return parse(lines(*batches), "run/spans.jsonl")


# ---------------------------------------------------------------- utilisation


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (3, 8), (4, 4), (4, 8), (4, 16)])
def test_utilisation_of_equal_stages_is_that_of_theory(schedule: str, stages: int, microbatches: int) -> None:
    found = measure(parse(pipeline(schedule, stages, microbatches, steps=6), "run"))
    (replica,) = found.replicas
    assert replica.utilisation == pytest.approx(microbatches / (microbatches + stages - 1), abs=1e-12)
    assert replica.theory == pytest.approx(replica.utilisation, abs=1e-12)
    assert (replica.steps, replica.ranks, replica.schedule) == (4, stages, schedule)  # two to warm up


def test_interleaving_allows_more() -> None:
    assert theory(8, 4) == pytest.approx(8 / 11)
    assert theory(8, 4, 2) == pytest.approx(8 / 9.5)


def test_utilisation_counts_only_forward_and_backward_and_only_once() -> None:
    one = [span("forward", 0, 50), span("exchange", 10, 20), span("forward", 40, 60), span("push", 60, 300)]
    two = [span("wait", 0, 60), span("backward", 60, 100)]
    assert utilisation([one, two]) == pytest.approx((60 + 40) / 200)
    assert utilisation([[span("push", 0, 5)], []]) == 0.0


def test_a_step_that_a_rank_did_not_reach_does_not_count() -> None:
    whole = pipeline("gpipe", 2, 2, steps=3)
    cut = json.loads(whole[1])
    cut["spans"] = [row for row in cut["spans"] if row[4] < 2]
    found = measure(parse([whole[0], json.dumps(cut)], "run"))
    assert [r.steps for r in found.replicas] == [2]


def test_intervals_are_merged() -> None:
    assert merged([(5, 7), (0, 2), (2, 3), (6, 9)]) == [(0, 3), (5, 9)]


# ---------------------------------------------------------------- shares of time


def test_a_span_takes_its_time_from_the_one_around_it_but_not_from_other_threads() -> None:
    spans = [span("forward", 0, 100), span("exchange", 10, 30), span("send", 12, 15), span("receive", 0, 40, thread=1)]
    assert own_time(spans) == {"forward": 80, "exchange": 17, "send": 3, "receive": 40}


def test_shares_bytes_and_sizes_of_a_rank() -> None:
    rows = [["forward", 100, 50, 0, 0], ["send", 150, 10, 0, 0, {"bytes": 7}], ["receive", 160, 40, 0, 1, {"bytes": 9}]]
    later = batch(0, [], number=1, sizes={"weights": 4096, "peak_memory": 3 << 20}, moved={"pushed": 9000, "pulled": 1})
    (rank,) = measure(read(batch(0, rows), later)).ranks
    assert rank.shares == pytest.approx({"forward": 0.5, "send": 0.1, "receive": 0.4})
    assert (rank.between_ranks, rank.process.moved) == (16, {"pushed": 9000, "pulled": 1024})
    assert rank.process.sizes == {"weights": 4096, "peak_memory": 3 << 20}


# ---------------------------------------------------------------- reading


def test_hosts_are_put_on_the_coordinators_clock_by_their_best_measurement() -> None:
    rows = [["forward", 100, 5, 0, 0]]
    found = read(
        batch(0, rows, clock=[1_000, 50]),
        batch(1, rows, clock=[1_020, 4], born_ns=6),  # the same host, measured better
        batch(2, rows, host="other", clock=[5_000, 4]),
    )
    assert [p.spans[0].begin_ns for p in found.processes] == [0, 0, 3_980]
    assert found.unaligned == 0


def test_a_host_whose_clock_is_unknown_begins_with_the_trace() -> None:
    rows = [["forward", 100, 5, 0, 0], ["forward", 110, 5, 0, 0]]
    found = read(batch(0, rows), batch(1, rows, host="other", clock=None))
    assert [[s.begin_ns for s in p.spans] for p in found.processes] == [[0, 10], [0, 10]]
    assert remarks(found) == ["the clocks of 1 host are unknown; times there are only their own"]


def test_repeats_count_once_and_what_is_amiss_is_told() -> None:
    rows = [["forward", 100, 5, 0, 0]]
    first, third = batch(0, rows), batch(0, rows, number=2, dropped=3)
    damaged = [json.dumps(first)[:-9], "[]", "7", json.dumps(batch(0, [["forward", "a", 5, 0, 0]], number=3))]
    found = parse([*lines(first, first, third), *damaged], "run")
    assert [len(p.spans) for p in found.processes] == [2]
    assert remarks(found) == [
        "worker/0: 3 spans dropped, since they came faster than they could be sent",
        "worker/0: 1 line missing",
        "4 damaged lines skipped",
    ]


def test_a_run_that_was_resumed_has_other_processes_in_the_same_slots() -> None:
    rows = [["forward", 100, 5, 0, 0]]
    found = read(batch(0, rows), batch(0, [["forward", 900, 5, 0, 0]], born_ns=800))
    assert [p.spans[0].begin_ns for p in found.processes] == [0, 800]


@pytest.mark.parametrize(
    ("broken", "says"),
    [([], "not even one line"), (["x"], "only damaged lines"), (lines(batch(version=2)), "another version")],
)
def test_a_trace_without_spans_is_an_error(broken: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(broken, "run/spans.jsonl")


# ---------------------------------------------------------------- drawings


def test_the_swimlane_shows_a_pipeline() -> None:
    found = parse(pipeline("gpipe", 2, 2, steps=1), "run")
    name = "worker/0 replica 0 stage 0 rank 0"
    drawn = draw(window(found, None, 1), len(name) + 2 + 95)
    assert drawn[0] == "step 0, 9.5 ms: F forward, B backward, p push, · nothing"
    assert drawn[1] == f"{name}  {'F' * 20}{'·' * 30}{'B' * 40}{'p' * 5}"
    assert drawn[2][-95:] == f"{'·' * 10}{'F' * 20}{'B' * 40}{'·' * 20}{'p' * 5}"
    coloured = draw(window(found, None, 1), 80, coloured=True)[1]
    assert "\x1b[34mF\x1b[0m" in coloured


def test_a_step_that_is_not_there_is_an_error() -> None:
    found = parse(pipeline("gpipe", 2, 2, steps=3), "run")
    assert window(found, None, 1).title == "step 1"
    assert window(found, 0, 2).title == "steps 0 to 1"
    with pytest.raises(ConfigError, match="steps 0 to 2"):
        window(found, 9, 1)
    with pytest.raises(ConfigError, match="before its first step"):
        window(read(batch(0)), None, 1)


def test_a_worker_that_has_recorded_nothing_is_in_the_report() -> None:
    found = read(batch(0), batch(1, [["forward", 5, 5, 0, 0]]))
    assert [line.split()[0] for line in text(measured=measure(found)) if line.startswith("worker/0")] == [
        "worker/0"
    ] * 2


def test_the_picture_is_svg_with_every_span_and_marks_from_outside_are_escaped() -> None:
    found = parse([line.replace("digits", "<b>") for line in pipeline("1f1b", 2, 2, steps=1)], "run")
    measured, part = measure(found), window(found, None, 1)
    svg = picture(found, measured, part, html=False)
    root = ET.fromstring(svg.split("\n", 1)[1])
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert len(titles) == sum(len(p.spans) for p in found.processes)
    assert "forward, 1.000 ms, step 0, stage 0, microbatch 1" in titles
    page = picture(found, measured, part, html=True)
    assert page.startswith("<!doctype html>")
    assert "<b>" not in page
    assert "at best 66.7%" in page


def test_the_chrome_trace() -> None:
    place = {"replica": 1, "rank": 1, "ranks": 2, "stage": 1, "stages": 2}
    rows = [["forward", 2_000, 1_500, 0, 3, {"stage": 1, "microbatch": 2}], ["push", 5_000, 500, 1, 3]]
    found = document(read(batch(3, rows, place=place, epoch=1)))
    name = "worker/3 epoch 1 replica 1 stage 1 rank 1"
    assert found == {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": name}},
            {"ph": "M", "name": "process_sort_index", "pid": 1, "tid": 0, "args": {"sort_index": 1}},
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 0, "args": {"name": "training"}},
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "thread 1"}},
            {
                "ph": "X",
                "name": "forward 2",
                "cat": "compute",
                "ts": 0.0,
                "dur": 1.5,
                "pid": 1,
                "tid": 0,
                "args": {"step": 3, "stage": 1, "microbatch": 2},
            },
            {"ph": "X", "name": "push", "cat": "move", "ts": 3.0, "dur": 0.5, "pid": 1, "tid": 1, "args": {"step": 3}},
        ],
        "displayTimeUnit": "ms",
        "otherData": {"job": "digits-3f2a9c"},
    }  # fmt: skip


def test_the_document_of_a_report() -> None:
    found = parse(pipeline("1f1b", 2, 2, steps=1), "run")
    told = as_document(found, measure(found))
    assert told["replicas"][0] == {
        "replica": 0,
        "ranks": 2,
        "steps": 1,
        "utilisation": pytest.approx(2 / 3),
        "theory": pytest.approx(2 / 3),
        "stages": 2,
        "microbatches": 2,
        "schedule": "1f1b",
    }
    worker = told["workers"][1]
    assert (worker["worker"], worker["rank"], worker["stage"], worker["spans"]) == (1, 1, 1, 5)
    assert worker["moved"] == {"pushed": 2048, "pulled": 1024, "between_ranks": 0}
    shown = text(measure(found))
    assert shown[0] == (
        "replica 0: pipeline 66.7% busy over 1 step "
        "(1f1b, 2 stages, 2 micro-batches: at best 66.7% with stages of equal cost)"
    )
