"""Spans: what is recorded, how it leaves a worker without holding it up, and where the coordinator puts it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from coordinator_kit import Job
from torch import nn

from downpour import spans, tracing
from downpour.client.core import Ticket
from downpour.context import WorkerContext
from downpour.control import Control
from downpour.tracing import Tracer, host_name, place_of
from downpour_common import messages as m
from downpour_common.errors import PeerRefused
from downpour_coordinator.effects import StoreSpans
from downpour_coordinator.spans import SpanFile

CONTEXT = WorkerContext(
    "j", 3, 2, 4, 1, "coordinator", "async", "cpu", 0, "average", 1, 1, 1024, 1 << 20, False, 20.0, 20.0, trace=True
)


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    spans.stop()


class Line:
    """In the place of :class:`Control`: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.tickets: list[Ticket] = []

    def spans(self, line: bytes, ticket: Ticket) -> None:
        """See :class:`Control`."""
        ticket.attend = lambda ready, timeout_s: None
        self.sent.append(json.loads(line))
        self.tickets.append(ticket)

    def answer(self, version: int = 0) -> None:
        """To the newest."""
        self.tickets[-1].answered(m.Ack(1, version))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> tuple[Line, Tracer]:
    """A worker that sends after every step."""
    monkeypatch.setattr(tracing, "EVERY_S", -1.0)
    monkeypatch.setattr(tracing, "LAST_S", 0.01)
    line = Line()
    return line, Tracer(cast(Control, line), CONTEXT)


def names(line: Line) -> list[str]:
    """Of all spans that were sent."""
    return [row[0] for batch in line.sent for row in batch["spans"]]


# ---------------------------------------------------------------- recording


def test_nothing_is_recorded_unless_something_records() -> None:
    with spans.span("forward", stage=1) as nothing:
        assert nothing is None
    spans.record("backward", 1, 2)
    spans.peak("activations", 5)
    spans.stepped(4)
    assert not spans.recording()
    assert spans.span("a") is spans.span("b")


def test_a_span_has_times_a_thread_a_step_and_facts_and_counts_when_it_fails() -> None:
    recorder = spans.start()
    spans.stepped(7)
    with pytest.raises(ValueError, match="inside"), spans.span("forward", stage=1):
        raise ValueError("inside")
    spans.record("backward", 10, 30, 5, microbatch=2)
    first, second = recorder.take(9)
    assert first[0] == "forward"
    assert first[1] <= first[2]
    assert first[3:] == (threading.get_ident(), 7, {"stage": 1})
    assert second == ("backward", 10, 30, 5, 7, {"microbatch": 2})
    assert len(recorder) == 0


def test_what_there_is_no_room_for_is_counted_and_peaks_are_kept() -> None:
    recorder = spans.start(limit=2)
    for n in range(5):
        spans.record("push", n, n + 1)
    for value in (4, 9, 2):
        spans.peak("activations", value)
    assert (len(recorder), recorder.dropped, recorder.peaks) == (2, 3, {"activations": 9})
    assert [row[1] for row in recorder.take(1)] == [0]


# ---------------------------------------------------------------- telling


def test_one_batch_is_under_way_at_a_time(traced: tuple[Line, Tracer]) -> None:
    line, tracer = traced
    assert line.sent[0]["number"] == 0
    for n in range(3):
        spans.record("push", n, n + 1)
        tracer.stepped(4, {"pushed": n})
    assert len(line.sent) == 1
    line.answer()
    tracer.stepped(4, {"pushed": 9, "pulled": 8})
    assert line.sent[1]["number"] == 1
    assert line.sent[1]["moved"] == {"pushed": 9, "pulled": 8}
    assert line.sent[1]["spans"] == [["push", 0, 1, 0, 0], ["push", 1, 1, 0, 4], ["push", 2, 1, 0, 4]]
    assert line.sent[1]["sizes"]["peak_memory"] > 1 << 20


def test_the_clock_is_that_of_the_shortest_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EVERY_S", -1.0)
    now = [1000]
    monkeypatch.setattr(tracing.time, "monotonic_ns", lambda: now[0])
    line = Line()
    tracer = Tracer(cast(Control, line), CONTEXT)
    for took, theirs in ((40, 5020), (10, 5005), (90, 7000)):
        now[0] = 1000 + took
        line.answer(theirs)
        now[0] = 1000
        tracer.stepped(4, {})
    assert [batch["clock"] for batch in line.sent] == [None, [4000, 40], [4000, 10], [4000, 10]]


def test_a_refusal_ends_the_recording_and_nothing_else(traced: tuple[Line, Tracer]) -> None:
    line, tracer = traced
    line.tickets[-1].failed(PeerRefused("coordinator", "too-large", "the trace ends early"))
    tracer.stepped(4, {})
    assert not spans.recording()
    tracer.finish({})
    assert len(line.sent) == 1


