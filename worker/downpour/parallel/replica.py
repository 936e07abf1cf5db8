"""A replica that is a group of workers, as one of its ranks sees it: joined, split, kept equal where it must be."""

from __future__ import annotations

import contextlib
import copy
import datetime
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore

from downpour import takeover
from downpour.clipping import OverRanks, across
from downpour.context import WorkerContext
from downpour.control import Control
from downpour.model import Described
from downpour.parallel import held as holding
from downpour.parallel.group import Group
from downpour.parallel.held import Held, Shared
from downpour.parallel.pipeline import Pipeline
from downpour.parallel.plan import Plan
from downpour.parallel.relay import Relay
from downpour.parallel.split import Cut, cut, held_of, stage_of
from downpour.parallel.tensor import split_tensor
from downpour.scaler import agreeing
from downpour.space import local
from downpour.spans import span
from downpour.takeover import Beginning
from downpour_common import wire
from downpour_common.errors import ModelError, PeerTimeout

PLAN_KEY = "plan"
_LOOPBACK = "127.0.0.1"


def join(context: WorkerContext, control: Control, device: torch.device) -> Group:
    """Meet the other ranks of the replica; the lead's store is where. Raises :class:`PeerTimeout`."""
    place = context.place
    key = f"group/{context.replica}/{context.worker_epoch}"
    seconds = context.start_timeout_s
    if place.rank == 0:
        # Left to itself the store would listen on all of the host's addresses.
        listening = socket.create_server((_LOOPBACK, 0))
        port = listening.getsockname()[1]
        store = _store(_LOOPBACK, port, seconds, listening.detach())
        control.agree(key, f"{_LOOPBACK}:{port}".encode())
    else:
        host, _, text = control.agree(key).decode().rpartition(":")
        store = _store(host, int(text), seconds)
    try:
        return Group(place, store, device, context.timeout_s)
    except dist.DistError as error:
        raise PeerTimeout(f"replica {context.replica}", f"its {place.ranks} ranks to meet ({error})", seconds) from None


def _store(host: str, port: int, seconds: float, listening: int | None = None) -> TCPStore:
    """``listening``: a socket's number, where the store is kept."""
    deadline, keeps = datetime.timedelta(seconds=seconds), listening is not None
    return TCPStore(host, port, is_master=keeps, timeout=deadline, wait_for_workers=False, master_listen_fd=listening)


@dataclass(slots=True)
class _Set:
    """Tensors that the same ranks hold, owned by the first of them."""

    group: dist.ProcessGroup | None
    owner: int
    weights: list[torch.Tensor]
    terms: list[nn.Parameter]
    """those of them whose gradients are to be added up"""
    alike: int
    """ranks among them that have the same gradients as this one: those of its stage"""


