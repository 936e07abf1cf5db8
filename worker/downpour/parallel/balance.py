"""Stages of equal cost: every call of a model is timed, and the best places to cut are found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as trees

from downpour.parallel.stages import Traced
from downpour_common.errors import ModelError

ROUNDS = 3
BYTES_PER_SECOND = 2e9
"""What a value that goes from stage to stage is taken to cost; it decides between cuts that are nearly as good."""


@dataclass(frozen=True, slots=True)
class Costs:
    """For every call: seconds forward and backward, bytes of what it gives, and of its parameters and gradients by
    tensor; ``crossing``: bytes that go from stage to stage if one begins with this call."""

    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    parameters: tuple[tuple[tuple[int, int], ...], ...]
    crossing: tuple[int, ...]


def measure(model: nn.Module, traced: Traced, given: Sequence[Any]) -> Costs:
    """Run every call forward and backward and see what it costs. Weights, gradients, buffers and random numbers stay
    as they are."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            runs = [_run(model, traced, given) for _ in range(ROUNDS)]
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
    seconds = tuple(min(times) for times in zip(*(run[0] for run in runs), strict=True))
    sizes = runs[0][1]
    return Costs(seconds, sizes, tuple(_parameters(model, node) for node in traced.work), _crossing(traced, sizes))


def _run(model: nn.Module, traced: Traced, given: Sequence[Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    runner = _Runner(fx.GraphModule(model, traced.result.graph))
    values: dict[fx.Node, Any] = dict(zip(traced.inputs, given, strict=True))
    left = {node: len(node.users) for node in (*traced.inputs, *traced.work)}
    seconds, sizes = [], []
    for node in traced.work:
        for source in node.all_input_nodes:
            if source not in values:
                values[source] = runner.fetch_attr(str(source.target))
        took, value = runner.timed(node, values)
        values[node] = value
        seconds.append(took)
        sizes.append(sum(t.numel() * t.element_size() for t in _of(value)))
        for source in node.all_input_nodes:
            if source in left:
                left[source] -= 1
                if left[source] == 0:
                    del values[source]
    return tuple(seconds), tuple(sizes)


class _Runner(fx.Interpreter):
    """Runs single calls, each as if it were a model of its own."""

    def timed(self, node: fx.Node, values: dict[fx.Node, Any]) -> tuple[float, Any]:
        """Seconds of ``node``, forward and backward, and its value without a history."""
        inputs: list[torch.Tensor] = []

        def fresh(source: fx.Node) -> Any:
            def leaf(tensor: torch.Tensor) -> torch.Tensor:
                if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
                    return tensor
                # The copy lets calls work in place, and keeps what they do from the values of others.
                start = tensor.detach().requires_grad_()
                inputs.append(start)
                return start.clone()

            return trees.tree_map_only(torch.Tensor, leaf, values[source])

        args, kwargs = fx.map_arg((node.args, node.kwargs), fresh)
        _settle(values)
        begin = time.perf_counter()
        with torch.enable_grad():
            value = getattr(self, node.op)(node.target, args, kwargs)
        outputs = [t for t in _of(value) if t.requires_grad]
        if outputs:
            module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            weights = [p for p in module.parameters() if p.requires_grad] if module is not None else []
            seeds = [torch.ones_like(t) for t in outputs]
            torch.autograd.grad(outputs, [*inputs, *weights], seeds, allow_unused=True)
        _settle(values)
        took = time.perf_counter() - begin
        return took, trees.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in trees.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _settle(values: dict[fx.Node, Any]) -> None:
    if torch.cuda.is_available() and any(t.is_cuda for v in values.values() for t in _of(v)):
        torch.cuda.synchronize()


def _parameters(model: nn.Module, node: fx.Node) -> tuple[tuple[int, int], ...]:
    found: list[torch.Tensor] = []
    if node.op == "call_module":
        found += model.get_submodule(str(node.target)).parameters()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            holder, _, name = str(source.target).rpartition(".")
            found.append(getattr(model.get_submodule(holder), name))
    return tuple((id(t), t.numel() * t.element_size() * (2 if t.requires_grad else 1)) for t in found)


def _crossing(traced: Traced, sizes: Sequence[int]) -> tuple[int, ...]:
    at = {node: index for index, node in enumerate(traced.work)}
    found = [0] * len(traced.work)
    for index, node in enumerate(traced.work):
        last = max((at.get(user, len(traced.work) - 1) for user in node.users), default=index)
        for begin in range(index + 1, last + 1):
            found[begin] += sizes[index]
    return tuple(found)


def best(
    costs: Costs, blocked: Sequence[bool], count: int, widths: Sequence[int] = (), budget: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The first call of each of ``count`` stages, such that the slowest stage is as fast as it can be, and each stage's
    seconds. No stage begins where ``blocked`` says so, and none holds more than ``budget`` bytes per rank.

    Raises :class:`ModelError` if there is no such cut.
    """
    calls = len(costs.seconds)
    places = [i for i in range(calls) if i == 0 or not blocked[i]] + [calls]
    width = [widths[s % len(widths)] if widths else 1 for s in range(count)]
    until = [0.0]
    for seconds in costs.seconds:
        until.append(until[-1] + seconds)
    moved = [*costs.crossing, 0]

    def price(stage: int, begin: int, end: int) -> float:
        both_ways = 2 * (moved[begin] + moved[end]) / BYTES_PER_SECOND
        # A stage without weights only is made where there is nothing else: it would save its rank no memory.
        idle = 0.0 if any(costs.parameters[begin:end]) else until[-1]
        return (until[end] - until[begin]) / width[stage] + both_ways + idle

    def fits(stage: int, begin: int, end: int) -> bool:
        if budget is None:
            return True
        weights = {key: size for call in costs.parameters[begin:end] for key, size in call}
        return (sum(weights.values()) + sum(costs.bytes[begin:end])) / width[stage] <= budget

    # reached[p]: the best way to cover all calls before place p with the stages so far: the slowest one's price, their
    # squares' sum (which decides between equals), and where each begins.
    reached: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(count):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for begin, (slowest, squares, starts) in reached.items():
            for end in places:
                last = stage == count - 1
                if end <= begin or (last and end != calls) or not fits(stage, begin, end):
                    continue
                cost = price(stage, begin, end)
                way = (max(slowest, cost), squares + cost * cost, (*starts, begin))
                if end not in following or way < following[end]:
                    following[end] = way
        reached = following
    if calls not in reached:
        if len(places) - 1 < count:
            raise ModelError(
                f"the model's forward makes {len(places) - 1} calls between which it can be cut, which is not enough "
                f"for {count} pipeline stages: ask for fewer (--pipeline, --interleave), or build it of more modules"
            )
        raise ModelError(
            f"no cut into {count} stages keeps each rank within {budget} bytes of weights, gradients and activations: "
            "ask for more stages (--pipeline), more tensor ranks (--tensor) or smaller batches"
        )
    starts = reached[calls][2]
    return starts, tuple(until[end] - until[begin] for begin, end in pairwise((*starts, calls)))
