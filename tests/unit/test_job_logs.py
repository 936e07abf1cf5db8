"""Reading logs that grow, following jobs until they end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_kit import FAILURE, Line, job_document, line_to

from downpour.jobs.errors import CoordinatorUnreachable, NotFinished
from downpour.jobs.follow import Nobody, follow
from downpour.jobs.logs import (
    LINE_BYTES,
    PART_BYTES,
    LogLine,
    LogName,
    LogReader,
    Selection,
    log_name,
    parse_selection,
    tail_offset,
)
from downpour.jobs.status import JobStatus
from downpour_common.errors import ConfigError
from downpour_common.messages import DescribeJob, GetFile, ListFiles, Message

W0 = LogName("worker", 0, 0)


def test_whose_log_a_file_is() -> None:
    assert log_name("logs/worker-3.log") == LogName("worker", 3, 0)
    assert log_name("logs/server-12.2.log") == LogName("server", 12, 2)
    for other in ("metrics.jsonl", "logs/worker-x.log", "logs/../worker-1.log", "x/logs/worker-1.log"):
        assert log_name(other) is None


def test_selections() -> None:
    assert parse_selection("digits") == ("digits", Selection())
    assert parse_selection("digits/server") == ("digits", Selection("server"))
    assert parse_selection("digits/worker/3") == ("digits", Selection("worker", 3))
    for text in ("", "/worker", "d/shard", "d/worker/x", "d/worker/-1", "d/worker/1/2", "d/worker/", "d/worker/²"):
        with pytest.raises(ConfigError, match="expected JOB, JOB/worker, JOB/worker/3"):
            parse_selection(text)


def test_lines_come_out_whole_and_the_last_without_an_end_at_the_end() -> None:
    reader = LogReader(Selection())
    path = "logs/worker-0.log"
    assert [(s.offset, s.length) for s in reader.wants([(path, 5), ("metrics.jsonl", 9)])] == [(0, 5)]
    assert reader.take(path, 0, b"one\ntw") == [LogLine(W0, "one")]
    assert reader.take(path, 0, b"one\ntw") == [], "the answer to a repeat"
    assert reader.take(path, 99, b"gap") == []
    assert reader.take(path, 6, b"o \xfc\r\nthr\xff") == [LogLine(W0, "two \ufffd")]
    assert reader.rest() == [LogLine(W0, "thr\ufffd")]
    assert reader.rest() == []
    assert reader.wants([(path, 0)]) == []


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    reader = LogReader(Selection())
    lines = reader.take("logs/worker-0.log", 0, b"x" * (2 * LINE_BYTES + 10))
    assert [len(line.text) for line in lines] == [LINE_BYTES, LINE_BYTES]


def test_large_logs_are_asked_for_in_parts() -> None:
    spans = LogReader(Selection("worker")).wants([("logs/worker-0.log", 2 * PART_BYTES + 1), ("logs/server-0.log", 9)])
    assert [(s.offset, s.length) for s in spans] == [(0, PART_BYTES), (PART_BYTES, PART_BYTES), (2 * PART_BYTES, 1)]


@given(st.binary(max_size=200).map(lambda b: b.replace(b"\r", b"")), st.lists(st.integers(0, 40), max_size=20))
def test_lines_do_not_depend_on_how_the_bytes_come(data: bytes, cuts: list[int]) -> None:
    reader, lines, at = LogReader(Selection()), [], 0
    for cut in [*cuts, len(data)]:
        lines += reader.take("logs/worker-0.log", at, data[at : at + cut])
        at = min(len(data), at + cut)
    lines += reader.take("logs/worker-0.log", at, data[at:]) + reader.rest()
    whole = [part.decode("utf-8", "replace") for part in data.split(b"\n")]
    assert [line.text for line in lines] == (whole if whole[-1] else whole[:-1])


@given(st.text("ab\n", max_size=60), st.integers(0, 10))
def test_the_tail_of_a_log(text: str, count: int) -> None:
    data = text.encode()
    offset = tail_offset(len(data), count, lambda at, length: data[at : at + length])
    lines = data.splitlines(keepends=True)
    assert data[offset:] == b"".join(lines[max(0, len(lines) - count) :])


def test_the_tail_of_a_large_log_is_found_without_reading_it() -> None:
    data = b"line\n" * 100_000
    read: list[int] = []

    def part(at: int, length: int) -> bytes:
        read.append(length)
        return data[at : at + length]

    assert tail_offset(len(data), 3, part) == len(data) - 15
    assert sum(read) <= 1 << 17
    assert tail_offset(len(data), 200_000, part) == 0


# ---------------------------------------------------------------- following


class Seen(Nobody):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.states: list[str] = []
        self.silences: list[float] = []

    def line(self, line: LogLine) -> None:
        self.lines.append(f"{line.name.who} {line.text}")

    def status(self, status: JobStatus) -> None:
        self.states.append(status.state)

    def silence(self, seconds: float) -> None:
        self.silences.append(seconds)


def after(line: Line, looks: int, change: dict[str, object], **files: bytes) -> None:
    """At the ``looks``-th DescribeJob the job changes, and so do files (``worker_0`` is logs/worker-0.log)."""
    before = line.coordinator.before

    def act(message: Message) -> None:
        before(message)
        if isinstance(message, DescribeJob) and len(line.coordinator.of(DescribeJob)) == looks:
            line.coordinator.jobs["digits-3f2a9c"].update(change)
            for name, data in files.items():
                path = f"logs/{name.replace('_', '-')}.log"
                line.coordinator.files[path] = line.coordinator.files.get(path, b"") + data

    line.coordinator.before = act


def test_a_log_that_grows_is_followed_until_its_job_has_ended() -> None:
    line = line_to(job_document(state="PENDING"))
    after(line, 2, {"state": "RUNNING"}, worker_0=b"hello\nwor")
    after(line, 4, {}, worker_0=b"ld\n", server_0=b"shard\n")
    after(line, 5, {"state": "SUCCEEDED"}, worker_0=b"last words")
    seen = Seen()
    with line.client() as client:
        status = follow(client, "digits", seen, Selection())
        assert (client.timeout_s, client.on_silence) == (10.0, None), "as before"
    assert status.succeeded
    assert seen.states == ["PENDING", "RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert seen.lines == ["worker/0 hello", "server/0 shard", "worker/0 world", "worker/0 last words"]
    assert {m.job for m in line.coordinator.of(DescribeJob, ListFiles, GetFile)} == {"digits", "digits-3f2a9c"}
    assert [m.job for m in line.coordinator.of(DescribeJob)][1:] == ["digits-3f2a9c"] * 4


def test_output_that_comes_with_the_end_is_not_lost() -> None:
    """The coordinator shows the end when it has all output; the files are listed after that was seen."""
    line = line_to(job_document(state="FAILED", failure=FAILURE))
    line.coordinator.files = {"logs/worker-1.log": b"a\nb\n"}
    seen = Seen()
    with line.client() as client:
        assert follow(client, "digits", seen, Selection()).failure is not None
    assert seen.lines == ["worker/1 a", "worker/1 b"]


def test_only_the_selected_processes_are_read_and_a_restart_has_a_log_of_its_own() -> None:
    line = line_to(job_document(state="SUCCEEDED"))
    line.coordinator.files = {
        "logs/worker-0.1.log": b"second life\n",
        "logs/worker-0.log": b"first life\n",
        "logs/worker-1.log": b"other\n",
    }
    seen = Seen()
    with line.client() as client:
        follow(client, "digits", seen, Selection("worker", 0))
    assert seen.lines == ["worker/0 first life", "worker/0 second life"]


def test_following_from_the_tail() -> None:
    line = line_to(job_document())
    line.coordinator.files = {"logs/worker-0.log": b"1\n2\n3\n", "logs/server-0.log": b"s\n"}
    after(line, 3, {"state": "CANCELLED"}, worker_0=b"4\n")
    seen = Seen()
    with line.client() as client:
        follow(client, "digits", seen, Selection(), tail=1)
    assert seen.lines == ["server/0 s", "worker/0 3", "worker/0 4"]


def test_a_log_that_vanishes_does_not_end_the_following() -> None:
    line = line_to(job_document())
    line.coordinator.files = {"logs/worker-0.log": b"1\n"}
    line.coordinator.refuse = {GetFile: ("unknown", "gone")}
    after(line, 2, {"state": "SUCCEEDED"})
    with line.client() as client:
        assert follow(client, "digits", Seen(), Selection()).succeeded


def test_waiting_without_logs_asks_for_no_files_and_less_and_less_often() -> None:
    line = line_to(job_document())
    after(line, 40, {"state": "SUCCEEDED"})
    with line.client() as client:
        follow(client, "digits", Nobody())
    assert line.coordinator.of(ListFiles) == []
    assert 1040 < line.clock.now_s < 1080


def test_the_time_to_wait_ends() -> None:
    line = line_to(job_document())
    with line.client() as client:
        with pytest.raises(NotFinished, match=r"job digits-3f2a9c has not ended within 7 s: step 120") as caught:
            follow(client, "digits", Nobody(), timeout_s=7.0)
        with pytest.raises(TimeoutError):
            follow(client, "digits", Nobody(), timeout_s=0.0)
    assert caught.value.status.state == "RUNNING"
    assert line.clock.now_s == pytest.approx(1007.0, abs=0.5)


def test_a_coordinator_that_is_away_for_minutes_is_waited_for() -> None:
    line = line_to(job_document())
    line.clock.at.append((1005.0, lambda: setattr(line, "cut", True)))
    line.clock.at.append((1305.0, lambda: setattr(line, "cut", False)))
    line.clock.at.append((1306.0, lambda: line.coordinator.jobs["digits-3f2a9c"].update(state="SUCCEEDED")))
    seen = Seen()
    with line.client() as client:
        assert follow(client, "digits", seen, Selection()).succeeded
    assert max(seen.silences) == pytest.approx(300, abs=3)


def test_a_coordinator_that_stays_away_is_given_up() -> None:
    line = line_to(job_document())
    line.clock.at.append((1005.0, lambda: setattr(line, "cut", True)))
    with line.client() as client, pytest.raises(CoordinatorUnreachable, match="tried for 600 s"):
        follow(client, "digits", Nobody())


def test_one_that_never_answered_is_given_up_soon() -> None:
    line = line_to(job_document())
    line.cut = True
    with line.client() as client, pytest.raises(CoordinatorUnreachable, match="tried for 10 s"):
        follow(client, "digits", Nobody())
