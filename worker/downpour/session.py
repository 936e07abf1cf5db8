"""A worker of a job: joins it, trains in it, leaves it. What the functions of ``downpour`` do under a launcher."""

from __future__ import annotations

import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from downpour.client.parameters import ParameterClient
from downpour.client.thread import ClientThread
from downpour.context import WorkerContext
from downpour.control import Control
from downpour.data.loader import PreparedLoader
from downpour.drain import EXIT_CODE, Drain
from downpour.engine import Counters, Engine
from downpour.exchange import StateExchange
from downpour.files import save_state_dict
from downpour.mirror import MirrorStaging
from downpour.model import Described, describe
from downpour.optimizer import adopt
from downpour.randomness import StepSeeds
from downpour.space import FlatSpace
from downpour.staging import staging_for
from downpour.takeover import Beginning
from downpour_common import failpoints, sharing
from downpour_common import messages as m
from downpour_common.errors import ConfigError, ModelError
from downpour_common.layout import SharedLayout, plan
from downpour_common.messages import Lease, Message
from downpour_common.transport import ClientTransport

PROGRESS_S = 0.5


class Session:
    """One worker's part in its job. Not thread-safe: for the training thread."""

    def __init__(self, context: WorkerContext, transport: ClientTransport) -> None:
        self.context = context
        self.slot, self.seed = context.slot, context.seed
        self.synchronous = context.parsed_mode.synchronous
        self.drain = Drain()
        self._slots = tuple(range(context.workers))
        self._workers = context.workers
        self._thread = ClientThread(transport, context.window_bytes, self._notice)
        self._control = Control(self._thread, context, self.leave_point)
        self._stop = threading.Event()
        self._training_thread = threading.get_ident()
        self._prepared = False
        self._closed = False
        self._start_position = (0, 0)
        self._position: tuple[int, ...] = ()
        self._clock_at_pass: dict[int, int] = {}
        # by loader: samples, position after them, batches
        self._taken: dict[int, tuple[int, tuple[int, int] | None, int]] = {}
        self._ended: tuple[int, ...] = ()
        """sync: (loader, epoch) of a pass that the one before in this slot has ended"""
        self._seeds = StepSeeds(self.seed, self.slot) if self.synchronous else None
        self._moves: dict[int, m.ShardMoved] = {}
        """by shard, the newest"""
        self._reported_s = 0.0
        self._loaders: list[PreparedLoader] = []
        self._model: nn.Module | None = None
        self._client: ParameterClient | None = None
        self._engine: Engine | None = None
        self._exchange: StateExchange | None = None

    # ------------------------------------------------------------ joining

    def prepare(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        loaders: list[DataLoader[Any]],
    ) -> list[PreparedLoader]:
        """Join the job with what the script made. Raises :class:`ModelError` and other :class:`DownpourError`."""
        if self._prepared:
            raise ModelError(
                "downpour.prepare was called twice in one worker; call it once with everything "
                "(several networks: one nn.ModuleDict, one optimizer over all parameters)"
            )
        described = describe(model, optimizer, self.context.buffers)
        self._prepared = True
        self._model = model
        self._training_thread = threading.get_ident()
        welcome = self._control.register(described.spec)
        self._members_are(welcome.slots)
        begins = self._connect(described, welcome, optimizer)
        start = (welcome.position[0], welcome.position[1]) if len(welcome.position) > 1 else (0, 0)
        if begins.position is not None:
            start = begins.position
        epochs = dict(enumerate(welcome.position[2:], 1))
        self._start_position = start
        self._position = start
        if not loaders or isinstance(loaders[0].dataset, IterableDataset):
            self._position = ()  # only whole passes can be told
        self._loaders = [
            PreparedLoader(loader, index, self, start if index == 0 else (epochs.get(index, 0), 0))
            for index, loader in enumerate(loaders)
        ]
        self._ended = begins.ended
        if self._seeds is not None:
            self._seeds.reseed(self.clock)
        elif self.workers > 1:
            self._seed_apart()
        self.drain.install()
        if model is not None:
            model.register_load_state_dict_post_hook(_warn_of_loading)
        self._report(force=True)
        return self._loaders

    def _connect(self, described: Described, welcome: m.Welcome, optimizer: torch.optim.Optimizer | None) -> Beginning:
        c = self.context
        layout = plan(described.spec, c.shards, c.chunk_bytes)
        # Accrued and rounded gradients and GPU mirrors lie elsewhere; there, payloads are sent.
        rounded = c.push_dtype == "bfloat16"
        shareable = c.shared_memory and described.device.type == "cpu" and c.n_push == 1 and not rounded
        offered = sharing.offer(SharedLayout(layout)) if shareable else None
        memory = offered.view if offered else None
        mirrored = c.fetch_ahead and described.device.type == "cpu"
        space = FlatSpace(layout, described.tensors, described.device, None if mirrored else memory)
        staging = MirrorStaging(space, memory, rounded) if mirrored else staging_for(space, rounded)
        self._client = ParameterClient(self._thread, c, layout, welcome.shards, staging)
        for move in list(self._moves.values()):
            self._client.moved(move)
        self._exchange = StateExchange(c, space, staging, self._client, lambda: self.is_chief)
        # From it the coordinator knows whom to tell of a shard that moves while it is greeted.
        epoch = welcome.position[0] if welcome.position else 0
        self._control.progress(Counters(welcome.clock), welcome.clock, epoch, (0, 0), self._client.shard_epochs)
        if welcome.takes_over:
            begins = self._exchange.take_over(welcome.restored, self.leave_point)
        else:
            begins = self._exchange.start(welcome.restored)
        if offered is not None:
            # Local steps between two fetches are this worker's own.
            in_place = c.in_place and not c.fetch_ahead and (c.mode != "async" or c.n_fetch == 1)
            self._client.share(offered, in_place)
        if optimizer is not None:
            self._engine = Engine(
                space,
                staging,
                self._client,
                optimizer,
                (c.n_push, c.n_fetch) if c.mode == "async" else (1, 1),
                begins.seq if welcome.takes_over else welcome.clock,
                begins.seq,
                lambda: self._position,
                c.on_nan != "fail",
            )
            if c.fetch_ahead:
                self._engine.fetch_ahead()
            elif c.overlap == "auto":
                self._engine.overlap()
            adopt(optimizer, self)
        return begins

    def _seed_apart(self) -> None:
        """Dropout, augmentation and the like differ between workers, and follow from the job's seed."""
        restarts = (
            [self.context.worker_epoch] if self.context.worker_epoch else []
        )  # not once more what was drawn before
        sequence = np.random.SeedSequence([self.seed, self.slot, 1, *restarts])
        first, second, third = (int(n) for n in sequence.generate_state(3))
        torch.manual_seed(first)
        random.seed(second)
        np.random.seed(third)

    # ------------------------------------------------------------ training

    def step(self, local_step: Callable[[], None]) -> None:
        """See :class:`downpour.optimizer.Stepper`."""
        assert self._engine is not None
        own_data = not self._taken
        self._use_batches()
        self._engine.step(local_step)
        self._stepped(own_data)

    def zero_gradients(self) -> None:
        """See :class:`downpour.optimizer.Stepper`."""
        assert self._engine is not None
        self._engine.zero_gradients()

    def pull(self) -> None:
        """Fetch the newest weights now."""
        if self._engine is not None:
            self._engine.pull()

    def push(self, samples: int) -> None:
        """Push the gradients at hand, without fetching."""
        if self._engine is None:
            raise ConfigError("downpour.push needs an optimizer; give one to downpour.prepare")
        self._engine.push(samples)
        self._stepped(not self._taken)

    def _stepped(self, own_data: bool) -> None:
        """``own_data``: no loader is going to tell of the next step's data."""
        if own_data and self._seeds is not None:
            self._seeds.reseed(self.clock)
        for loader in self._loaders:
            loader.stepped()
        self._report()
        self.leave_point()

    def log(self, values: Mapping[str, float]) -> None:
        """Send scalars to the run's metrics."""
        self._control.log(self.clock, values)

    def barrier(self) -> None:
        """Wait until every live worker is here."""
        self.leave_point()
        self._control.barrier()

    # ------------------------------------------------------------ who is there

    @property
    def workers(self) -> int:
        """Workers in the job, as far as this one knows."""
        return self._workers

    @property
    def share(self) -> tuple[int, int]:
        """(workers, index) of this worker among them, ascending by slot."""
        return self._workers, sum(slot < self.slot for slot in self._slots)

    @property
    def is_chief(self) -> bool:
        """Whether this is the member with the lowest slot."""
        return not self._slots or self.slot <= self._slots[0]

    def _members_are(self, slots: tuple[int, ...]) -> None:
        self._slots = slots
        self._workers = max(1, len(slots))

    @property
    def clock(self) -> int:
        """Completed steps, those before a resume included."""
        return self._engine.counters.clock if self._engine else 0

    @property
    def epoch(self) -> int:
        """Finished passes over the first prepared loader, those before a resume included."""
        return self._loaders[0].epoch if self._loaders else self._start_position[0]

    def should_stop(self) -> bool:
        """Whether the job is being stopped, or this worker is to leave it."""
        return self._stop.is_set() or self.drain.asked

    @property
    def leaving(self) -> bool:
        """See :class:`downpour.data.loader.Host`."""
        return self.drain.asked

    def leave_point(self) -> None:
        """End the script, in good order, if this worker is to leave; :meth:`finish` does the rest."""
        if self.drain.asked and not self._closed:
            raise SystemExit(EXIT_CODE)

    def save(self, path: str) -> None:
        """Write the newest weights of the whole model; only the chief does."""
        if self._model is None:
            raise ConfigError("downpour.save needs a model; give one to downpour.prepare")
        if self.is_chief:
            self.pull()
            save_state_dict(self._model, path)

    # ------------------------------------------------------------ data (see data.loader.Host)

    def take_lease(
        self, loader: int, epoch: int, total: int, unit: int, digest: str, done: list[tuple[int, int]]
    ) -> Lease:
        """See :class:`downpour.data.loader.Host`."""
        if unit:
            self.leave_point()
        return self._control.take_lease(loader, epoch, total, unit, digest, done)

    def report_done(self, loader: int, epoch: int, done: list[tuple[int, int]]) -> None:
        """See :class:`downpour.data.loader.Host`."""
        self._control.report_done(loader, epoch, done, wait=threading.get_ident() == self._training_thread)

    def pass_begins(self, loader: int, epoch: int) -> tuple[int, int]:
        """See :class:`downpour.data.loader.Host`."""
        self._clock_at_pass[loader] = self.clock
        if not self.synchronous:
            return self.share
        begins = self._control.begin_pass(loader, epoch, self.clock)
        self._workers = max(1, begins.workers)
        return self._workers, begins.index

    def batch_taken(self, loader: int, samples: int, position: tuple[int, int] | None) -> None:
        """See :class:`downpour.data.loader.Host`. Counts with the next step; never, if it is only evaluated."""
        if torch.is_grad_enabled():
            before, _, batches = self._taken.get(loader, (0, None, 0))
            self._taken[loader] = (before + samples, position, batches + 1)

    def batch_wanted(self, loader: int) -> None:
        """See :class:`downpour.data.loader.Host`. Whatever the script has drawn in between, validating for example,
        the batch and the step draw what they would draw in a worker that begins here."""
        if self._seeds is not None and torch.is_grad_enabled():
            taken = self._taken.get(loader)
            self._seeds.reseed(self.clock, loader, taken[2] if taken is not None else 0)

    def _use_batches(self) -> None:
        assert self._engine is not None
        for loader, (samples, position, _) in self._taken.items():
            self._engine.add_samples(samples)
            if loader == 0 and position is not None:
                self._position = position
        self._taken.clear()

    def pass_ends(self, loader: int, epoch: int, batches: int) -> None:
        """See :class:`downpour.data.loader.Host`. The end of a training pass is where buffers are exchanged."""
        trained = self.clock > self._clock_at_pass[loader] or (batches == 0 and torch.is_grad_enabled())
        if not trained:
            self._taken.pop(loader, None)
        if not trained or self._engine is None or self._client is None or self._exchange is None:
            return
        if loader == 0 and not self.synchronous:
            self._position = (epoch + 1, 0)
        self._end_pass(loader, epoch)

    def _end_pass(self, loader: int, epoch: int) -> None:
        """Exchange buffers with the others, in ``sync`` once all have come to the end of the pass."""
        assert self._client is not None
        assert self._exchange is not None
        if self._ended != (loader, epoch):
            self._exchange.push_buffers()
        if self.synchronous:
            failpoints.hit("worker.end_epoch.before")
            number = self._client.end_epoch(loader, epoch, self.leave_point)
            failpoints.hit("worker.end_epoch.after")
            if self._engine is not None:
                self._engine.round_is(number)
        self._exchange.pull_buffers()

    # ------------------------------------------------------------ leaving

    def finish(self) -> None:
        """The script has ended well: push what is left, leave the job. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._prepared and self._client is not None and self._exchange is not None:
                if self._engine is not None:
                    self._engine.flush()
                self._exchange.push_buffers(final=True)
                torn = sum([loader.settle() for loader in self._loaders]) + self._torn_next()
                self._control.settle()
                failpoints.hit("worker.leave.before")
                self._client.leave()
                self._report(force=True)
                failpoints.hit("worker.goodbye.before")
                self._control.goodbye(self.drain.asked, torn, self._client.numbers)
        except BaseException as error:
            self._control.failed(error, "".join(traceback.format_exception(error)))
            raise
        finally:
            self._thread.close()

    def _torn_next(self) -> int:
        """sync: announce that this worker leaves, before the others can go on without it. Returns the samples that it
        would have had of the next pass, if that is split already."""
        if not (self.synchronous and self.drain.asked and self._loaders):
            return 0
        begins = self._control.begin_pass(0, self.epoch, -1)
        return self._loaders[0].part((begins.workers, begins.index)) if begins.workers else 0

    def fail(self, error: BaseException, trace: str) -> None:
        """The script has raised: say so and go, without leaving the job in good order."""
        if not self._closed:
            self._closed = True
            self._control.failed(error, trace)
            self._thread.close()

    def _notice(self, message: Message) -> None:
        """In the client's thread: something that answers nothing."""
        match message:
            case m.ShouldStop():
                self.drain.job_ends = True
                self._stop.set()
            case m.MembersChanged():
                self._members_are(message.slots)
            case m.ShardMoved():
                self._moves[message.shard] = message
                if self._client is not None:
                    self._client.moved(message)

    def _report(self, force: bool = False) -> None:
        now_s = time.monotonic()
        if self._client is None or not (force or now_s - self._reported_s > PROGRESS_S):
            return
        self._reported_s = now_s
        traffic = self._client.traffic
        counters = self._engine.counters if self._engine else Counters(0)
        moved = traffic.bytes_sent, traffic.bytes_received
        self._control.progress(counters, self.clock, self.epoch, moved, self._client.shard_epochs)


def _warn_of_loading(_module: nn.Module, _keys: object) -> None:
    warnings.warn(
        "load_state_dict after downpour.prepare does not set the job's weights: the servers' replace it at the next "
        "step or pull, or, with a single worker, are overwritten by it at once (in_place, see CONSISTENCY.md). Load "
        "before prepare, or go on from a run with downpour run --resume DIR",
        stacklevel=3,
    )
