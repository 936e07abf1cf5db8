"""A model cut into pipeline stages: where, in a form that all ranks of a job can follow, and the stages themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from downpour.parallel import balance
from downpour.parallel.held import Held
from downpour.parallel.microbatch import arguments
from downpour.parallel.plan import Plan
from downpour.parallel.stages import Traced, bound, modules_of, trace, whole
from downpour_common.errors import ModelError

StageModule = fx.GraphModule
"""One stage: called with the model's arguments that it uses (:attr:`Cut.arguments`) and the values that come from other
stages (:meth:`Cut.received`); gives a tuple of the values it has for others (:meth:`Cut.sent`), or, if it is the last,
the model's output. Its modules are those of the unsplit model, by the same names."""


@dataclass(frozen=True, slots=True)
class Value:
    """What one stage computes and ``users``, other stages, need: it goes straight to each of them."""

    name: str
    source: int
    users: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a model is cut: chosen by one rank, followed by all (:meth:`to_json`, :meth:`from_json`).

    ``starts``: for each stage the number of its first call; ``given``: arguments that the model is called with;
    ``leaves``: modules that tracing did not look into; ``arguments``: those of them that each stage uses, by position;
    ``values``: what goes from stage to stage; ``seconds``: measured for each stage, forward and backward of one batch,
    where it was; ``fingerprint``: of the graph.
    """

    starts: tuple[int, ...]
    given: int
    leaves: tuple[str, ...]
    arguments: tuple[tuple[int, ...], ...]
    values: tuple[Value, ...]
    seconds: tuple[float, ...]
    fingerprint: str

    @property
    def count(self) -> int:
        """Stages."""
        return len(self.starts)

    def received(self, stage: int) -> tuple[Value, ...]:
        """What a stage gets from others, in the order of its arguments."""
        return tuple(value for value in self.values if stage in value.users)

    def sent(self, stage: int) -> tuple[Value, ...]:
        """What a stage has for others, in the order of its results."""
        return tuple(value for value in self.values if value.source == stage)

    def to_json(self) -> str:
        """The inverse of :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cut:
        """What :meth:`to_json` gave, in any process of the job."""
        raw: dict[str, Any] = json.loads(text)
        values = tuple(Value(v["name"], v["source"], tuple(v["users"])) for v in raw["values"])
        return cls(
            starts=tuple(raw["starts"]),
            given=raw["given"],
            leaves=tuple(raw["leaves"]),
            arguments=tuple(tuple(a) for a in raw["arguments"]),
            values=values,
            seconds=tuple(raw["seconds"]),
            fingerprint=raw["fingerprint"],
        )


def cut(
    model: nn.Module,
    example: Any,
    count: int,
    plan: Plan | None = None,
    *,
    widths: Sequence[int] = (),
    budget: int | None = None,
) -> Cut:
    """Where to cut ``model`` into ``count`` stages.

    ``example``: an input of the model, as it is trained with; a tuple's elements are its arguments. Without
    ``plan.split`` the calls are timed, and stages made so that the slowest is as fast as it can be; ``widths``: tensor
    ranks at each position of the pipeline, over which a stage's time and bytes are taken to spread; ``budget``: bytes
    that each rank may hold of weights, gradients and the activations of one ``example``. ``model`` stays as it is.

    Raises :class:`ModelError` for models that cannot be cut so, and says what to do.
    """
    given = arguments(example)
    leaves = whole(model, plan, count)
    traced = trace(model, len(given), leaves)
    leaves |= set(traced.leaves)
    blocked = bound(model, traced.work)
    seconds: tuple[float, ...] = ()
    if plan is not None and plan.split is not None and plan.split != "auto":
        starts = _given_starts(model, traced, plan.split, blocked, count)
    elif count == 1:
        starts = (0,)
    else:
        costs = balance.measure(model, traced, given)
        starts, seconds = balance.best(costs, blocked, count, widths, budget)
    return _described(traced, starts, len(given), leaves, seconds)


