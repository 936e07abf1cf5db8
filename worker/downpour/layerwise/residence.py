"""Which layers are here: fetched when they are needed or a little before, dropped for others when room is short.

Whoever computes on weights holds their memory, so dropping a layer is safe at any moment: it makes the model's
parameters absent, and the memory goes when the last computation is done with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from downpour.client.core import Ticket
from downpour.client.parameters import ParameterClient
from downpour.layerwise.ledger import Ledger
from downpour.layerwise.space import Block, LayerSpace
from downpour.spans import span
from downpour_common.errors import ModelError, NonFiniteContribution
from downpour_common.sizes import format_bytes


class Residence:
    """See the module.

    ``asked``: the (version, after) of :class:`downpour_common.messages.Pull` for trainable weights. ``explain`` says
    what the refusal of a block's gradient means. ``phase`` of a need names what goes on (training's forward, its
    backward, evaluation): what came after a layer in it last time is fetched while that layer computes.
    """

    def __init__(
        self,
        space: LayerSpace,
        client: ParameterClient,
        ledger: Ledger,
        asked: Callable[[], tuple[int, int]],
        explain: Callable[[NonFiniteContribution, Block], NonFiniteContribution],
    ) -> None:
        self.waited_s = 0.0
        self.fetches = 0
        self._space = space
        self._client = client
        self._ledger = ledger
        self._asked = asked
        self._explain = explain
        self._coming: dict[Block, Ticket] = {}
        self._here: dict[Block, None] = {}
        """least recently needed first"""
        self._pins: Counter[Block] = Counter()
        self._last: Block | None = None
        self._before: dict[str, Block] = {}
        self._next: dict[str, dict[Block, Block]] = {}
        self._leaving: list[tuple[Block, Ticket]] = []
        """gradients under way"""

    # ------------------------------------------------------------ weights

    def need(self, block: Block, phase: str, reserve: int = 0) -> None:
        """Have the weights of ``block`` here, and begin to fetch the ones that are needed next, if there is room for
        them beside ``reserve`` bytes. Raises :class:`DownpourError`."""
        before = self._before.get(phase)
        if before is not block:
            if before is not None:
                self._next.setdefault(phase, {})[before] = block
            self._before[phase] = block
        self._last = block
        if block in self._here:
            self._here[block] = self._here.pop(block)
        else:
            if block not in self._coming:
                self.make_room(block.nbytes, f"the weights of layer {block.name}")
                self._fetch(block)
            ticket = self._coming[block]
            self._wait(ticket)
            del self._coming[block]
            self._space.show(block)
            self._here[block] = None
        following = self._next.get(phase, {}).get(block)
        if following is not None and following not in self._here and following not in self._coming:
            self._fetch_ahead(following, reserve)

    def pin(self, blocks: Iterable[Block], by: int = 1) -> None:
        """``by`` 1: these stay until the same with −1."""
        for block in blocks:
            self._pins[block] += by

    def drop(self, block: Block) -> None:
        """The weights of ``block`` are not needed for now."""
        if block in self._here:
            del self._here[block]
            self._space.hide(block)
            self._ledger.give(block.nbytes)

    def drop_all(self) -> None:
        """Whatever is needed from now on is fetched anew. Waits for what is under way."""
        for block in list(self._coming):
            self._forget(block)
        for block in list(self._here):
            self.drop(block)
        self._before.clear()

    def _fetch(self, block: Block) -> None:
        self._ledger.take(block.nbytes)
        self._space.make_room(block)
        version, after = self._asked() if block.kind == "trainable" else (-1, -1)
        self.fetches += 1
        self._coming[block] = self._client.start_pull(block.chunks, version=version, after=after)

    def _fetch_ahead(self, block: Block, reserve: int) -> None:
        while self._ledger.lacks(block.nbytes + reserve):
            if not (self._collect() or self._drop_idle()):
                return
        self._fetch(block)

    def _forget(self, block: Block) -> None:
        """Not needed after all."""
        self._wait(self._coming.pop(block))
        self._space.hide(block)
        self._ledger.give(block.nbytes)

    # ------------------------------------------------------------ gradients

    def leaves(self, block: Block, ticket: Ticket) -> None:
        """The gradient of ``block`` is under way; its memory is free once it has been accepted."""
        self._leaving.append((block, ticket))

    def all_gone(self) -> None:
        """Wait until all gradients have been accepted."""
        while self._leaving:
            self._end(0)

    def _collect(self) -> bool:
        """Whether memory has become free of gradients that have been accepted."""
        done = [index for index, (_, ticket) in enumerate(self._leaving) if ticket.settled()]
        for index in reversed(done):
            self._end(index)
        return bool(done)

    def _end(self, index: int) -> None:
        block, ticket = self._leaving.pop(index)
        try:
            self._wait(ticket, "push")
        except NonFiniteContribution as error:
            raise self._explain(error, block) from None
        self._space.end_gradient(block)
        self._ledger.give(block.gradient_nbytes)

    # ------------------------------------------------------------ room

    def make_room(self, nbytes: int, what: str) -> None:
        """Drop and wait until so much fits into the budget. Raises :class:`ModelError` if it never will."""
        while lacking := self._ledger.lacks(nbytes):
            if self._collect() or self._drop_idle():
                continue
            if self._leaving:
                self._end(0)
            elif self._coming:
                self._forget(next(reversed(self._coming)))
            else:
                names = ", ".join(block.name for block in self._here) or "none"
                raise ModelError(
                    f"no room for {what}: {format_bytes(lacking)} more than memory={self._ledger.budget} allows, while "
                    f"layers that compute at the same time are here ({names}), or gradients that are not complete; "
                    f"give it more (--set memory={self._ledger.budget + lacking}), or cut the model into smaller "
                    "modules"
                )

    def _drop_idle(self) -> bool:
        """Drop the layer that has not been needed for longest: backward needs it last."""
        idle = next((b for b in self._here if not self._pins[b] and b is not self._last), None)
        if idle is not None:
            self.drop(idle)
        return idle is not None

    def _wait(self, ticket: Ticket, what: str = "pull") -> None:
        started_s = time.perf_counter()
        with span(what):
            ticket.wait()
        self.waited_s += time.perf_counter() - started_s
