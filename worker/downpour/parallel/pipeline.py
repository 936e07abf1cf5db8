"""A replica whose model is cut into stages: its ranks compute the micro-batches of a batch side by side."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as trees

from downpour import spans
from downpour.parallel.group import Group
from downpour.parallel.microbatch import Criterion, arguments, batch_size, joined, part_sizes, parts
from downpour.parallel.pipeline_mail import Mail
from downpour.parallel.schedule import Action, fitting, forwards, orders
from downpour.parallel.split import Cut, StageModule, Value
from downpour_common.errors import ModelError
from downpour_common.replicas import Schedule


@dataclass(slots=True)
class _Step:
    """A batch under way. ``given``, ``wanted``: by micro-batch; ``saved``: by stage and micro-batch, what backward
    needs: the values received and those computed for others."""

    train: bool
    given: list[tuple[Any, ...]]
    wanted: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    criterion: Criterion | None = None
    loss: torch.Tensor | None = None
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    saved: dict[tuple[int, int], tuple[list[Any], list[Any]]] = field(default_factory=dict)


class Pipeline:
    """This rank's stages, by number, and its part in the schedule. All methods are collective in the replica.

    Stage ``s`` is at position ``s % len(widths)``. The tensor ranks of a position do the same. Gradients add up in
    ``.grad`` as backward leaves them; those of tensors that several stages use are each stage's own share.
    """

    def __init__(
        self, group: Group, stages: Mapping[int, StageModule], cut: Cut, schedule: Schedule, microbatches: int
    ) -> None:
        self._group = group
        self._stages = dict(stages)
        self._cut = cut
        self._schedule: Schedule = schedule
        self._microbatches = microbatches
        self._positions = len(group.place.widths)
        self._mail = Mail(group, cut)
        wanted = [s for s in range(cut.count) if s % self._positions == group.place.stage]
        if sorted(self._stages) != wanted:
            raise ModelError(f"rank {group.place.rank} runs the stages {wanted}, and is given {sorted(self._stages)}")
        if cut.count % self._positions or (schedule != "interleaved" and cut.count != self._positions):
            raise ModelError(f"{cut.count} stages do not fit {self._positions} positions under the schedule {schedule}")
        self._last_head = group.place.head_of(self._positions - 1)

    def forward_backward(self, criterion: Criterion, inputs: Any, targets: Any) -> torch.Tensor:
        """Forward and backward of one batch, which all ranks have; gives its mean loss, detached, on all ranks.

        ``criterion`` is called in the last stage only, with micro-batches, and gives means over their samples.
        """
        samples, sizes = self._sizes(inputs)
        step = _Step(True, [arguments(part) for part in parts(inputs, samples, sizes)], parts(targets, samples, sizes))
        step.weights, step.criterion = [size / samples for size in sizes], criterion
        with torch.enable_grad():
            self._run(step, orders(self._schedule, self._positions, self._cut.count, len(sizes)))
        loss = torch.zeros((), dtype=torch.float64, device=self._group.device)
        if step.loss is not None:
            loss.copy_(step.loss)
        dist.broadcast(loss, self._last_head, group=self._group.all)
        return loss.to(torch.get_default_dtype())

    def forward(self, inputs: Any) -> Any:
        """The model's output for ``inputs``, which all ranks have, without a history; the same on all ranks."""
        samples, sizes = self._sizes(inputs)
        step = _Step(False, [arguments(part) for part in parts(inputs, samples, sizes)])
        with torch.no_grad():
            self._run(step, forwards(self._positions, self._cut.count, len(sizes)))
            whole = joined([step.outputs[m] for m in range(len(sizes))], sizes) if step.outputs else None
            return self._spread(whole, self._last_head)

    def _sizes(self, inputs: Any) -> tuple[int, list[int]]:
        given = len(arguments(inputs))
        if given != self._cut.given:
            raise ModelError(
                f"the model was cut into stages for {self._cut.given} argument{'' if self._cut.given == 1 else 's'}, "
                f"and is called with {given}"
            )
        samples = batch_size(inputs)
        count = fitting(self._schedule, self._positions, max(1, min(samples, self._microbatches)))
        return samples, part_sizes(samples, count)

    # ------------------------------------------------------------ a step

    def _run(self, step: _Step, all_orders: Sequence[Sequence[Action]]) -> None:
        self._mail.begin(all_orders, [_signature(given, step.train) for given in step.given])
        for action in all_orders[self._group.place.stage]:
            if action.kind == "forward":
                self._forward(step, action.stage, action.microbatch)
            else:
                self._backward(step, action.stage, action.microbatch)
        self._mail.end()

    def _forward(self, step: _Step, stage: int, microbatch: int) -> None:
        received = [self._mail.value(value, stage, microbatch) for value in self._cut.received(stage)]
        given = step.given[microbatch]
        with spans.span("forward", stage=stage, microbatch=microbatch):
            module = self._stages[stage]
            found = module(*(given[position] for position in self._cut.arguments[stage]), *received)
            if stage == self._cut.count - 1:
                self._finish(step, found, microbatch)
        sent: list[Any] = []
        if stage < self._cut.count - 1:
            sent = list(found)
            for value, each in zip(self._cut.sent(stage), sent, strict=True):
                self._mail.send_value(value, each, microbatch)
        if step.train:
            step.saved[stage, microbatch] = (received, sent)
        else:
            self._mail.settle(stage, microbatch - self._window, gradients=False)

    def _finish(self, step: _Step, output: Any, microbatch: int) -> None:
        """The end of the last stage's forward."""
        if step.criterion is None:
            step.outputs[microbatch] = output
            return
        loss = step.criterion(output, step.wanted[microbatch])
        if len(step.weights) > 1:
            loss = loss * step.weights[microbatch]
        step.losses[microbatch] = loss
        step.loss = loss.detach() if step.loss is None else step.loss + loss.detach()

    def _backward(self, step: _Step, stage: int, microbatch: int) -> None:
        received, sent = step.saved.pop((stage, microbatch))
        gradients = [self._gradient(value, microbatch) for value in self._cut.sent(stage)]
        # Whoever has sent a gradient back has taken the value before.
        if any(gradient is not None for gradient in gradients):
            self._mail.settle(stage, microbatch, gradients=False)
        self._mail.settle(stage, microbatch - self._window, gradients=True)
        with spans.span("backward", stage=stage, microbatch=microbatch):
            if stage == self._cut.count - 1:
                loss = step.losses.pop(microbatch)
                if loss.requires_grad:
                    torch.autograd.backward(loss)
            else:
                pairs = [(s, g) for s, g in zip(sent, gradients, strict=True) if g is not None]
                if pairs:
                    torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
        for value, leaf in zip(self._cut.received(stage), received, strict=True):
            learns = isinstance(leaf, torch.Tensor) and leaf.requires_grad
            gradient = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) if learns else None
            self._mail.send_gradient(value, stage, gradient, microbatch)

    def _gradient(self, value: Value, microbatch: int) -> torch.Tensor | None:
        """What all users of a value say about it."""
        total: torch.Tensor | None = None
        for user in value.users:
            gradient = self._mail.gradient(value, user, microbatch)
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return total

    @property
    def _window(self) -> int:
        """After so many more micro-batches a message has been taken, under any of the schedules."""
        return 2 * self._cut.count + self._positions

    def _spread(self, output: Any, source: int) -> Any:
        """An output of the rank ``source`` on all ranks."""
        mine = self._group.place.rank == source
        leaves, form = trees.tree_flatten(output)
        if mine:
            described = [
                [list(leaf.shape), str(leaf.dtype).removeprefix("torch.")] if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]
            tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
            text = json.dumps([described, tensors, trees.treespec_dumps(form)]).encode()
            self._group.broadcast_bytes(text, source)
        else:
            described, tensors, shape = json.loads(self._group.broadcast_bytes(source=source))
            form = trees.treespec_loads(shape)
            leaves = [
                torch.empty(each[0], dtype=getattr(torch, each[1]), device=self._group.device) if is_tensor else each
                for each, is_tensor in zip(described, tensors, strict=True)
            ]
        leaves = [leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._group.broadcast([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], source)
        return trees.tree_unflatten(leaves, form)


def _signature(given: tuple[Any, ...], train: bool) -> Hashable:
    """What the forms of all values of a micro-batch follow from, as far as one can see."""
    autocast = [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    leaves = [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in trees.tree_leaves(given)
    ]
    return (train, *autocast, *leaves)
