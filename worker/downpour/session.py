"""A worker of a job: joins it, trains in it, leaves it. What the functions of ``downpour`` do under a launcher."""

from __future__ import annotations

import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from downpour.client.parameters import ParameterClient
from downpour.client.thread import ClientThread
from downpour.clipping import clip_grad_norm_
from downpour.context import WorkerContext
from downpour.control import Control
from downpour.data.grouped import FollowingLoader, LeadLoader
from downpour.data.loader import PreparedLoader
from downpour.drain import EXIT_CODE, Drain
from downpour.engine import Counters, Engine
from downpour.exchange import StateExchange
from downpour.files import save_state_dict
from downpour.groups import check_groups
from downpour.lighter import Lighter
from downpour.local import LOCAL
from downpour.local.engine import LocalJob
from downpour.mirror import MirrorStaging
from downpour.model import Described, describe
from downpour.optimizer import adopt
from downpour.parallel.relay import Word
from downpour.randomness import StepSeeds
from downpour.sandblaster import Data, Minimum, Objective, SandblasterEngine, Wishes, optimizer_for
from downpour.space import FlatSpace
from downpour.spans import span, stepped
from downpour.staging import Staging, staging_for
from downpour.takeover import Beginning
from downpour.update_rule import check_parts
from downpour.warm import WarmStart
from downpour_common import failpoints, sharing
from downpour_common import messages as m
from downpour_common.errors import ConfigError, ModelError
from downpour_common.layout import Layout, SharedLayout, plan
from downpour_common.messages import Lease, Message
from downpour_common.transport import ClientTransport

if TYPE_CHECKING:
    from downpour.layerwise.join import Layerwise
    from downpour.parallel.microbatch import Criterion
    from downpour.parallel.plan import Plan
    from downpour.parallel.replica import Replica
    from downpour.tracing import Tracer

PROGRESS_S = 0.5


