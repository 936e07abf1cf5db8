"""What goes between the stages of a pipeline: values forward, their gradients back, each straight to where it is used.

The heads of the stages send and receive; a head passes what it gets on to the other tensor ranks of its stage. Messages
have no names on the way: each rank knows from the schedule what each other rank sends it, in which order, and takes it
in that order. Shapes need not be known before: the first value of a kind comes with a description, and the description
holds for all batches of the same form.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from downpour import spans
from downpour.parallel.group import Group
from downpour.parallel.schedule import Action
from downpour.parallel.split import Cut, Value
from downpour_common.errors import ModelError

HEADER = 512
"""Bytes of a description."""


class Key(NamedTuple):
    """A message of a step: a value for the stage ``user``, or its gradient from there."""

    name: str
    user: int
    microbatch: int
    gradient: bool


@dataclass(frozen=True, slots=True)
class Form:
    """What a value looks like; ``plain``: it is no tensor, and is in the description itself."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    learns: bool = False
    """whether a gradient comes back for it"""
    plain: bool = False


@dataclass(slots=True)
class _Sent:
    work: Any
    tensor: torch.Tensor


class Mail:
    """One rank's messages. ``positions``: of the pipeline, at which stages take turns."""

    def __init__(self, group: Group, cut: Cut) -> None:
        self._group = group
        self._cut = cut
        self._place = group.place
        self._positions = len(group.place.widths)
        self._head = group.place.tensor_rank == 0
        # NCCL works through what two ranks say to each other in one order, so each direction gets a group of its own.
        self._up = self._down = group.heads
        if group.device.type != "cpu":
            heads = [group.place.head_of(s) for s in range(self._positions)]
            down = dist.new_group(heads, timeout=group.deadline)
            self._down = down if self._head else None
        self._forms: dict[tuple[str, int, Hashable], Form] = {}
        """of values received or sent, by name, user and form of the batch, as far as this rank has used them"""
        self._announced: dict[tuple[str, int, Hashable], Form] = {}
        """of values that a head has received"""
        self._expected: dict[int, deque[Key]] = {}
        self._arrived: dict[Key, tuple[Any, Any]] = {}
        """of remote ones the transfer and the memory, of local ones None and the value"""
        self._sent: dict[tuple[int, int, bool], list[_Sent]] = {}
        self._signatures: Sequence[Hashable] = ()

    # ------------------------------------------------------------ a step

    def begin(self, orders: Sequence[Sequence[Action]], signatures: Sequence[Hashable]) -> None:
        """A step in which the positions do ``orders``; ``signatures``: the form of each micro-batch, equal on all
        ranks."""
        self._signatures = signatures
        self._arrived.clear()
        me = self._place.stage
        self._expected = {
            peer: deque(key for action in orders[peer] for key in self._messages(action, me))
            for peer in range(self._positions)
            if peer != me
        }

    def _messages(self, action: Action, to: int) -> list[Key]:
        """What an action sends to a position, in order."""
        if action.kind == "forward":
            pairs = [(value, user) for value in self._cut.sent(action.stage) for user in value.users]
            found = [Key(v.name, user, action.microbatch, False) for v, user in pairs if user % self._positions == to]
        else:
            values = self._cut.received(action.stage)
            found = [
                Key(v.name, action.stage, action.microbatch, True) for v in values if v.source % self._positions == to
            ]
        return found

    def end(self) -> None:
        """Wait until all that was sent has been taken."""
        for key in list(self._sent):
            self._settle(key)

    def settle(self, stage: int, microbatch: int, gradients: bool) -> None:
        """Wait until what a stage has sent of a micro-batch has been taken, and let go of it."""
        self._settle((stage, microbatch, gradients))

    def _settle(self, key: tuple[int, int, bool]) -> None:
        sent = self._sent.pop(key, None)
        if sent:
            with spans.span("send", stage=key[0], microbatch=key[1]):
                for each in sent:
                    each.work.wait()

    # ------------------------------------------------------------ sending

    def send_value(self, value: Value, given: Any, microbatch: int) -> None:
        """Give what a stage has computed to all that use it."""
        signature = self._signatures[microbatch]
        form = _form(given)
        for user in value.users:
            key = Key(value.name, user, microbatch, False)
            known = self._forms.get((value.name, user, signature))
            if known is not None and known != form:
                raise ModelError(
                    f"{value.name} goes from stage {value.source} to stage {user}, and changes its form ({known} was, "
                    f"{form} is) while inputs keep theirs: let shapes not depend on what is in the inputs"
                )
            self._forms[(value.name, user, signature)] = form
            if user % self._positions == self._place.stage:
                self._arrived[key] = (None, given.detach() if isinstance(given, torch.Tensor) else given)
            elif self._head:
                self._post(value.source, user, key, given, form, announce=known is None or form.plain)

    def send_gradient(self, value: Value, user: int, gradient: torch.Tensor | None, microbatch: int) -> None:
        """Give the gradient of a received value back to where it came from; None: nobody needs one."""
        key = Key(value.name, user, microbatch, True)
        if gradient is None:
            return
        if value.source % self._positions == self._place.stage:
            self._arrived[key] = (None, gradient)
        elif self._head:
            self._post(user, value.source, key, gradient, None, announce=False)

    def _post(self, stage: int, to: int, key: Key, given: Any, form: Form | None, *, announce: bool) -> None:
        kept = self._sent.setdefault((stage, key.microbatch, key.gradient), [])
        size = given.numel() * given.element_size() if isinstance(given, torch.Tensor) else 0
        with spans.span("send", stage=stage, microbatch=key.microbatch, bytes=size):
            if announce:
                assert form is not None
                self._isend(kept, _packed(form, given), to)
            if isinstance(given, torch.Tensor):
                self._isend(kept, given.detach().contiguous(), to)

    def _isend(self, kept: list[_Sent], tensor: torch.Tensor, to: int) -> None:
        position = to % self._positions
        group = self._up if position > self._place.stage else self._down
        kept.append(_Sent(dist.isend(tensor, self._place.head_of(position), group=group), tensor))

    # ------------------------------------------------------------ receiving

    def value(self, value: Value, user: int, microbatch: int) -> Any:
        """A value for the stage ``user``, without a history; a tensor that learns is a leaf that wants a gradient."""
        key = Key(value.name, user, microbatch, False)
        at = (value.name, user, self._signatures[microbatch])
        if value.source % self._positions == self._place.stage:
            given = self._arrived.pop(key)[1]
        else:
            given = self._from_peer(key, value.source, user, at)
        if isinstance(given, torch.Tensor) and self._forms[at].learns and torch.is_grad_enabled():
            given.requires_grad_()
        return given

    def gradient(self, value: Value, user: int, microbatch: int) -> torch.Tensor | None:
        """The gradient of a value that this rank's stage has given to ``user``; None if it does not learn."""
        key = Key(value.name, user, microbatch, True)
        form = self._forms[(value.name, user, self._signatures[microbatch])]
        if not form.learns:
            return None
        if user % self._positions == self._place.stage:
            found: torch.Tensor = self._arrived.pop(key)[1]
            return found
        gradient: torch.Tensor
        with spans.span("receive", stage=value.source, microbatch=microbatch, bytes=_bytes(form)):
            if self._head:
                gradient = self._take(key, user % self._positions)
            else:
                gradient = torch.empty(form.shape, dtype=form.dtype, device=self._group.device)
            self._within(gradient)
        return gradient

    def _from_peer(self, key: Key, source: int, user: int, at: tuple[str, int, Hashable]) -> Any:
        known = self._forms.get(at)
        with spans.span("receive", stage=user, microbatch=key.microbatch, bytes=0 if known is None else _bytes(known)):
            given: Any = self._take(key, source % self._positions) if self._head else None
            if known is None or known.plain:
                header = torch.zeros(HEADER, dtype=torch.uint8)
                if self._head:
                    header = _packed(self._announced[at], given)
                self._within(header)
                known, plain = _unpacked(header)
                self._forms[at] = known
                if known.plain:
                    return plain
            if not self._head:
                given = torch.empty(known.shape, dtype=known.dtype, device=self._group.device)
            self._within(given)
        return given

    def _within(self, tensor: torch.Tensor) -> None:
        """From the head to the tensor ranks of its stage."""
        if self._place.width > 1:
            dist.broadcast(tensor, self._place.head_of(self._place.stage), group=self._group.tensor)

    def _take(self, key: Key, peer: int) -> Any:
        """On a head: what ``peer`` sends under ``key``, once all that it has sent before is here, too."""
        expected = self._expected[peer]
        while key not in self._arrived:
            self._receive(expected.popleft(), peer)
        # The next one may come while this rank computes.
        if expected and self._known(expected[0]) is not None:
            self._receive(expected.popleft(), peer)
        work, given = self._arrived.pop(key)
        if work is not None:
            work.wait()
        return given

    def _known(self, key: Key) -> Form | None:
        """The form of a message, if it comes without a description."""
        forms = self._forms if key.gradient else self._announced
        form = forms.get((key.name, key.user, self._signatures[key.microbatch]))
        return None if form is None or form.plain else form

    def _receive(self, key: Key, peer: int) -> None:
        if key.gradient:
            form = self._forms[(key.name, key.user, self._signatures[key.microbatch])]
            if not form.learns:
                return
        else:
            at = (key.name, key.user, self._signatures[key.microbatch])
            known = self._known(key)
            plain = None
            if known is None:
                header = torch.empty(HEADER, dtype=torch.uint8)
                self._irecv(header, peer).wait()
                known, plain = _unpacked(header)
                self._announced[at] = known
            if known.plain:
                self._arrived[key] = (None, plain)
                return
            form = known
        memory = torch.empty(form.shape, dtype=form.dtype, device=self._group.device)
        self._arrived[key] = (self._irecv(memory, peer), memory)

    def _irecv(self, memory: torch.Tensor, peer: int) -> Any:
        group = self._up if peer < self._place.stage else self._down
        return dist.irecv(memory, self._place.head_of(peer), group=group)


def _form(given: Any) -> Form:
    if isinstance(given, torch.Tensor):
        return Form(tuple(given.shape), given.dtype, given.requires_grad)
    return Form(plain=True)


def _bytes(form: Form) -> int:
    return 0 if form.plain else torch.Size(form.shape).numel() * form.dtype.itemsize


def _packed(form: Form, given: Any) -> torch.Tensor:
    plain = given if form.plain else None
    try:
        text = json.dumps([list(form.shape), str(form.dtype).removeprefix("torch."), form.learns, form.plain, plain])
    except TypeError:
        text = " " * HEADER
    data = text.encode()
    if len(data) > HEADER or not data.strip():
        raise ModelError(
            f"a stage has {type(given).__name__} for another stage, and only tensors and small numbers can go there: "
            "let the block that makes it and the one that uses it be in one stage, Plan(split=[...])"
        )
    return torch.frombuffer(bytearray(data.ljust(HEADER)), dtype=torch.uint8)


def _unpacked(header: torch.Tensor) -> tuple[Form, Any]:
    shape, dtype, learns, plain, value = json.loads(header.numpy().tobytes())
    return Form(tuple(shape), getattr(torch, dtype), learns, plain), _tuples(value)


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that shapes are."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