def test_the_end_sends_everything_but_waits_for_nobody_who_is_away(
    traced: tuple[Line, Tracer], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, tracer = traced
    monkeypatch.setattr(tracing, "BATCH_ROWS", 2)
    line.answer()
    for n in range(5):
        spans.record("push", n, n + 1)
    told = line.spans

    def at_once(text: bytes, ticket: Ticket) -> None:
        told(text, ticket)
        line.answer()

    monkeypatch.setattr(line, "spans", at_once)
    tracer.finish({"pushed": 1})
    assert names(line) == ["push"] * 5
    other = Tracer(cast(Control, Line()), CONTEXT)
    other.finish({})  # the first batch has no answer
    other.fail()


def test_forward_and_backward_of_a_model_are_found(traced: tuple[Line, Tracer]) -> None:
    _, tracer = traced
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    tracer.watch(model, holds=True, computes=True)
    x = torch.ones(2, 4)
    (model(x).sum() + model(x).sum()).backward()
    assert [row[0] for row in tracer.recorder.take(9)] == ["forward", "forward", "backward"]
    with torch.no_grad():
        model(x)
    assert [row[0] for row in tracer.recorder.take(9)] == ["evaluate"]
    grad = torch.autograd.grad(model(x).sum(), list(model[2].parameters()))
    assert len(grad) == 2
    rows = tracer.recorder.take(9)
    assert [row[0] for row in rows] == ["forward", "backward"]
    assert rows[0][2] <= rows[1][1] <= rows[1][2]


def test_several_networks_in_one_dictionary(traced: tuple[Line, Tracer]) -> None:
    line, tracer = traced
    both = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})
    tracer.watch(both, holds=True, computes=True)
    outputs = {"y": [both["b"](both["a"](torch.ones(1, 2)))]}
    outputs["y"][0].sum().backward()
    assert [row[0] for row in tracer.recorder.take(9)] == ["forward", "forward", "backward"]
    line.answer()
    tracer.stepped(4, {})
    assert line.sent[-1]["sizes"]["weights"] == line.sent[-1]["sizes"]["gradients"] == 4 * 9


def test_of_a_parameter_that_is_split_only_the_part_here_counts(traced: tuple[Line, Tracer]) -> None:
    line, tracer = traced
    model = nn.Linear(8, 2, bias=False)
    model.weight._local_tensor = torch.zeros(4, 2)
    tracer.watch(model, holds=True, computes=False)
    line.answer()
    tracer.stepped(4, {})
    assert line.sent[-1]["sizes"]["weights"] == line.sent[-1]["sizes"]["gradients"] == 32
    line.answer()
    spans.peak("weights_and_gradients", 7)
    tracer.stepped(5, {})
    assert line.sent[-1]["sizes"]["weights_and_gradients"] == 7


def test_where_a_worker_stands() -> None:
    assert place_of(CONTEXT) == {"replica": 3, "rank": 0, "ranks": 1}
    piped = replace(CONTEXT, slot=5, widths=(1, 2), microbatches=8)
    assert place_of(piped) == {
        "replica": 1,
        "rank": 2,
        "ranks": 3,
        "stage": 1,
        "tensor_rank": 1,
        "stages": 2,
        "microbatches": 8,
        "schedule": "1f1b",
        "interleave": 2,
    }
    assert host_name() == host_name()


# ---------------------------------------------------------------- at the coordinator


def test_the_coordinator_passes_spans_on_to_where_they_are_stored() -> None:
    job = Job()
    message = m.Spans(5, job.facts.job, 0, 0, b"{}")
    assert job.state.handle(b"worker/0", message) == [StoreSpans(b"worker/0", message)]
    (refused,) = job.state.handle(b"worker/0", m.Spans(6, job.facts.job, 0, 7, b"{}"))
    assert "replaced" in str(refused)


def test_lines_are_added_until_the_file_is_full_and_that_is_said_once(tmp_path: Path) -> None:
    file, problems = SpanFile(str(tmp_path), most_bytes=10), list[str]()
    answers = [file.answer(m.Spans(n, "j", 0, 0, b'{"n":%d}' % n), problems) for n in range(3)]
    assert [type(a) for a in answers] == [m.Ack, m.Refused, m.Refused]
    assert cast(m.Ack, answers[0]).version > 1 << 60
    assert (tmp_path / "spans.jsonl").read_text() == '{"n":0}\n'
    assert len(problems) == 1


@pytest.mark.parametrize("line", [b"a\nb", b"x" * ((4 << 20) + 1)], ids=["two", "long"])
def test_what_is_no_line_is_refused(tmp_path: Path, line: bytes) -> None:
    answer = SpanFile(str(tmp_path)).answer(m.Spans(1, "j", 0, 0, line), [])
    assert isinstance(answer, m.Refused)
    assert not (tmp_path / "spans.jsonl").exists()


def test_a_disk_that_takes_nothing_ends_the_trace_and_not_the_job(tmp_path: Path) -> None:
    problems: list[str] = []
    answer = SpanFile(str(tmp_path / "gone")).answer(m.Spans(1, "j", 0, 0, b"{}"), problems)
    assert isinstance(answer, m.Refused)
    assert "trace ends early" in problems[0]