class Replica:
    """This rank's part of the model, and what it has in common with the other ranks. Collective but where noted."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.relay = Relay(group)
        self.pipeline: Pipeline | None = None
        self.held: tuple[Held, ...] = ()
        self._skeleton: nn.Module | None = None
        self._sets: list[_Set] = []
        self._guests: list[nn.Parameter] = []
        """parameters here that another rank pushes and pulls"""
        self.stages: tuple[nn.Module, ...] = ()
        """what this rank runs of a pipeline"""
        self._added_up = False
        self._together = contextlib.ExitStack()

    @property
    def leads(self) -> bool:
        """Whether this rank is its replica's lead."""
        return self.group.place.rank == 0

    # ------------------------------------------------------------ splitting

    def split(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        described: Described,
        plan: Plan | None,
        context: WorkerContext,
        example: Callable[[], Any],
        agree: Callable[[str, bytes | None], bytes],
    ) -> Described:
        """Keep of ``model``, in place, what this rank holds, and point ``optimizer`` at that.

        ``described``: the whole model. ``example``: an input of the model, on the lead. ``agree``: see
        :meth:`downpour.control.Control.agree`. Returns what this rank pushes and pulls, with the job's whole spec.
        """
        place = self.group.place
        self._skeleton = _skeleton(model, described)
        names = {id(t): name for name, t in described.tensors.items()}
        groups = _groups(optimizer, names)
        if len(place.widths) > 1:
            found = self._cut(model, plan, context, example, agree)
            mine = [s for s in range(found.count) if s % len(place.widths) == place.stage]
            stages = {s: stage_of(model, found, s) for s in mine}
            rows = {h.name: h for h in held_of(model, found, mine, names)}
            tied = {name for name, h in rows.items() if h.sharing == "sum"}
            for stage in stages.values():
                split = split_tensor(stage, self.group, plan, names, tied)
                rows |= {h.name: replace(h, sharing=rows[h.name].sharing) for h in split}
            self.held = tuple(rows.values())
            self.stages = tuple(stages.values())
            self.pipeline = Pipeline(self.group, stages, found, context.schedule, context.parts)
            _drop_the_rest(described, self.held)
            _run_by(model, self.pipeline)
        else:
            self.held = tuple(split_tensor(model, self.group, plan, names))
        if optimizer is not None:
            _point(optimizer, groups, self.held)
        ranks = [holding.decode(data) for data in self.group.gather_bytes(holding.encode(self.held))]
        if self.leads and all(rows == ranks[0] and not any(part for _, part, _ in rows) for rows in ranks):
            warnings.warn(
                "no layer of the model is split, and all ranks of a replica compute the same: name layers in "
                "downpour.Plan(tensor={...}), or go without --tensor",
                stacklevel=2,
            )
        space = holding.assemble(described.spec, ranks)
        self._share(space.shared)
        self._judge_together()
        return Described(space.spec, holding.of_rank(self.held, space.shared, place.rank), described.device)

    def _cut(
        self,
        model: nn.Module,
        plan: Plan | None,
        context: WorkerContext,
        example: Callable[[], Any],
        agree: Callable[[str, bytes | None], bytes],
    ) -> Cut:
        """The first replica's lead chooses for the whole job."""
        count = len(context.widths) * (context.interleave if context.schedule == "interleaved" else 1)
        text = b""
        if self.leads:
            chosen = None
            if context.replica == 0:
                chosen = (
                    cut(model, example(), count, plan, widths=context.widths, budget=context.memory or None)
                    .to_json()
                    .encode()
                )
            text = agree(PLAN_KEY, chosen)
        return Cut.from_json(self.group.broadcast_bytes(text).decode())

    def _share(self, shared: Sequence[Shared]) -> None:
        place, by_name = self.group.place, {h.name: h for h in self.held}
        for ranks in sorted({s.ranks for s in shared}):
            made = dist.new_group(list(ranks)) if ranks != tuple(range(place.ranks)) else self.group.all
            if place.rank not in ranks:
                continue
            tensors = [(s, by_name[s.name].tensor) for s in shared if s.ranks == ranks]
            terms = [t for s, t in tensors if s.sharing == "sum" and isinstance(t, nn.Parameter)]
            alike = len(set(ranks) & set(place.ranks_of(place.stage)))
            self._sets.append(_Set(made, ranks[0], [t for _, t in tensors], terms, alike))
            if ranks[0] != place.rank:
                self._guests += [t for _, t in tensors if isinstance(t, nn.Parameter)]

    # ------------------------------------------------------------ every step

    def _judge_together(self) -> None:
        """Norms for clipping, and scalers, are of all ranks' gradients from now on."""
        guests = {id(p) for p in self._guests}
        parameters = [h.tensor for h in self.held if h.tensor.requires_grad]
        owned = [p for p in parameters if id(p) not in guests]
        settle = partial(self.add_up_gradients, early=True)
        self._together.enter_context(across(OverRanks(self.group, parameters, owned, settle)))
        self._together.enter_context(agreeing(self.group))

    def add_up_gradients(self, early: bool = False) -> None:
        """Before a push: the owners get the gradients of tensors that several stages use. ``early``: it is for a norm,
        and the push that follows finds it done."""
        done, self._added_up = self._added_up, early
        if done:
            return
        for each in self._sets:
            for parameter in each.terms:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient = local(parameter.grad)
                if each.alike > 1:
                    gradient.div_(each.alike)
                with span("exchange", bytes=2 * gradient.nbytes):
                    dist.all_reduce(gradient, group=each.group)

    def spread_weights(self) -> None:
        """After a fetch: what is held by several ranks comes from its owner."""
        with torch.no_grad():
            for each in self._sets:
                weights = [local(t) for t in each.weights]
                if len(weights) == 1:
                    with span("exchange", bytes=weights[0].nbytes):
                        dist.broadcast(weights[0].data, each.owner, group=each.group)
                    continue
                for dtype in sorted({t.dtype for t in weights}, key=str):
                    alike = [t for t in weights if t.dtype == dtype]
                    flat = torch.cat([t.detach().reshape(-1) for t in alike])
                    with span("exchange", bytes=flat.nbytes):
                        dist.broadcast(flat, each.owner, group=each.group)
                    if each.owner != self.group.place.rank:
                        at = 0
                        for tensor in alike:
                            tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
                            at += tensor.numel()

    def zero_gradients(self) -> None:
        """Not collective: those of parameters that another rank pushes."""
        self._added_up = False
        for parameter in self._guests:
            parameter.grad = None

    def greatest(self, number: int) -> int:
        """Of what each rank gives."""
        return int(self.group.reduce(torch.tensor([number]), "max"))

    def together(self, begins: Beginning) -> Beginning:
        """Where the replica goes on, if this rank could at ``begins``."""
        mine = wire.pack([begins.seq, begins.position or []])
        ranks = [cast(list[Any], wire.unpack(data)) for data in self.group.gather_bytes(mine)]
        others = [Beginning(seq, 0, (place[0], place[1]) if place else None) for seq, place in ranks]
        return takeover.together([begins, *others])

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.greatest(0)

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, if it is set on any rank."""
        found = self.group.reduce(torch.tensor([int(flag) for flag in flags]), "max")
        return tuple(bool(flag) for flag in found)

    # ------------------------------------------------------------ the whole model

    def unsplit(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
        """Not collective: the model as the script has made it, with these ``tensors`` by their names."""
        assert self._skeleton is not None
        memo: dict[int, Any] = {}
        for name, tensor in self._skeleton.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and id(tensor) not in memo:
                filled = tensors[name].to(device)
                memo[id(tensor)] = (
                    nn.Parameter(filled, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else filled
                )
        return copy.deepcopy(self._skeleton, memo)

    def close(self) -> None:
        """Not collective: see :meth:`Group.close`."""
        self._together.close()
        self.group.close()


def _skeleton(model: nn.Module, described: Described) -> nn.Module:
    """``model`` without its weights."""
    memo: dict[int, Any] = {}
    for tensor in described.tensors.values():
        empty = torch.empty_like(tensor, device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)


def _groups(optimizer: torch.optim.Optimizer | None, names: Mapping[int, str]) -> list[list[str]]:
    if optimizer is None:
        return []
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _point(optimizer: torch.optim.Optimizer, groups: list[list[str]], held: Sequence[Held]) -> None:
    here = {h.name: h.tensor for h in held}
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [here[name] for name in names if name in here]


def _drop_the_rest(described: Described, held: Sequence[Held]) -> None:
    """Give back the memory of what other stages hold."""
    here = {h.name for h in held}
    for name, tensor in described.tensors.items():
        if name not in here:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.grad = None


def _run_by(model: nn.Module, pipeline: Pipeline) -> None:
    """Let calls of ``model`` go through all stages."""

    def forward(*inputs: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            raise ModelError(
                "a model in pipeline stages has no loss here to go back from: replace model(x), the loss and "
                "loss.backward() by loss = downpour.forward_backward(model, criterion, x, y); under torch.no_grad() "
                "all ranks of a replica may call the model together"
            )
        if named:
            raise ModelError("a model in pipeline stages takes positional arguments only")
        return pipeline.forward(inputs if len(inputs) != 1 else inputs[0])

    model.forward = forward