def stage_of(model: nn.Module, cut: Cut, stage: int) -> StageModule:
    """One stage of a cut model; it shares all modules and tensors with ``model``.

    Raises :class:`ModelError` if ``model`` is not the one that was cut.
    """
    traced = trace(model, cut.given, cut.leaves)
    if traced.fingerprint != cut.fingerprint:
        raise ModelError(
            "this rank has built another model than the rank that cut it into stages: scripts must build the same "
            "model on every rank, whatever they find in their environment"
        )
    names = {node.name: node for node in (*traced.inputs, *traced.work)}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for position in cut.arguments[stage]:
        node = traced.inputs[position]
        copies[node] = graph.placeholder(node.name)
    for value in cut.received(stage):
        copies[names[value.name]] = graph.placeholder(value.name)
    stops = (*cut.starts[1:], len(traced.work))

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr"
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in traced.work[cut.starts[stage] : stops[stage]]:
        copies[node] = graph.node_copy(node, copy)
    if stage == cut.count - 1:
        graph.output(fx.map_arg(traced.result.args[0], copy))
    else:
        graph.output(tuple(copies[names[value.name]] for value in cut.sent(stage)))
    made = StageModule(model, graph, f"Stage{stage}")
    made.training = model.training
    return made


def held_of(model: nn.Module, cut: Cut, stages: Sequence[int], names: Mapping[int, str]) -> list[Held]:
    """What a rank with these ``stages`` holds, before they are split further: one entry per tensor, in the order of
    ``names``, which gives tensors' names by their identity. What no stage uses belongs to the first."""
    users: Counter[int] = Counter()
    mine: set[int] = set()
    for stage in range(cut.count):
        used = {id(t) for t in _tensors(stage_of(model, cut, stage))}
        users.update(used)
        if stage in stages:
            mine |= used
    found = []
    for tensor in _tensors(model):
        if id(tensor) in names and (id(tensor) in mine or (users[id(tensor)] == 0 and 0 in stages)):
            tied = users[id(tensor)] > 1 and isinstance(tensor, nn.Parameter)
            found.append(Held(names[id(tensor)], tensor, None, "sum" if tied else "same"))
    return found


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return list({id(t): t for t in tensors}.values())


def _given_starts(
    model: nn.Module, traced: Traced, split: Sequence[str], blocked: Sequence[bool], count: int
) -> tuple[int, ...]:
    if len(split) != count - 1:
        raise ModelError(
            f"Plan(split=...) names {len(split)} module{'' if len(split) == 1 else 's'} before which a stage begins, "
            f"which makes {len(split) + 1} stages, and the job has {count}"
        )
    known = dict(model.named_modules())
    starts = [0]
    for name in split:
        if name not in known:
            raise ModelError(f"Plan(split=...): the model has no module {name!r}")
        at = [i for i, node in enumerate(traced.work) if name in modules_of(node)]
        if not at:
            raise ModelError(
                f"Plan(split=...): {name!r} is not called by itself, since the block around it could not be looked "
                "into: name that block, or one that forward calls directly"
            )
        if at[0] <= starts[-1]:
            raise ModelError(
                f"Plan(split=...): a stage that begins with {name!r} would leave the one before it empty; name modules "
                "in the order in which forward calls them, and not the first one"
            )
        if blocked[at[0]]:
            raise ModelError(
                f"Plan(split=...): {name!r} changes in place what the stage before has computed; begin the stage "
                "before or after it, or build it without inplace=True"
            )
        starts.append(at[0])
    return tuple(starts)


def _described(
    traced: Traced, starts: tuple[int, ...], given: int, leaves: set[str], seconds: tuple[float, ...]
) -> Cut:
    count = len(starts)
    stops = (*starts[1:], len(traced.work))
    stage = {node: s for s in range(count) for node in traced.work[starts[s] : stops[s]]}
    positions = {node: position for position, node in enumerate(traced.inputs)}
    used: list[set[int]] = [set() for _ in range(count)]
    users: dict[fx.Node, set[int]] = {}
    for node, at in [*stage.items(), (traced.result, count - 1)]:
        for source in node.all_input_nodes:
            if source in positions:
                used[at].add(positions[source])
            elif source in stage and stage[source] != at:
                users.setdefault(source, set()).add(at)
    values = [Value(n.name, stage[n], tuple(sorted(users[n]))) for n in traced.work if n in users]
    return Cut(
        starts=starts,
        given=given,
        leaves=tuple(sorted(leaves)),
        arguments=tuple(tuple(sorted(each)) for each in used),
        values=tuple(values),
        seconds=seconds,
        fingerprint=traced.fingerprint,
    )
