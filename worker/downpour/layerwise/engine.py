"""Steps of a worker that holds one layer at a time: weights come before a layer computes, gradients go right after.

A layer is fetched when its module's forward begins, and again when backward asks for what forward has saved of its
weights. Its gradient is pushed as soon as backward has completed it, so :meth:`LayerwiseEngine.step` pushes only what
had no gradient, and waits until all has been accepted. What is fetched after it is the weights after this step: in
``sync`` those of the next round, in ``ssp`` no older than its bound allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from downpour.client.parameters import ParameterClient, PushHeader
from downpour.engine import Engine, explained
from downpour.layerwise.hooks import watch
from downpour.layerwise.ledger import Ledger
from downpour.layerwise.parameters import PushedGradient
from downpour.layerwise.residence import Residence
from downpour.layerwise.space import Block, LayerSpace, LayerStaging
from downpour.model import options_of
from downpour.spans import peak
from downpour_common import failpoints, wire
from downpour_common.errors import ModelError, NonFiniteContribution
from downpour_common.modes import Mode


class LayerwiseEngine(Engine):
    """As :class:`Engine`. ``mode``: of the job. ``begin`` is called before the first gradient of a step leaves: it
    tells of the samples that the gradient comes from. ``ledger`` counts what is held.
    """

    def __init__(
        self,
        space: LayerSpace,
        client: ParameterClient,
        optimizer: torch.optim.Optimizer,
        mode: Mode,
        clock: int,
        first_seq: int,
        position: Callable[[], tuple[int, ...]],
        begin: Callable[[], None],
        ledger: Ledger,
    ) -> None:
        super().__init__(space, LayerStaging(space), client, optimizer, (1, 1), clock, first_seq, position)
        self.ledger = ledger
        self._mode = mode
        self._begin = begin
        self._layers = space
        self._round = self._first_round = first_seq
        self._under_way_header: PushHeader | None = None
        """of the contribution whose first gradients have left"""
        self._trainable = tuple(reversed([b for b in space.blocks if b.kind == "trainable"]))
        self._missing: dict[Block, set[nn.Parameter]] = {}
        """by layer that has not been pushed: the parameters without a gradient"""
        self._expect_all()
        self._residence = Residence(space, client, ledger, self._asked, self._explain)
        watch(self, space)

    # ------------------------------------------------------------ what the model's hooks tell, see hooks

    def enter(self, blocks: Iterable[Block], phase: str) -> None:
        """A module is going to compute with these."""
        self._residence.pin(blocks)
        for block in blocks:
            self.need(block, phase)

    def leave(self, blocks: Iterable[Block]) -> None:
        """It has."""
        self._residence.pin(blocks, -1)

    def need(self, block: Block, phase: str) -> None:
        """Have these weights here. Raises :class:`DownpourError`."""
        reserve = 0
        if block.kind == "trainable":
            if block not in self._missing:
                raise ModelError(
                    f"the weights of layer {block.name} are needed after its gradient has been pushed, and before "
                    "optimizer.step(): with fetch=layers a step is one forward, one backward and one step, and "
                    "evaluation comes after it. Accumulating gradients over several backwards needs fetch=whole"
                )
            if phase == "backward" and not self._layers.has_gradient(block):
                reserve = block.gradient_nbytes + block.layer.largest
        self._residence.need(block, phase, reserve)

    def before_gradient(self, parameter: nn.Parameter) -> None:
        """A gradient is going to be added to ``parameter.grad``. Raises :class:`ModelError` where that has left."""
        if isinstance(parameter.grad, PushedGradient):
            name = self._layers.place[parameter][1].name
            raise ModelError(
                f"parameter {name} gets another gradient, and the one before has been pushed: with fetch=layers a step "
                "is one backward, after optimizer.zero_grad(). Accumulating gradients over several needs fetch=whole; "
                "torch.utils.checkpoint needs use_reentrant=False"
            )

    def gradient_made(self, parameter: nn.Parameter) -> None:
        """The gradient of ``parameter`` is complete."""
        block, placed = self._layers.place[parameter]
        assert parameter.grad is not None
        made = parameter.grad.nbytes
        new = 0 if self._layers.has_gradient(block) else block.gradient_nbytes
        self._residence.make_room(made + new, f"the gradients of layer {block.name}")
        self.ledger.take(made + new)
        self._layers.take_gradient(block, placed)
        self.ledger.give(made)
        missing = self._missing[block]
        missing.discard(parameter)
        if not missing:
            self._send(block)

    # ------------------------------------------------------------ what the session asks

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:  # noqa: ARG002
        """See :class:`Engine`."""
        if skipped:
            raise ModelError("a step cannot be skipped with fetch=layers: its gradients have been pushed already")
        self._layers.check_frozen()
        self._complete()
        peak("layers", self.ledger.peak)
        self.counters.clock += 1

    def zero_gradients(self) -> None:
        """See :class:`Engine`."""
        if self._under_way_header is not None:
            raise ModelError(
                "optimizer.zero_grad() between backward and optimizer.step(): with fetch=layers gradients have been "
                "pushed by then and cannot be taken back. Call step after every backward, or train with fetch=whole"
            )
        self._layers.zero_gradients()

    def push(self, samples: int) -> None:
        """Not possible: gradients leave by themselves. Raises :class:`ModelError`."""
        raise ModelError(
            f"downpour.push({samples}) with fetch=layers: gradients leave during backward, and optimizer.step() "
            "completes them; train with fetch=whole to push by hand"
        )

    def flush(self) -> None:
        """See :class:`Engine`. A backward without a step is completed: others may wait for the rest of it."""
        if self._under_way_header is not None:
            self._complete()
        self._residence.drop_all()

    def round_is(self, number: int) -> None:
        """See :class:`Engine`."""
        if number > self._seq:
            self._seq = self.counters.clock = number
        self._round = self._seq
        self._residence.drop_all()

    def pull(self) -> None:
        """From now on the newest weights are fetched."""
        if self._under_way_header is None:
            self._residence.drop_all()

    def weights_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weights of one of the model's parameters; a buffer is here. Good until something else is fetched."""
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach()
        block, placed = self._layers.place[tensor]
        self.need(block, "reading")
        return self._layers.view(placed)

    # ------------------------------------------------------------ contributions

    def _asked(self) -> tuple[int, int]:
        if self._mode.synchronous:
            return self._round, -1
        awaits = self._mode.name != "async" or bool(self._mode.groups)
        bounded = awaits and self._round > self._first_round
        return -1, self._round - 1 if bounded else -1

    def _expect_all(self) -> None:
        self._missing = {block: {p.parameter for p in block.placed} for block in self._trainable}

    def _start(self) -> PushHeader:
        """The header of this step's contribution."""
        if self._under_way_header is None:
            if failpoints.on:
                failpoints.hit("worker.push.before")
            self._begin()
            self._counts(self._new_samples)
            self._new_samples = 0
            self.counters.pushes += 1
            self.counters.pulls += 1
            self._under_way_header = self._header()
        return self._under_way_header

    def _send(self, block: Block) -> None:
        header = self._start()
        del self._missing[block]
        self._residence.drop(block)
        self._residence.leaves(block, self._client.start_push(block.chunks, header, last=not self._missing))

    def _complete(self) -> None:
        """Push what has no gradient as zeros, wait for all, and let go of the weights of this step."""
        header = self._start()
        now = [wire.pack(options_of(group)) for group in self._optimizer.param_groups]
        if now != list(header.hyper):
            raise ModelError(
                "the optimizer's options (lr, …) have changed between backward and step: with fetch=layers they leave "
                "with the gradients during backward; change them after step, as schedulers do"
            )
        for block in [b for b in self._trainable if b in self._missing]:
            if not self._layers.has_gradient(block):
                self._residence.make_room(block.gradient_nbytes, f"the gradients of layer {block.name}")
                self.ledger.take(block.gradient_nbytes)
                self._layers.no_gradient(block)
            self._send(block)
        self._residence.all_gone()
        self._residence.drop_all()
        self._under_way_header = None
        self._round = self._seq
        self._expect_all()
        self.counters.wait_s += self._residence.waited_s
        self._residence.waited_s = 0.0
        if failpoints.on:
            failpoints.hit("worker.push.after")

    def _explain(self, error: NonFiniteContribution, block: Block) -> NonFiniteContribution:
        return explained(error, self.counters.clock, self._layers.non_finite_in(block))
