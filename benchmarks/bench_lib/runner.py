"""Runs the contenders in turn and collects their samples; whatever happens, all of them are closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from bench_lib.contender import Contender, ContenderError, UnavailableError
from bench_lib.idle import descendants_load

IDLE_WATCH_S = 1.0

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What came of one benchmark."""

    samples_s: dict[str, list[float]] = field(default_factory=dict)  # by contender, without warm-ups
    failed: dict[str, str] = field(default_factory=dict)  # by contender: why
    skipped: dict[str, str] = field(default_factory=dict)  # by contender: what it lacks
    idle_load: float = 0.0  # cores used by all started contenders together while none had its turn


class Runner:
    """Starts all contenders, then gives each one run per round, so that drift of the machine hits all alike.

    The round's first one rotates. A contender that fails is closed and reported, its samples are dropped, and
    the others go on.
    """

    def __init__(self, builders: Mapping[str, Callable[[], Contender]], say: Say) -> None:
        self._builders = builders
        self._say = say
        self._alive: dict[str, Contender] = {}
        self._outcome = Outcome()

    def run(self, runs: int, warmups: int) -> Outcome:
        with _terminate_raises():
            try:
                self._start_all()
                for number in range(warmups + runs):
                    if number == warmups:
                        self._outcome.idle_load = descendants_load(IDLE_WATCH_S)
                    is_warmup = number < warmups
                    self._round(number, keep=not is_warmup)
                    note = " (warm-up)" if is_warmup else ""
                    self._say(f"round {number + 1} of {warmups + runs} done{note}")
            finally:
                self._close_all()
        return self._outcome

    def _start_all(self) -> None:
        for name, build in self._builders.items():
            contender = build()
            self._alive[name] = contender
            try:
                contender.start()
            except ContenderError as error:
                self._give_up(name, error)

    def _round(self, number: int, keep: bool) -> None:
        names = list(self._alive)
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            try:
                took_s = self._alive[name].run_once()
            except ContenderError as error:
                self._give_up(name, error)
                continue
            if keep:
                self._outcome.samples_s.setdefault(name, []).append(took_s)

    def _give_up(self, name: str, error: ContenderError) -> None:
        self._outcome.samples_s.pop(name, None)
        if isinstance(error, UnavailableError):
            self._outcome.skipped[name] = str(error)
            self._say(f"{name} is skipped: {error}")
        else:
            self._outcome.failed[name] = str(error)
            self._say(f"{name} failed and is left out: {error}")
        contender = self._alive.pop(name)
        try:
            contender.close()
        except ContenderError as also:
            self._say(f"{name} could not be closed: {also}")

    def _close_all(self) -> None:
        with _deaf():
            while self._alive:
                name, contender = self._alive.popitem()
                try:
                    contender.close()
                except Exception as error:  # the others must still be closed
                    self._outcome.failed[name] = f"close: {error}"
                    self._say(f"{name} could not be closed: {error}")


@contextmanager
def _terminate_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP leave by way of `finally`, as Ctrl-C does."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, leave)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as SIGHUP is under nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C does not interrupt the cleaning up, which takes bounded time."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
