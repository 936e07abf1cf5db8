"""``downpour bench net`` without sockets: what the listening side takes, how rates are measured, what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.errors import ConfigError
from downpour_common.keys import ROLES, add_key, new_keys
from downpour_common.messages import Message, Request
from downpour_common.transport.zeromq import new_key_pair
from downpour_deploy.bench import command
from downpour_deploy.bench.answer import FORMAT, IDLE_S, LARGEST_BYTES, Answerer
from downpour_deploy.bench.estimate import best, percentile, step_s
from downpour_deploy.bench.identity import ASKS, LISTENS, known, own, server_keys
from downpour_deploy.bench.measure import CHUNKS, Found, Link, Point, Refusal, Silence, measure
from downpour_deploy.bench.show import document, text

MIB = 1 << 20


def push(token: str, payload: bytes, number: int = 1) -> m.Push:
    return m.Push(number, token, 0, 0, 0, 1, 0, 0, 1, (), b"", payload)


def begun(token: str = "a") -> Answerer:
    answerer = Answerer()
    assert answerer.handle(m.Hello(1, token, 0, 0, FORMAT), 0.0) == m.HelloReply(1, 0, 0, 0)
    return answerer


def refusal(answer: Message | None) -> str:
    assert isinstance(answer, m.Refused), answer
    return answer.code


# ---------------------------------------------------------------- the listening side


def test_a_chunk_there_back_and_both_ways() -> None:
    answerer = begun()
    assert answerer.handle(push("a", bytes(5000)), 1.0) == m.Ack(1, 0)
    back = answerer.handle(m.Pull(2, "a", 0, 0, 256), 1.0)
    assert isinstance(back, m.Weights)
    assert len(back.payload) == 256 << 10
    both = answerer.handle(m.PushPull(3, "a", 0, 0, 0, 1, 0, 0, 1, (), b"", bytes(70_000)), 1.0)
    assert isinstance(both, m.Weights)
    assert len(both.payload) == 70_000
    assert answerer.handle(m.Leave(4, "a", 0, 0), 1.0) == m.Ack(4, 0)
    assert [(d.bytes_in, d.bytes_out) for d in answerer.finished] == [(75_000, (256 << 10) + 70_000)]


def test_answers_share_one_memory() -> None:
    """However many are asked for and never read, nothing is allocated for them."""
    answerer = begun()
    answers = [answerer.handle(m.Pull(n, "a", 0, 0, LARGEST_BYTES >> 10), 0.0) for n in range(2, 200)]
    assert len({id(a.payload.obj) for a in answers if isinstance(a, m.Weights)}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [-1, (LARGEST_BYTES >> 10) + 1, 1 << 62])
def test_no_more_is_sent_than_a_chunk(chunk: int) -> None:
    assert refusal(begun().handle(m.Pull(2, "a", 0, 0, chunk), 0.0)) == "too-large"


def test_no_more_is_taken_than_a_chunk() -> None:
    assert refusal(begun().handle(push("a", bytes(LARGEST_BYTES + 1)), 0.0)) == "too-large"


def test_one_measurement_at_a_time() -> None:
    answerer = begun("a")
    assert refusal(answerer.handle(m.Hello(9, "b", 0, 0, FORMAT), 1.0)) == "not-ready"
    assert refusal(answerer.handle(m.Leave(9, "b", 0, 0), 1.0)) == "not-ready"
    assert refusal(answerer.handle(push("b", b"x"), 1.0)) == "not-ready"
    answerer.handle(m.Leave(2, "a", 0, 0), 1.0)
    assert isinstance(answerer.handle(m.Hello(9, "b", 0, 0, FORMAT), 1.0), m.HelloReply)


def test_who_has_gone_without_a_word_makes_room() -> None:
    answerer = begun("a")
    answerer.handle(push("a", b"x"), 5.0)
    answerer.tick(5.0 + IDLE_S)
    assert answerer.current is not None
    answerer.tick(5.1 + IDLE_S)
    assert answerer.current is None
    assert [done.token for done in answerer.finished] == ["a"]


def test_nothing_goes_before_hello_or_in_another_format() -> None:
    answerer = Answerer()
    assert refusal(answerer.handle(m.Pull(1, "a", 0, 0, 1), 0.0)) == "not-ready"
    assert refusal(answerer.handle(m.Hello(1, "a", 0, 0, "0" * 64), 0.0)) == "model-differs"
    assert answerer.handle(m.Ack(1, 1), 0.0) is None
    assert answerer.current is None


# ---------------------------------------------------------------- the asking side


class Wire:
    """A transport to an answerer: each message takes ``latency_s`` and its bytes' time in its direction."""

    def __init__(self, there: float, back: float, latency_s: float = 1e-4) -> None:
        self.malformed = 0
        self.now_s = 0.0
        self.most_open = 0
        self.sizes: set[int] = set()
        self._rates = {"there": there, "back": back}
        self._free_s = {"there": 0.0, "back": 0.0}
        self._latency_s = latency_s
        self._arrivals: list[tuple[float, Message]] = []
        self._answerer = Answerer()

    def now(self) -> float:
        return self.now_s

    def _pass(self, direction: str, message: Message, at_s: float) -> float:
        nbytes = sum(memoryview(frame).nbytes for frame in wire.encode(message))
        self._free_s[direction] = max(at_s, self._free_s[direction]) + nbytes / self._rates[direction]
        return self._free_s[direction] + self._latency_s

    def send(self, server: str, message: Message) -> None:
        if isinstance(message, m.PushPull):
            self.sizes.add(len(message.payload))
        arrived_s = self._pass("there", message, self.now_s)
        answer = self._answerer.handle(message, arrived_s)
        assert answer is not None
        self._arrivals.append((self._pass("back", answer, arrived_s), answer))
        self.most_open = max(self.most_open, len(self._arrivals))

    def poll(self, timeout_s: float) -> list[tuple[str, Message]]:
        until_s = self.now_s + timeout_s
        if not self._arrivals or self._arrivals[0][0] > until_s:
            self.now_s = until_s
            return []
        at_s, answer = self._arrivals.pop(0)
        self.now_s = max(self.now_s, at_s)
        return [("there", answer)]

    def wake(self) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def found_over(line: Wire, seconds: float = 1.0, window_bytes: int = 16 * MIB) -> Found:
    link = Link(line, "there", 10.0, line.now)
    assert link.greet(1.0)
    found = measure(link, seconds, window_bytes)
    link.leave()
    return found