class Session:
    """One worker's part in its job. Not thread-safe: for the training thread."""

    def __init__(self, context: WorkerContext, transport: ClientTransport) -> None:
        self.context = context
        self.slot, self.seed = context.slot, context.seed
        self.synchronous = context.parsed_mode.synchronous
        self.drain = Drain()
        self._slots = tuple(range(context.workers))
        self._workers = context.workers // context.ranks
        self._thread = ClientThread(transport, context.window_bytes, self._notice)
        self._control = Control(self._thread, context, self.leave_point)
        self._warm = WarmStart(context, self._control)
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
        # The ranks of a replica draw the same.
        first = context.replica * context.ranks
        self._seeds = StepSeeds(self.seed, first) if self.synchronous or context.ranks > 1 else None
        self._moves: dict[int, m.ShardMoved] = {}
        """by shard, the newest"""
        self._reported_s = 0.0
        self._loaders: list[PreparedLoader] = []
        self._model: nn.Module | None = None
        self._layerwise: Layerwise | None = None
        self._replica: Replica | None = None
        self._told = Word()
        """in a replica of several ranks: what its lead has said last"""
        self._client: ParameterClient | None = None
        self._engine: Engine | None = None
        self._exchange: StateExchange | None = None
        self._tracer: Tracer | None = None

    # ------------------------------------------------------------ joining

    def prepare(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        loaders: list[DataLoader[Any]],
        plan: Plan | None = None,
    ) -> list[PreparedLoader]:
        """Join the job with what the script made. Raises :class:`ModelError` and other :class:`DownpourError`.

        ``plan``: how the model is split, in a job whose replicas have several ranks.
        """
        if self._prepared:
            raise ModelError(
                "downpour.prepare was called twice in one worker; call it once with everything "
                "(several networks: one nn.ModuleDict, one optimizer over all parameters)"
            )
        optimizer = optimizer_for(self.context.parsed_mode, model, optimizer)
        if self.context.fetch == "layers":
            from downpour.layerwise.join import Layerwise

            self._layerwise = Layerwise(self.context, model, optimizer)
            described = self._layerwise.described
        else:
            c, mode = self.context, self.context.parsed_mode
            outer = LOCAL[mode.name].outer(mode) if mode.local else None
            described = describe(model, optimizer, c.buffers, own_rule=c.rule, outer=outer)
        check_groups(self.context.parsed_mode, described.spec)
        self._prepared = True
        self._model = model
        self._training_thread = threading.get_ident()
        kept = self.context.autocast, self.context.activation_checkpointing
        lighter = None if model is None else Lighter(model, *kept)
        if self.context.ranks > 1:
            described = self._split(model, optimizer, loaders, described, plan)
            check_parts(described.spec)
        if lighter is not None and model is not None:
            stages = () if self._replica is None else self._replica.stages
            lighter.apply(stages or [model], described.device)
        welcome = self._control.register(described.spec)
        self._members_are(welcome.slots)
        connect = self._connect if self._layerwise is None else self._connect_layers
        begins = connect(described, welcome, optimizer)
        start = (welcome.position[0], welcome.position[1]) if len(welcome.position) > 1 else (0, 0)
        self._fetched()
        if begins.position is not None:
            start = begins.position
        epochs = dict(enumerate(welcome.position[2:], 1))
        self._start_position = start
        self._position = start
        if not loaders or isinstance(loaders[0].dataset, IterableDataset):
            self._position = ()  # only whole passes can be told
        self._loaders = [
            self._prepared_loader(loader, index, start if index == 0 else (epochs.get(index, 0), 0))
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
        if self.context.trace:
            self._trace(model)
        self._report(force=True)
        self._await_warm_start(welcome.clock)
        return self._loaders

    def _await_warm_start(self, clock: int) -> None:
        """Let worker 0 take its first steps alone, and begin with its weights."""

        def over() -> bool:
            self.leave_point()
            return self.should_stop()

        def updates() -> int:
            self.pull()
            return self.version

        with span("wait"):
            waited = self._warm.wait(clock, updates, over)
        if waited and self._exchange is not None:
            self.pull()
            self._exchange.pull_buffers()

    def _trace(self, model: nn.Module | None) -> None:
        from downpour.tracing import Tracer

        self._tracer = Tracer(self._control, self.context)
        stepped(self.clock)
        if model is not None:
            pipelined = self._replica is not None and self._replica.pipeline is not None
            self._tracer.watch(model, holds=self._layerwise is None, computes=not pipelined)

    def _split(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        loaders: list[DataLoader[Any]],
        described: Described,
        plan: Plan | None,
    ) -> Described:
        """Meet the other ranks of the replica, and keep this one's part of the model."""
        from downpour.parallel.replica import Replica, join  # torch.distributed takes half a second

        if model is None:
            raise ModelError("--tensor and --pipeline split a model; give one to downpour.prepare")
        self._replica = Replica(join(self.context, self._control, described.device))

        def example() -> Any:
            if not loaders:
                raise ModelError("--pipeline measures the model on a batch; give downpour.prepare the training loader")
            batch = next(iter(loaders[0]))
            found = batch[0] if isinstance(batch, (list, tuple)) else batch
            return found.to(described.device) if isinstance(found, torch.Tensor) else found

        return self._replica.split(model, optimizer, described, plan, self.context, example, self._control.agree)

    def _prepared_loader(self, loader: DataLoader[Any], index: int, start: tuple[int, int]) -> PreparedLoader:
        if self._replica is None:
            return PreparedLoader(loader, index, self, start)
        kind = LeadLoader if self._replica.leads else FollowingLoader
        return kind(loader, index, self, start, self._replica.relay)

    def _connect(self, described: Described, welcome: m.Welcome, optimizer: torch.optim.Optimizer | None) -> Beginning:
        c = self.context
        layout = plan(described.spec, c.shards, c.chunk_bytes)
        # Accrued and rounded gradients and GPU mirrors lie elsewhere; there, payloads are sent.
        rounded = c.push_dtype == "bfloat16"
        shareable = c.shared_memory and described.device.type == "cpu" and c.n_push == 1 and not rounded
        shareable = shareable and not c.compress  # which saves nothing where nothing travels
        mode = c.parsed_mode
        shareable &= mode.name not in ("easgd", "lbfgs")  # which push and pull apart
        offered = sharing.offer(SharedLayout(layout, c.rank)) if shareable else None
        memory = offered.view if offered else None
        mirrored = c.fetch_ahead and described.device.type == "cpu"
        space = FlatSpace(layout, described.tensors, described.device, None if mirrored else memory, c.rank)
        staging = MirrorStaging(space, memory, rounded) if mirrored else staging_for(space, rounded)
        client = self._meet(layout, welcome, staging)
        common = () if self._replica is None else (self._replica.greatest, self._replica.together)
        self._exchange = StateExchange(c, space, staging, client, lambda: self.of_chief, *common)
        begins, clock = self._begin(self._exchange, client, welcome, optimizer is not None)
        if offered is not None:
            # Local steps between two fetches are this worker's own.
            late = c.fetch_ahead or c.inject_staleness > 0
            in_place = c.in_place and not (late or mode.local) and (c.mode != "async" or c.n_fetch == 1)
            client.share(offered, in_place)
        if optimizer is not None and mode.local:
            greatest = int if self._replica is None else self._replica.greatest
            job = LocalJob(mode, lambda: self.workers, greatest, self.leave_point, c.on_nan == "skip")
            local = LOCAL[mode.name].engine(job, space, staging, client, optimizer, clock, begins.seq, self._where)
            if self._model is not None:
                local.watch(self._model)
            self._engine = local
            adopt(optimizer, self)
        elif optimizer is not None and mode.name == "lbfgs":
            self._engine = SandblasterEngine(
                space, staging, client, optimizer, (1, 1), clock, begins.seq, lambda: self._position
            )
        elif optimizer is not None:
            self._engine = Engine(
                space,
                staging,
                client,
                optimizer,
                (c.n_push, c.n_fetch) if c.mode == "async" else (1, 1),
                clock,
                begins.seq,
                lambda: self._position,
                c.on_nan != "fail",
            )
            if c.fetch_ahead:
                self._engine.fetch_ahead()
            elif c.inject_staleness:
                self._engine.hold_back(c.inject_staleness)
            elif c.overlap == "auto" and c.ranks == 1:
                self._engine.overlap()
            adopt(optimizer, self)
        return begins

    def _connect_layers(
        self, described: Described, welcome: m.Welcome, optimizer: torch.optim.Optimizer | None
    ) -> Beginning:
        """As :meth:`_connect`, with parameters that come and go layer by layer; see :mod:`downpour.layerwise`."""
        assert self._layerwise is not None
        layout = plan(described.spec, self.context.shards, self.context.chunk_bytes)
        space, staging = self._layerwise.space(layout)
        client = self._meet(layout, welcome, staging)
        self._exchange = self._layerwise.exchange(space, staging, client, lambda: self.is_chief)
        begins, clock = self._begin(self._exchange, client, welcome, optimizer is not None)
        if optimizer is not None:
            self._engine = self._layerwise.engine(
                space, client, optimizer, clock, begins.seq, lambda: self._position, self._use_batches
            )
            adopt(optimizer, self)
        return begins

    def _meet(self, layout: Layout, welcome: m.Welcome, staging: Staging) -> ParameterClient:
        """The shards, wherever they are by now."""
        client = self._client = ParameterClient(self._thread, self.context, layout, welcome.shards, staging)
        for move in list(self._moves.values()):
            client.moved(move)
        return client

    def _begin(
        self, exchange: StateExchange, client: ParameterClient, welcome: m.Welcome, trains: bool
    ) -> tuple[Beginning, int]:
        """Bring this worker and the shards to the same weights; returns where it begins, and its first step's clock."""
        # From it the coordinator knows whom to tell of a shard that moves while it is greeted.
        epoch = welcome.position[0] if welcome.position else 0
        self._control.progress(Counters(welcome.clock), welcome.clock, epoch, (0, 0), client.shard_epochs)
        if welcome.takes_over:
            begins = exchange.take_over(welcome.restored, self.leave_point)
            return begins, begins.seq
        begins = exchange.start(welcome.restored)
        if trains and self.context.parsed_mode.joined_by_number:
            begins = exchange.take_part(begins)
        return begins, welcome.clock

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

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:
        """See :class:`downpour.optimizer.Stepper`."""
        assert self._engine is not None
        own_data = not self._taken
        self._use_batches()
        if not skipped:
            self._clip()
        if self._replica is not None:
            self._replica.add_up_gradients()
        self._engine.step(local_step, skipped)
        self._fetched()
        self._stepped(own_data)

    def zero_gradients(self) -> None:
        """See :class:`downpour.optimizer.Stepper`."""
        assert self._engine is not None
        self._engine.zero_gradients()
        if self._replica is not None:
            self._replica.zero_gradients()

    def pull(self) -> None:
        """Fetch the newest weights now."""
        if self._engine is not None:
            self._engine.pull()
            self._fetched()

    def _fetched(self) -> None:
        if self._replica is not None:
            self._replica.spread_weights()

    def push(self, samples: int) -> None:
        """Push the gradients at hand, without fetching."""
        if self._engine is None:
            raise ConfigError("downpour.push needs an optimizer; give one to downpour.prepare")
        self._clip()
        if self._replica is not None:
            self._replica.add_up_gradients()
        self._engine.push(samples)
        self._stepped(not self._taken)

    def _clip(self) -> None:
        """Scale the gradients at hand down to the norm that the job allows, over all ranks of the replica."""
        if self.context.clip and self._model is not None:
            clip_grad_norm_(self._model, self.context.clip)

    def _stepped(self, own_data: bool) -> None:
        """``own_data``: no loader is going to tell of the next step's data."""
        self._warm.stepped(self.clock)
        if own_data and self._seeds is not None:
            self._seeds.reseed(self.clock)
        for loader in self._loaders:
            loader.stepped()
        self._report()
        if self._tracer is not None:
            self._tracer.stepped(self.clock, self._moved())
        if self._replica is not None and not self._loaders:
            stop, leave = self._replica.any_of(self._stop.is_set(), self.drain.asked)
            self.told(Word(stop=stop or leave, leave=leave))
        self.leave_point()

    def minimize(self, model: nn.Module, criterion: Criterion, loader: DataLoader[Any], wishes: Wishes) -> Minimum:
        """See :func:`downpour.minimize`."""
        engine = self._engine
        if not isinstance(engine, SandblasterEngine):
            raise ConfigError(f"downpour.minimize belongs to --mode lbfgs; the mode of this job is {self.context.mode}")
        if model is not self._model:
            raise ConfigError("downpour.minimize: give it the model that downpour.prepare was given")

        traced = self.clock

        def between() -> None:
            nonlocal traced
            self._report()
            if self._tracer is not None and self.clock > traced:
                traced = self.clock
                self._tracer.stepped(traced, self._moved())
            self.leave_point()

        objective = Objective(model, criterion, Data(loader))
        return engine.minimize(objective, wishes, self.context.parsed_mode, self._control, between)

    def add_samples(self, count: int) -> None:
        """See :func:`downpour.add_samples`."""
        if self._engine is None:
            raise ConfigError("downpour.add_samples needs an optimizer; give one to downpour.prepare")
        self._engine.add_samples(count)

    @property
    def version(self) -> int:
        """See :func:`downpour.version`."""
        return 0 if self._client is None else self._client.version

    def stop(self, reason: str) -> None:
        """See :func:`downpour.stop`."""
        self._stop.set()
        self._control.end_training(self.clock, reason)

    def log(self, values: Mapping[str, float]) -> None:
        """Send scalars to the run's metrics."""
        self._control.log(self.clock, values)

    def _where(self) -> tuple[int, ...]:
        """Position of the training data after the batches that the next contribution comes from."""
        return self._position

    def barrier(self) -> None:
        """Wait until every live worker is here."""
        self.leave_point()
        if self._engine is None:
            self._wait_for_all()
        else:
            self._engine.meet(self._wait_for_all)
        if self.context.parsed_mode.local:
            self._fetched()

    def _wait_for_all(self) -> None:
        with span("wait"):
            if self._replica is None or self._replica.leads:
                self._control.barrier()
            if self._replica is not None:
                self._replica.meet()

    # ------------------------------------------------------------ who is there

    @property
    def workers(self) -> int:
        """Replicas in the job, as far as this worker knows: the workers, unless a replica has several ranks."""
        return self._workers

    @property
    def share(self) -> tuple[int, int]:
        """(replicas, index) of this worker's replica among them, ascending by slot."""
        return self._workers, sum(slot < self.slot for slot in self._slots) // self.context.ranks

    @property
    def is_chief(self) -> bool:
        """Whether this is the member with the lowest slot."""
        return not self._slots or self.slot <= self._slots[0]

    @property
    def of_chief(self) -> bool:
        """Whether this is the chief, or another rank of its replica."""
        ranks = self.context.ranks
        return not self._slots or self.slot // ranks <= self._slots[0] // ranks

    def _members_are(self, slots: tuple[int, ...]) -> None:
        self._slots = slots
        self._workers = max(1, len(slots) // self.context.ranks)

    @property
    def clock(self) -> int:
        """Completed steps, those before a resume included."""
        return self._engine.counters.clock if self._engine else 0

    @property
    def epoch(self) -> int:
        """Finished passes over the first prepared loader, those before a resume included."""
        return self._loaders[0].epoch if self._loaders else self._start_position[0]

    def should_stop(self) -> bool:
        """Whether the job is being stopped, or this worker is to leave it. All ranks of a replica say the same, what
        their lead knew at the newest batch."""
        if self._replica is not None:
            return self._told.stop
        return self._stop.is_set() or self.drain.asked

    @property
    def leaving(self) -> bool:
        """See :class:`downpour.data.loader.Host`."""
        return self.drain.asked

    def leave_point(self) -> None:
        """End the script, in good order, if this worker is to leave; :meth:`finish` does the rest.

        The ranks of a replica leave together, where their lead says so (:meth:`told`).
        """
        if self.drain.asked and not self._closed and self._replica is None:
            raise SystemExit(EXIT_CODE)

    def word(self) -> Word:
        """See :class:`downpour.data.grouped.GroupHost`."""
        return Word(stop=self._stop.is_set() or self.drain.asked, leave=self.drain.asked)

    def told(self, word: Word) -> None:
        """See :class:`downpour.data.grouped.GroupHost`."""
        self._told = word
        if word.leave and not self._closed:
            self.drain.ask()
            raise SystemExit(EXIT_CODE)

    def save(self, path: str) -> None:
        """Write the newest weights of the whole model; only the chief does."""
        if self._model is None:
            raise ConfigError("downpour.save needs a model; give one to downpour.prepare")
        if self.is_chief:
            if self._layerwise is not None:
                self.pull()
                save_state_dict(self._model, path, self._layerwise.read)
            else:
                save_state_dict(self.unsplit(self._model), path)

    def unsplit(self, model: nn.Module) -> nn.Module:
        """See :func:`downpour.unsplit`."""
        if model is not self._model:
            raise ConfigError("downpour.unsplit: give it the model that downpour.prepare was given")
        if self._replica is None:
            self.pull()
            return model
        assert self._client is not None
        return self._replica.unsplit(self._client.pull_whole(), self._replica.group.device)

    def forward_backward(self, model: nn.Module, criterion: Criterion, inputs: Any, targets: Any) -> torch.Tensor:
        """See :func:`downpour.forward_backward`."""
        if self._replica is not None and self._replica.pipeline is not None:
            if model is not self._model:
                raise ConfigError("downpour.forward_backward: in a job with --pipeline, give it the prepared model")
            return self._replica.pipeline.forward_backward(criterion, inputs, targets)
        from downpour.parallel.microbatch import microbatched

        return microbatched(model, criterion, inputs, targets, self.context.parts)

    # ------------------------------------------------------------ data (see data.loader.Host)

    def take_lease(
        self, loader: int, epoch: int, total: int, unit: int, digest: str, done: list[tuple[int, int]]
    ) -> Lease:
        """See :class:`downpour.data.loader.Host`."""
        if unit:
            self.leave_point()
        with span("wait"):
            return self._control.take_lease(loader, epoch, total, unit, digest, done)

    def report_done(self, loader: int, epoch: int, done: list[tuple[int, int]]) -> None:
        """See :class:`downpour.data.loader.Host`."""
        self._control.report_done(loader, epoch, done, wait=threading.get_ident() == self._training_thread)

    def pass_begins(self, loader: int, epoch: int) -> tuple[int, int]:
        """See :class:`downpour.data.loader.Host`."""
        self._clock_at_pass[loader] = self.clock
        if not self.synchronous or (self._replica is not None and not self._replica.leads):
            return self.share
        with span("wait"):
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

    def batch_given(self, loader: int) -> None:
        """See :class:`downpour.data.grouped.GroupHost`. The lead alone has drawn for the batch."""
        if self._seeds is not None and torch.is_grad_enabled():
            self._seeds.reseed(self.clock, loader, -1 - self._taken[loader][2])

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
            if self._replica is not None:
                self._replica.meet()  # so that no column is past the pass while another lacks a contribution to it
            failpoints.hit("worker.end_epoch.before")
            with span("wait"):
                number = self._client.end_epoch(loader, epoch, self.leave_point)
            failpoints.hit("worker.end_epoch.after")
            if self._engine is not None:
                self._engine.round_is(number)
        self._exchange.pull_buffers()
        self._fetched()

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
                if self._layerwise is not None:
                    self.log(self._layerwise.figures(self._moved()))
                self._exchange.push_buffers(final=True)
                if self._tracer is not None:
                    self._tracer.finish(self._moved())
                torn = sum([loader.settle() for loader in self._loaders]) + self._torn_next()
                self._control.settle()
                failpoints.hit("worker.leave.before")
                self._client.leave()
                self._report(force=True)
                failpoints.hit("worker.goodbye.before")
                self._control.goodbye(self._drained, torn, self._client.numbers)
        except BaseException as error:
            self._tell_failure(error, "".join(traceback.format_exception(error)))
            raise
        finally:
            self._thread.close()
            if self._replica is not None:
                self._replica.close()

    @property
    def _drained(self) -> bool:
        """Whether the script has ended because this worker was to leave; in a replica, all of them or none."""
        return self.drain.asked if self._replica is None else self._told.leave

    def _torn_next(self) -> int:
        """sync: announce that this worker leaves, before the others can go on without it. Returns the samples that it
        would have had of the next pass, if that is split already."""
        follows = self._replica is not None and not self._replica.leads
        if not (self.synchronous and self._drained and self._loaders) or follows:
            return 0
        begins = self._control.begin_pass(0, self.epoch, -1)
        return self._loaders[0].part((begins.workers, begins.index)) if begins.workers else 0

    def fail(self, error: BaseException, trace: str) -> str:
        """The script has raised: say so and go, without leaving the job in good order. Returns what its log is to
        hold, the traceback unless it tells nothing."""
        if not self._closed:
            self._closed = True
            if self._tracer is not None:
                self._tracer.fail()
            trace = self._tell_failure(error, trace)
            self._thread.close()
            if self._replica is not None:
                self._replica.close()
        return trace

    def _tell_failure(self, error: BaseException, trace: str) -> str:
        lost = None if self._replica is None else self._replica.group.lost(error, self.context.replica)
        if lost is not None:  # a traceback tells where this rank waited, which is of use if the other still is there
            trace = f"{trace if lost.late else ''}{type(lost).__name__}: {lost}\n"
        self._control.failed(lost or error, trace)
        return trace

    def _notice(self, message: Message) -> None:
        """In the client's thread: something that answers nothing."""
        match message:
            case m.ShouldStop():
                self.drain.job_ends |= not message.by_script
                self._stop.set()
            case m.PortionOver():
                if isinstance(self._engine, SandblasterEngine):
                    self._engine.portion_over(message)
            case m.MembersChanged():
                self._members_are(message.slots)
            case m.ResidualWanted():
                if self._client is not None:
                    self._client.residual_wanted(message)
            case m.ShardMoved():
                self._moves[message.shard] = message
                if self._client is not None:
                    self._client.moved(message)

    def _moved(self) -> dict[str, int]:
        """Bytes of gradients and weights that this worker and the shards have given each other, however."""
        assert self._client is not None
        return {"pushed": self._client.traffic.bytes_sent, "pulled": self._client.traffic.bytes_received}

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
