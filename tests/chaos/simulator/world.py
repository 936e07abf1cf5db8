"""One seed's world, from the start of its job to the end, with the invariants checked on the way and at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import torch

from downpour_coordinator.phases import Phase
from simulator import invariants
from simulator.carrier import Carrier
from simulator.disk import Disk
from simulator.kernel import Hub
from simulator.ledger import Ledger, Violation
from simulator.network import Network
from simulator.patches import simulated
from simulator.processes import SimProcess, SimShard
from simulator.scenario import Fault, Scenario

LONGEST_S = 500.0
"""Virtual time within which every job has come to an end."""
MOST_STEPS = 400_000


class Killed(BaseException):
    """The coordinator dies in the middle of something."""


@dataclass
class Outcome:
    """How a world ended. ``violation`` is "" where all is well."""

    state: str
    reason: str
    violation: str = ""
    seconds_s: float = 0.0
    arrivals: int = 0
    restarts: int = 0
    faults: int = 0
    """how many came about"""
    log: list[str] = field(default_factory=list)
    result: dict[str, bytes] = field(default_factory=dict)
    """of the last checkpoint: bytes of every trainable chunk's weights and state"""
    steps: dict[tuple[int, int], object] = field(default_factory=dict)


class World:
    """See the module; :meth:`run` once."""

    def __init__(self, scenario: Scenario, tracing: bool = False) -> None:
        self.scenario = scenario
        self.spec = scenario.spec()
        self.random = Random(scenario.seed * 2 + 1)
        self.hub = Hub()
        self.disk = Disk()
        self.log: list[str] = []
        self.tracing = tracing
        trace = self.trace if tracing else None
        self.network = Network(self.hub, scenario.seed, scenario.weather, trace)
        mode = self.spec.parsed_mode
        bound = mode.staleness if mode.name == "ssp" else None
        self.ledger = Ledger(mode.synchronous, bound, n_push=scenario.n_push)
        self.happened: list[Fault] = []
        self.shards: list[SimShard] = []
        """all that there ever were"""
        self.carrier: Carrier
        self._violation: Violation | None = None
        self._waiting = sorted((f for f in scenario.faults if not f.point), key=lambda f: f.after)
        self._points = [f for f in scenario.faults if f.point]
        self._hits: Counter[tuple[str, str]] = Counter()
        self._numbers = 0
        self._acting = ""

    def run(self) -> Outcome:
        """Until the job is over, or something is wrong."""
        with simulated(self.hub, self.disk, self._hit), torch.no_grad():
            try:
                self.carrier = Carrier(self)
                self.network.on_arrival = self._arrived
                self._go()
                if self._violation is None:
                    invariants.check_end(self)
            except Violation as violation:
                self._violation = self._violation or violation
            result = invariants.result_of(self) if self._violation is None else {}
            self._end_all()
        life = self.carrier.life
        return Outcome(
            life.state,
            life.reason,
            str(self._violation or ""),
            self.hub.now_s,
            self.network.arrivals,
            life.restarts,
            len(self.happened),
            self.log,
            result,
            dict(self.ledger.steps),
        )

    def _go(self) -> None:
        hub = self.hub
        while self._violation is None:
            if self.carrier.alive and self.carrier.life.over:
                return
            if hub.now_s > LONGEST_S or hub.steps > MOST_STEPS:
                life = self.carrier.life
                raise Violation(
                    f"the job has not ended after {hub.now_s:.0f} s and {hub.steps} steps: {life.state} "
                    f"({life.phase}), waiting for {life.waiting_for()}"
                )
            hub.step()

    def _end_all(self) -> None:
        for child in self.carrier.children.values():
            child.running = False
            child.task.kill()

    # ------------------------------------------------------------ what processes ask

    def number(self) -> int:
        """A number that is given once."""
        self._numbers += 1
        return self._numbers

    def workers_at_start(self) -> int:
        """Members that shards are told when they are started."""
        return self.carrier.life.training.facts.workers

    def born(self, process: SimProcess) -> None:
        """A process is started."""
        if isinstance(process, SimShard):
            self.shards.append(process)

    def switch_to(self, process: SimProcess) -> None:
        """It runs for the first time."""

    def trace(self, text: str) -> None:
        """A line for the event log."""
        if self.tracing:
            self.log.append(f"{self.hub.now_s:9.4f} {self.network.arrivals:5d} {text}")

    def violated(self, violation: Violation) -> None:
        """Called anywhere; the world ends."""
        self._violation = self._violation or violation

    @contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """While the coordinator does something; it may die in it, at a failpoint."""
        before, self._acting = self._acting, name
        try:
            yield
        except Killed:
            pass
        finally:
            self._acting = before

    # ------------------------------------------------------------ faults

    def _arrived(self) -> None:
        while self._waiting and self.network.arrivals >= self._waiting[0].after:
            fault = self._waiting.pop(0)
            self.hub.at(self.hub.now_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]

    def _running(self) -> SimProcess | None:
        from greenlet import getcurrent

        current = getcurrent()
        return next((c for c in self.carrier.children.values() if c.task._greenlet is current), None)

    def _hit(self, point: str) -> None:
        """A process has come to a failpoint."""
        for fault in self._points:
            if fault.point != point:
                continue
            process = self._running()
            name = process.name if process is not None else self._acting
            if name != fault.target:
                continue
            self._hits[point, name] += 1
            if self._hits[point, name] == fault.after:
                self._points.remove(fault)
                self.happened.append(fault)
                self.trace(f"FAULT {fault}")
                if process is not None:
                    process.kill()
                elif self.carrier.alive:
                    self.carrier.kill(fault.lasts_s)
                    raise Killed
                return

    def _strike(self, fault: Fault) -> None:
        if self.carrier.life.over:
            return
        self.happened.append(fault)
        self.trace(f"FAULT {fault}")
        role, _, index = fault.target.partition("/")
        child = self.carrier.children.get((role, int(index))) if index else None
        match fault.kind:
            case "kill" if role == "coordinator":
                self.carrier.kill(fault.lasts_s)
            case "kill" if child is not None:
                child.kill()
            case "zombie" if child is not None and child.running and child.believed:
                child.believed = False
                self.ledger.gone((child.index, child.epoch))
                self.carrier.report_end(child, None)
                self.hub.after(fault.lasts_s, child.kill)
            case "stop" if child is not None and child.running:
                child.stop(fault.lasts_s)
            case "cut":
                epoch = child.epoch if child is not None else 0
                self.network.cut(f"{fault.target}#{epoch}", self.hub.now_s + fault.lasts_s)
            case "power":
                self._power_failure(fault.lasts_s)
            case "flip" if self.carrier.life.phase in (Phase.STARTING, Phase.TRAINING):
                self.trace(f"bit flip in {self.disk.flip(self.random)}")
                if self.random.random() < 0.5:  # and somebody has to come back from that
                    self.random.choice([c for c in self.carrier.children.values() if c.role == "server"]).kill()
            case "full":
                self.disk.full = True
                self.hub.after(fault.lasts_s, lambda: setattr(self.disk, "full", False))

    def _power_failure(self, for_s: float) -> None:
        """The only host loses power: all processes, and what was not on disk."""
        if self.carrier.life.phase not in (Phase.STARTING, Phase.TRAINING):
            return
        self.carrier.kill(for_s)
        for child in list(self.carrier.children.values()):
            child.kill()
        self.disk.power_failure(self.random)
        invariants.check_durable(self)


def play(scenario: Scenario, tracing: bool = False) -> Outcome:
    """Run one scenario; ``violation`` of what comes back says what was wrong."""
    outcome = World(scenario, tracing).run()
    if not outcome.violation and scenario.synchronous and outcome.state == "SUCCEEDED":
        outcome.violation = invariants.compare(scenario, outcome, calm_outcome)
    return outcome


_calm: dict[tuple[object, ...], Outcome] = {}


def calm_outcome(scenario: Scenario) -> Outcome:
    """What comes of the same job when nothing goes wrong."""
    key = scenario.work()
    if key not in _calm:
        _calm[key] = World(scenario.calm()).run()
    return _calm[key]
