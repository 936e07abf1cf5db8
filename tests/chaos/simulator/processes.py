"""The job's processes: a shard and a worker as the launcher would start them, with everything inside them as it is."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from downpour.client.thread import TICK_S
from downpour.context import WorkerContext
from downpour.drain import EXIT_CODE, Drain
from downpour.session import Session
from downpour_common import messages as m
from downpour_common.errors import DownpourError, PeerTimeout
from downpour_server.config import ShardConfig
from downpour_server.service import ShardService
from downpour_server.shard import Shard
from simulator import script
from simulator.kernel import Task
from simulator.ledger import Violation, check_once
from simulator.network import COORDINATOR, Client, Server
from simulator.scenario import CHUNK_BYTES, JOB

if TYPE_CHECKING:
    from downpour_common.messages import Message
    from simulator.world import World

Ended = Callable[[int, str], None]
"""Told the exit code, and the last words."""


class SimProcess:
    """``name``: role/index, ``epoch``: how often there was one before."""

    def __init__(self, world: World, role: str, index: int, epoch: int, ended: Ended) -> None:
        self.world = world
        self.role, self.index, self.epoch = role, index, epoch
        self.name = f"{role}/{index}"
        self.identity = f"{self.name}#{epoch}"
        self.running = True
        self.believed = True
        """whether the coordinator has not been told that it has ended"""
        self.task = Task(world.hub, self.identity, self._main, grad=role == "worker")
        self._ended = ended

    def start(self) -> None:
        """It runs."""
        self.world.switch_to(self)
        self.task.start()

    def kill(self, code: int = -9) -> None:
        """SIGKILL."""
        if self.running:
            self.world.network.died(self.endpoints())
            self._over(code, "")
            self.task.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self.kill(-15)

    def stop(self, for_s: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        self.task.stopped_until_s = self.world.hub.now_s + for_s

    def _over(self, code: int, words: str) -> None:
        if not self.running:
            return
        self.running = False
        self.close()
        self._ended(code, words)

    def close(self) -> None:
        """Its sockets are gone."""

    def endpoints(self) -> tuple[str, ...]:
        """Names that it has on the network."""
        return (self.identity,)

    def _main(self) -> None:
        code, words = 1, ""
        try:
            code = self.run()
        except Violation as violation:
            self.world.violated(violation)
        except DownpourError as error:
            if isinstance(error, PeerTimeout):  # deadlines are far longer than anything that happens here lasts
                self.world.violated(Violation(f"{self.identity} has waited without end: {error}"))
            if "communication thread failed" in str(error):
                self.world.violated(Violation(f"{self.identity}: {error}"))
            words = f"{type(error).__name__}: {error}"
        except Exception:
            words = traceback.format_exc()
        if self.task.alive:
            self.world.trace(f"{self.identity} ends with {code} {words}")
            if "Traceback" in words:
                self.world.violated(Violation(f"{self.identity} has crashed: {words}"))
            self._over(code, words)

    def run(self) -> int:
        """Until its end; the exit code."""
        raise NotImplementedError


class SimShard(SimProcess):
    """A shard's process."""

    def __init__(self, world: World, index: int, epoch: int, ended: Ended) -> None:
        super().__init__(world, "server", index, epoch, ended)
        scenario = world.scenario
        spec = world.spec
        config = ShardConfig(
            job=JOB,
            shard=index,
            shard_epoch=epoch,
            coordinator=COORDINATOR,
            endpoint="",
            workers=world.workers_at_start(),
            shards=scenario.shards,
            mode=scenario.mode,
            chunk_bytes=CHUNK_BYTES,
            timeout_s=spec.settings.timeout_s,
            start_timeout_s=spec.settings.start_timeout_s,
            folder="/run",
            keep_previous=spec.parsed_mode.synchronous and spec.restarts > 0,
        )
        self._data = Server(world.network, f"data-{index}.{world.number()}", self.task)
        self._control = Client(world.network, self.identity, self.task)
        self._seen: dict[int, int] = {}
        self.shard: Shard | None = None
        self.run_number = world.ledger.run
        self.service = ShardService(config, self._data, self._control, lambda: world.hub.now_s, self._set_up)

    def _set_up(self, shard: Shard) -> None:
        self.shard = shard
        ledger = self.world.ledger
        self._seen = {i: s.version for i, s in shard.chunks.items()}
        handle = shard.handle

        def watched(*arguments: object) -> object:
            effects = handle(*arguments)  # type: ignore[arg-type]
            for index, stored in shard.chunks.items():
                before = self._seen[index]
                if stored.version < before:
                    raise Violation(
                        f"{self.identity}: chunk {index} goes back from version {before} to {stored.version}"
                    )
                if stored.version > before:
                    self._seen[index] = stored.version
                    if stored.trainable and not ledger.synchronous:
                        check_once(stored.weights, f"{self.identity}, chunk {index}")
            return effects

        shard.handle = watched  # type: ignore[method-assign, assignment]

    def endpoints(self) -> tuple[str, ...]:
        """See above."""
        return self.identity, self._data.address

    def close(self) -> None:
        """See above."""
        self._data.close()
        self._control.close()

    def run(self) -> int:
        """See above."""
        self.service.run()
        return 0