def test_rates_are_those_of_the_link() -> None:
    found = found_over(Wire(1e9, 5e8))
    assert [point.chunk_bytes for point in found.points] == list(CHUNKS)
    for point in found.points:
        assert point.there == pytest.approx(1e9, rel=0.15)
        assert point.back == pytest.approx(5e8, rel=0.15)
        assert point.both == pytest.approx(1e9, rel=0.15), "two directions at the pace of the slower one"
    assert percentile(found.round_trips_s, 0.5) == pytest.approx(2e-4, rel=0.1)


def test_no_more_is_under_way_than_the_window() -> None:
    line = Wire(1e9, 1e9)
    found_over(line, window_bytes=8 * MIB)
    assert line.most_open == 8 * MIB // min(CHUNKS)


def test_a_slow_link_is_not_asked_for_large_chunks() -> None:
    line = Wire(1e6, 1e6)
    found = found_over(line, seconds=0.1)
    assert [point.chunk_bytes for point in found.points] == [256 << 10]
    assert line.sizes == {256 << 10}
    assert found.window_bytes <= 1e6


def test_silence_ends_it() -> None:
    line = Wire(1e9, 1e9)
    link = Link(line, "there", 2.0, line.now)
    assert link.greet(1.0)
    line.poll = lambda timeout_s: setattr(line, "now_s", line.now_s + timeout_s) or []  # type: ignore[method-assign]
    with pytest.raises(Silence, match="within 2 s"):
        link.round_trip()
    assert not link.greet(0.5)


@pytest.mark.parametrize(
    "answer",
    [
        lambda number: m.Weights(number, 0, 0, bytes(17)),
        lambda number: m.Ack(number, 0),
        lambda number: m.Refused(number, "too-large", "no"),
    ],
)
def test_answers_that_make_no_sense_end_it(answer: Callable[[int], Request]) -> None:
    line = Wire(1e9, 1e9)
    link = Link(line, "there", 2.0, line.now)
    assert link.greet(1.0)
    numbers: list[int] = []
    line.send = lambda server, message: numbers.append(message.request)  # type: ignore[method-assign, attr-defined]
    line.poll = lambda timeout_s: [("there", answer(numbers[-1] + 7)), ("there", answer(numbers[-1]))]  # type: ignore[method-assign]
    with pytest.raises(Refusal):
        link.stream("both", 256 << 10, 1, MIB)


