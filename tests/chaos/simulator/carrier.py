"""The coordinator: a job's :class:`Lifecycle` with its service, and who starts and ends the processes that it asks for.

It may die between any two messages, and comes back from its document, as a cluster's coordinator does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from downpour_coordinator.facts import facts_for
from downpour_coordinator.lifecycle import Lifecycle
from downpour_coordinator.phases import Phase
from downpour_coordinator.service import JobService
from simulator.ledger import Violation
from simulator.network import COORDINATOR, Server
from simulator.processes import SimProcess, SimShard, SimWorker
from simulator.scenario import JOB

if TYPE_CHECKING:
    from downpour_common.messages import Message
    from simulator.world import World

TICK_S = 0.25
OUT = "/run"


class Sockets(Server):
    """The coordinator's address: what comes is handled at once, or kept while there is no process."""

    def __init__(self, world: World) -> None:
        super().__init__(world.network, COORDINATOR)
        self.take: Callable[[bytes, Message], None] | None = None

    def arrived(self, peer: bytes, message: Message) -> None:
        """See above."""
        if self.take is None:
            self.inbox.append((peer, message))
        else:
            self.take(peer, message)


class Carrier:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.deaths = 0
        world.disk.makedirs(OUT)
        self._sockets = Sockets(world)
        self.life = Lifecycle(JOB, world.spec, facts_for(JOB, world.spec, None, ""), "")
        self.children: dict[tuple[str, int], SimProcess] = {}
        self._terminated: set[str] = set()
        self._service = self._new_service()
        self._sockets.take = self._take
        self._service.carry_out(self.life.begin(0.0))
        self._look()
        world.hub.after(TICK_S, lambda: self._tick(0))

    def _new_service(self) -> JobService:
        deaths, hub = self.deaths, self.world.hub

        def send(peer: bytes, message: Message) -> None:
            self._sockets.send(peer, message)

        def later(work: Callable[[], Any], done: Callable[[Any], None]) -> None:
            def act() -> None:
                if self.deaths == deaths:
                    with self.world.acting("coordinator"):
                        result = work()
                        hub.after(0.01, lambda: finish(result))

            def finish(result: Any) -> None:
                if self.deaths == deaths:
                    done(result)
                    self._look()

            hub.after(0.01, act)

        return JobService(self.life, OUT, send, io.StringIO(), lambda: hub.now_s, later)

    # ------------------------------------------------------------ its loop

    def _take(self, peer: bytes, message: Message) -> None:
        with self.world.acting("coordinator"):
            self._service.take(peer, message)
            self._look()

    def _tick(self, deaths: int) -> None:
        if deaths != self.deaths:
            return
        with self.world.acting("coordinator"):
            now_s = self.world.hub.now_s
            self._service.carry_out(self.life.tick(now_s))
            if self.life.phase is Phase.QUEUED:
                self.world.ledger.begin_again(self.life.training.facts.clock)
                self._service.carry_out(self.life.begin(now_s))
            self._look()
        if not self.life.over:
            self.world.hub.after(TICK_S, lambda: self._tick(deaths))

    def _look(self) -> None:
        """Start and end what it says."""
        hub = self.world.hub
        for process in self.life.stopping():
            child = self.children.get((process.role, process.index))
            if (
                child is not None
                and child.running
                and child.epoch == process.epoch
                and child.identity not in self._terminated
            ):
                self._terminated.add(child.identity)
                self.world.trace(f"SIGTERM {child.identity}")
                hub.after(0.005, child.terminate)
                hub.after((process.stop or 0.0) + 0.01, child.kill)
        for process in self.life.pending():
            self.life.placed(process.role, process.index, "host", hub.now_s)
            self.world.trace(f"start {process.name}#{process.epoch}")
            hub.after(
                0.02 + 0.1 * self.world.random.random(), self._starter(process.role, process.index, process.epoch)
            )

    def _starter(self, role: str, index: int, epoch: int) -> Callable[[], None]:
        def start() -> None:
            wanted = self.life.processes.get((role, index))
            if wanted is None or wanted.epoch != epoch or wanted.state != "started":
                return
            before = self.children.get((role, index))
            if before is not None and before.running and before.believed:
                raise Violation(f"{role}/{index} is started twice")
            make = SimShard if role == "server" else SimWorker
            child = make(self.world, index, epoch, lambda code, words: self._exited(child, code, words))
            self.children[role, index] = child
            self.world.born(child)
            child.start()

        return start

    def _exited(self, child: SimProcess, code: int, words: str) -> None:
        self.world.trace(f"{child.identity} is gone ({code}) {words[:200]}")
        if child.believed:
            self.world.hub.after(0.02, lambda: self.report_end(child, code, words))

    def report_end(self, child: SimProcess, code: int | None, words: str = "") -> None:
        """What an agent says, until it is heard."""
        if not self.alive:
            self.world.hub.after(0.1, lambda: self.report_end(child, code, words))
            return
        child.believed = False
        with self.world.acting("coordinator"):
            error = "was lost" if code is None else ""
            key = (child.role, child.index)
            self._service.carry_out(self.life.ended(key, child.epoch, code, self.world.hub.now_s, (words,), error))
            self._look()

    # ------------------------------------------------------------ faults

    def kill(self, for_s: float) -> None:
        """The process dies; another one comes from the document after a while."""
        if not self.alive or self.life.over:
            return
        self.alive = False
        self.deaths += 1
        self._sockets.take = None
        document = json.loads(json.dumps(self.life.document()))
        model = self.life.training.model
        self.world.hub.after(for_s, lambda: self._come_back(document, model))

    def _come_back(self, document: dict[str, Any], model: Any) -> None:
        now_s = self.world.hub.now_s
        self.life = Lifecycle.from_document(JOB, document, model, now_s)
        self.alive = True
        self._service = self._new_service()
        self.world.trace("the coordinator is back")
        for process in self.life.processes.values():
            child = self.children.get((process.role, process.index))
            if process.state == "started" and (child is None or child.epoch != process.epoch):
                self._starter_again(process.role, process.index, process.epoch)
        kept, self._sockets.inbox = self._sockets.inbox, []
        self._sockets.take = self._take
        for peer, message in kept:
            if self.alive and self.world.random.random() < 0.7:
                self._take(peer, message)
        deaths = self.deaths
        self.world.hub.after(TICK_S, lambda: self._tick(deaths))

    def _starter_again(self, role: str, index: int, epoch: int) -> None:
        """What was to be started is, unless that is under way."""