class SimDrain(Drain):
    """Told by the world, not by a signal."""

    def install(self) -> None:
        """Nothing to install."""


class SimWorker(SimProcess):
    """A worker's process."""

    def __init__(self, world: World, index: int, epoch: int, ended: Ended) -> None:
        super().__init__(world, "worker", index, epoch, ended)
        self._transport = Client(world.network, self.identity, self.task, self._arrived)
        self._transport.on_send = self._sends
        self._session: Session | None = None

    def _sends(self, message: Message) -> None:
        who = (self.index, self.epoch)
        if isinstance(message, m.Contribution):
            if message.chunk < self.world.scenario.tensors and self.believed:
                self.world.ledger.sends(who, message.seq)
        elif isinstance(message, m.Leave):
            self.world.ledger.gone(who)

    def _arrived(self) -> None:
        """While the script computes, the client's own thread receives."""
        if self._session is not None and self.world.hub.now_s >= self.task.stopped_until_s:
            self._session._thread._turn_once(0)
        else:
            self.world.hub.after(0.05, self._later)

    def _later(self) -> None:
        if self.running and self._transport.inbox and not self._transport.attended:
            self._arrived()

    def _tick(self) -> None:
        if self.running and self._session is not None:
            if not self._transport.attended and self.world.hub.now_s >= self.task.stopped_until_s:
                self._session._thread._turn_once(0)
            self.world.hub.after(TICK_S, self._tick)

    def close(self) -> None:
        """See above."""
        self._transport.close()
        self.world.ledger.gone((self.index, self.epoch))

    def terminate(self) -> None:
        """The script ends after the step; a second time, or when the job ends, at once."""
        drain = self._session.drain if self._session is not None else None
        if drain is None or drain.asked or drain.job_ends:
            self.kill(-15)
        else:
            drain.ask()

    def run(self) -> int:
        """As ``downpour.api`` does."""
        world, spec = self.world, self.world.spec
        settings = spec.settings
        self.task.pause(world.hub.now_s + 0.05)  # importing
        context = WorkerContext(
            job=JOB,
            slot=self.index,
            worker_epoch=self.epoch,
            workers=world.workers_at_start(),
            shards=spec.shards,
            coordinator=COORDINATOR,
            mode=spec.mode,
            device="cpu",
            seed=spec.seed,
            buffers=settings.buffers,
            n_push=settings.n_push,
            n_fetch=settings.n_fetch,
            chunk_bytes=settings.chunk_bytes,
            window_bytes=world.scenario.window_bytes,
            shared_memory=False,
            timeout_s=settings.timeout_s,
            start_timeout_s=settings.start_timeout_s,
            overlap="off",
            in_place=False,
            on_nan=settings.on_nan,
        )
        session = self._session = Session(context, self._transport)
        session.drain = SimDrain()
        world.hub.after(TICK_S, self._tick)
        code = 0
        try:
            script.run(session, world.scenario, world.ledger, (self.index, self.epoch), self._rest)
        except SystemExit as error:
            code = int(error.code or 0)
        except (DownpourError, AssertionError) as error:
            if isinstance(error, Violation):
                raise
            session.fail(error, traceback.format_exc())
            raise
        session.finish()
        if code == 0:
            world.ledger.acknowledge((self.index, self.epoch))
            world.ledger.ended_well.add((self.index, self.epoch))
        world.ledger.gone((self.index, self.epoch))
        return code if code != EXIT_CODE else EXIT_CODE

    def _rest(self, usual_s: float) -> None:
        self.task.pause(self.world.hub.now_s + usual_s * (0.5 + self.world.random.random()))