# ---------------------------------------------------------------- what it means


def points(*both: float) -> tuple[Point, ...]:
    return tuple(Point(256 << 10 << i, 1.0, 1.0, rate) for i, rate in enumerate(both))


def test_the_default_is_kept_where_it_is_about_as_good() -> None:
    assert best(points(1e9, 2e9, 2.95e9, 3e9), MIB).chunk_bytes == MIB
    assert best(points(1e9, 2e9, 2.5e9, 3e9), MIB).chunk_bytes == 2 * MIB
    assert best(points(1e9), MIB).chunk_bytes == 256 << 10


def test_a_step_moves_the_model_twice() -> None:
    found = Found((0.001, 0.002, 0.9), points(1e9), MIB)
    assert step_s(found, found.points[0], 100_000_000) == pytest.approx(0.202)
    assert percentile(found.round_trips_s, 0.99) == 0.9


def test_shown_to_people_and_to_programs() -> None:
    found = Found((0.001,), points(1e9, 2e9, 4e9), 16 * MIB)
    said = text(found, "10.0.0.2:7171, CURVE", 100_000_000, MIB)
    assert said.startswith("10.0.0.2:7171, CURVE\nround trip of a small message: median 1.000 ms")
    assert "best chunk: 1 MiB (the default)" in said
    assert "a model of 100 MB: push and pull take about 51 ms per step" in said
    assert "--set chunk_bytes=524288" in text(Found((0.001,), points(1e9, 2e9), MIB), "", 1 << 30, MIB)
    facts = document(found, "10.0.0.2:7171", True, 100_000_000, MIB)
    assert facts["best_chunk_bytes"] == MIB
    assert facts["step_s"] == pytest.approx(0.051)
    assert [point["both"] for point in facts["points"]] == [1e9, 2e9, 4e9]


# ---------------------------------------------------------------- keys and usage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_keys(tmp_path / "keys", {role: new_key_pair() for role in ROLES})
    return tmp_path / "keys"


def test_of_a_whole_folder_a_worker_talks_to_a_server(folder: Path) -> None:
    assert own(folder, LISTENS).file == "server.key"
    assert own(folder, ASKS).file == "worker.key"
    assert list(known(folder).values()) == ["server", "coordinator", "worker", "user"]
    accepted, mine = server_keys(folder)
    assert accepted.pair == mine.pair
    assert set(accepted.allowed.values()) == set(ROLES)


def test_of_a_users_folder_the_users_key(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "user", "alice", new_key_pair())
    assert own(tmp_path / "keys", ASKS).file == "user-alice.key"
    with pytest.raises(ConfigError, match="nobody could come in"):
        server_keys(tmp_path / "keys")
    (tmp_path / "keys" / "user-alice.key").unlink()
    with pytest.raises(ConfigError, match=r"no \.key file"):
        own(tmp_path / "keys", ASKS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["10.0.0.1:7171"], "so it needs keys"),
        (["--listen", "0.0.0.0:7171"], "so it needs keys"),
        (["--listen", "127.0.0.1:0", "10.0.0.1:7171"], "exclude each other"),
        (["--once"], "--once goes with --listen"),
        (["--model", "8G"], "--model '8G': no unit 'G'"),
        (["10.0.0.1:7171", "--security", "tls"], "expected curve or none"),
        (["10.0.0.1:7171", "--security", "curve"], "give the folder of keys"),
        (["10.0.0.1:7171", "--keys", "nowhere"], "no such folder"),
        (["10.0.0.1:7171", "--keys", ".", "--security", "none"], "exclude each other"),
        (["10.0.0.1"], "expected HOST:PORT"),
    ],
)
def test_bad_usage(arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOWNPOUR_KEYS", raising=False)
    done = CliRunner().invoke(command.bench_app, ["net", *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert problem in done.stderr


def test_keys_of_the_environment_are_for_other_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DOWNPOUR_KEYS", str(folder))
    assert command._folder("10.0.0.1:7171", "tcp://10.0.0.1:7171", "", "", False) == str(folder)
    assert command._folder("", "ipc://", "", "", True) is None
    assert command._folder("10.0.0.1:7171", "tcp://10.0.0.1:7171", "", "none", False) is None
