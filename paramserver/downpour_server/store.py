"""One chunk at its shard: weights, version, update rule, dedup windows; and how contributions change them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from downpour_common import wire
from downpour_common.compensation import SPARE_BASES, CompensationSpec
from downpour_common.errors import ProtocolError
from downpour_common.layout import Chunk
from downpour_common.messages import Buffer
from downpour_common.transport import Sent
from downpour_server.coding import PREFIX as CODING
from downpour_server.coding import ChunkCoding
from downpour_server.compensation import PREFIX
from downpour_server.compensation.bases import Bases
from downpour_server.compensation.compensator import Compensator
from downpour_server.contribution import Contribution
from downpour_server.dedup import DedupWindow
from downpour_server.rules import Rule, make_rule
from downpour_server.tensors import Scratch, as_bytes, from_bytes, torch_dtype, weighted_mean


class StoredChunk:
    """Holds and changes one chunk. ``version`` counts the updates it has absorbed; chunks may share a ``scratch``.

    ``lodging``: its weights lie in a worker's memory, see :mod:`downpour_server.attached`. ``keep_previous``: of a
    trainable chunk the weights before the newest update are kept, too. ``compensation``: what is done about late
    contributions, ``bases`` the weights kept for each worker at most where they are needed for it.
    """

    def __init__(
        self,
        chunk: Chunk,
        rule: str,
        options: Mapping[str, Any],
        scratch: Scratch | None = None,
        keep_previous: bool = False,
        compensation: CompensationSpec | None = None,
        bases: int = SPARE_BASES,
    ) -> None:
        self.chunk = chunk
        self.trainable = chunk.kind == "trainable"
        self.nbytes = chunk.nbytes
        self.version = 0
        self.initialised = False
        self.lodging = False
        self.weights = torch.zeros(chunk.numel, dtype=torch_dtype(chunk.dtype))
        self._rule: Rule | None = make_rule(rule, options, chunk.shape) if self.trainable else None
        compensates = self.trainable and compensation is not None and compensation.name != "off"
        self._compensator = Compensator(compensation, options, bases) if compensation and compensates else None
        self._scratch = scratch or Scratch()
        self._options = dict(options)
        self._hyper = b""
        self._understood = b""
        self._latest: dict[int, torch.Tensor] = {}
        self._windows: dict[int, tuple[int, DedupWindow]] = {}
        self.previous_version = -1
        """-1: nothing is kept of before"""
        self._keep_previous = keep_previous and self.trainable
        self._previous: torch.Tensor | None = None
        self._previous_readers: list[Sent] = []
        self._readers: list[Sent] = []
        self._state_readers: list[Sent] = []
        self.coding: ChunkCoding | None = None
        """how it travels, if not as it is; set once, at the start"""
        self.reached: torch.Tensor | None = None
        """mode lbfgs: the weights that count, while others are tried; replaced, never written to"""

    def initialise(self, payload: Buffer) -> None:
        """Take the job's first weights; later calls change nothing."""
        if not self.initialised:
            self.weights.copy_(from_bytes(payload, self.chunk.dtype))
            self.initialised = True

    def window(self, slot: int, worker_epoch: int, first_seq: int) -> DedupWindow:
        """The dedup window of a slot's worker. A new epoch has a window of its own: it counts from ``first_seq``."""
        known = self._windows.get(slot)
        if known is None or known[0] < worker_epoch:
            known = self._windows[slot] = (worker_epoch, DedupWindow(first_seq))
        return known[1]

    def restored_window(self, slot: int, worker_epoch: int, first_seq: int) -> DedupWindow | None:
        """The window of a worker that has spoken to this chunk's former shard, while it may have gaps; else None."""
        known = self._windows.get(slot)
        if known is None or known[0] < worker_epoch:
            known = self._windows[slot] = (worker_epoch, DedupWindow(first_seq, unsettled=True))
        return known[1] if known[0] == worker_epoch and known[1].unsettled else None

    def take_over(self, slot: int, worker_epoch: int) -> None:
        """The window of ``slot`` is this epoch's from now on."""
        known = self._windows.get(slot)
        if known is not None:
            self._windows[slot] = (worker_epoch, known[1])

    def number_from_version(self, version: int) -> None:
        """The next contribution of everybody is meant for ``version``, which is the chunk's."""
        self.version = version
        for _, window in self._windows.values():
            window.begin_at(version)

    def forget(self, slot: int) -> None:
        """What the worker in ``slot`` said last of a buffer does not count any more."""
        self._latest.pop(slot, None)

    def understands(self, hyper: bytes) -> bool:
        """Whether ``hyper`` holds options of the kinds that the parameter group had at the start."""
        if hyper in (b"", self._understood):
            return True
        try:
            options = wire.unpack(hyper)
        except ProtocolError:
            return False
        if type(options) is not dict or not all(_same_kind(self._options.get(k), v) for k, v in options.items()):
            return False
        self._understood = hyper
        return True

    def apply(self, round_: list[Contribution]) -> None:
        """Absorb one round as one update. An empty one only counts."""
        if not round_:
            if self._keep_previous:
                self._keep_weights()
            self.version += 1
            return
        self._before_write()
        if self._rule is None:
            self._replace(round_)
        else:
            if round_[0].hyper and round_[0].hyper != self._hyper:
                self._take_options(self._rule, round_[0].hyper)
            gradient = weighted_mean([c.gradient for c in round_], [c.samples for c in round_], self._scratch)
            if self._compensator is None:
                self._rule.apply(self.weights, gradient)
            else:
                self._compensator.apply(self._rule, self.weights, gradient, round_[0], self.version)
        self.version += 1

    def _take_options(self, rule: Rule, hyper: bytes) -> None:
        self._hyper = hyper
        options = wire.unpack(hyper)
        rule.set_options(options)
        if self._compensator is not None:
            self._compensator.options_changed(options)

    # ------------------------------------------------------------ what workers compute on

    def given_to(self, slot: int) -> None:
        """The weights as they are go to ``slot``, whose contributions may say that they were computed on them."""
        if (bases := self.bases) is not None:
            bases.given(slot, self.version)

    def left_by(self, slot: int) -> None:
        """No more contributions come from the worker that was in ``slot``, nor answers to it."""
        if (bases := self.bases) is not None:
            bases.forget(slot)
        if self.coding is not None:
            self.coding.forget(slot)

    def compensates(self, contribution: Contribution) -> bool:
        """Whether what is to be done about late contributions can be done for this one, which comes next."""
        return self._compensator is None or self._compensator.knows(contribution, self.version)

    @property
    def bases(self) -> Bases | None:
        """The weights that are kept for workers' contributions; None where none are."""
        return None if self._compensator is None else self._compensator.bases

    # ------------------------------------------------------------ how it travels

    @property
    def coded_push(self) -> int:
        """Bytes of a contribution that is encoded; 0: it is not."""
        return (self.coding.pushed_bytes or 0) if self.coding is not None else 0

    def decoded(self, payload: Buffer, seq: int) -> torch.Tensor | None:
        """The contribution in ``payload``; None: it is not encoded. Raises :class:`ProtocolError`."""
        return self.coding.gradient(payload, seq) if self.coding is not None and self.coded_push else None

    def answer(self, slot: int, held: int, previous: bool) -> tuple[int, int, int, Buffer] | None:
        """Version, view, base and payload of encoded weights, or of the previous ones, for a worker that has view
        ``held``; None: they are to be sent as they are. See :class:`downpour_common.messages.WeightsCoded`."""
        if self.coding is None or not self.coding.encodes or held < 0 or (previous and self.coding.follows):
            return None
        weights, version = (self.previous, self.previous_version) if previous else (self.weights, self.version)
        return version, *self.coding.answer(slot, held, weights, version)

    def forget_views(self, term: int) -> None:
        """Nobody knows what the workers have: this shard takes another one's place, in ``term``."""
        if self.coding is not None:
            self.coding.take_place(term)

    def _replace(self, round_: list[Contribution]) -> None:
        """Buffers: the mean over all slots of what each said last; integers are the lowest slot's."""
        for contribution in round_:
            self._latest[contribution.slot] = contribution.gradient
        latest = [self._latest[slot] for slot in sorted(self._latest)]
        constant = all(torch.equal(latest[0], other) for other in latest[1:])  # whose mean would round
        if not constant and (self.weights.dtype.is_floating_point or self.weights.dtype.is_complex):
            self.weights.copy_(weighted_mean(latest, [1] * len(latest), self._scratch))
        else:
            self.weights.copy_(latest[0])

    @property
    def previous(self) -> torch.Tensor:
        """The weights at :attr:`previous_version`, if that is not -1."""
        assert self._previous is not None
        return self._previous

    def payload(self, previous: bool = False) -> memoryview:
        """The weights' memory, or the previous ones', to be sent as it is; tell :meth:`being_read` what becomes of it.

        Memory that is not this shard's own is copied, for nobody here knows when it is written next.
        """
        if previous:
            return as_bytes(self.previous)
        return as_bytes(self.weights.clone() if self.lodging else self.weights)

    def being_read(self, sent: Sent, previous: bool = False) -> None:
        """What :meth:`payload` gave is under way without a copy until ``sent.done``."""
        if previous:
            if not sent.done:
                self._previous_readers = [r for r in self._previous_readers if not r.done]
                self._previous_readers.append(sent)
        elif not self.lodging and not sent.done:
            self._readers = [r for r in self._readers if not r.done]
            self._readers.append(sent)

    def writable(self) -> torch.Tensor:
        """The weights, to be changed by other means than :meth:`apply`; what is being sent stays as it is elsewhere."""
        self._before_write()
        return self.weights

    def _before_write(self) -> None:
        """Copy on write: a reader that is still sending keeps the old memory, so nobody sees a torn chunk."""
        bases = self.bases
        if bases is not None and self.lodging:
            bases.let_go()  # its worker computes on the weights themselves, whatever becomes of them
        if self._keep_previous:
            self._keep_weights()
        elif bases is not None and bases.wanted:
            self.weights, kept = self.weights.clone(), self.weights
            bases.keep(kept)
            self._readers = []
        elif self._readers:
            if not all(r.done for r in self._readers):
                self.weights = self.weights.clone()
            self._readers = []
        if self._state_readers and self._rule is not None:
            if not all(r.done for r in self._state_readers):
                state = self._rule.state()
                own = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in state.items()}
                self._rule.load_state(self.weights, own)
            self._state_readers = []

    def _keep_weights(self) -> None:
        """The weights become the previous ones; they lie in memory of their own then, which nobody reads.

        What is being read stays where it is, as the previous weights, and the next ones go where the former previous
        ones were: so there is one copy for each update, and no new memory unless somebody reads for two updates.
        """
        spare = self._previous
        if spare is None or not all(r.done for r in self._previous_readers):
            spare = torch.empty_like(self.weights)
        spare.copy_(self.weights)
        self._previous_readers = [r for r in self._readers if not r.done]
        self._previous = spare
        if self._previous_readers:
            self._previous, self.weights = self.weights, spare
        self._readers = []
        self.previous_version = self.version

    # ------------------------------------------------------------ where the weights are

    def move_in(self, memory: torch.Tensor) -> None:
        """Keep the weights in ``memory``, which holds them already. What is still being sent stays where it was."""
        self.weights = memory
        self.lodging = True
        self._readers = []

    def move_out(self) -> None:
        """Back to memory of this shard's own."""
        if self.lodging:
            self.weights = self.weights.clone()
            self.lodging = False

    # ------------------------------------------------------------ snapshots

    def capture(
        self, reader: Sent, waiting: Collection[tuple[int, int]] = ()
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What there is now: tensors by name (``weights`` and the rule's state), and the plain values beside them.

        The tensors stay as they are until ``reader.done``: an update that comes before goes to copies. ``waiting``:
        slot and number of contributions that were seen and are not in the weights: to the windows they are not seen.
        """
        tensors = {"weights": self.weights.clone() if self.lodging else self.weights}
        if self.reached is not None:
            tensors["weights"] = self.reached
        self.being_read(reader)
        self._state_readers = [r for r in [*self._state_readers, reader] if not r.done]
        scalars: dict[str, float] = {}
        held = dict(self._rule.state()) if self._rule else {}
        if self._compensator is not None:
            held.update(self._compensator.state())
        if self.coding is not None:
            held.update(self.coding.state())
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                scalars[name] = value
        windows = []
        for slot, (epoch, window) in self._windows.items():
            next_seq, above = window.without({seq for of, seq in waiting if of == slot})
            windows.append([slot, epoch, next_seq, sorted(above)])
        return tensors, {"version": self.version, "scalars": scalars, "windows": windows}

    def adopt(self, hyper: bytes) -> None:
        """Go on with the options that were in force last, as another shard had them."""
        if hyper and self._rule is not None:
            self._take_options(self._rule, hyper)

    def restore(
        self,
        weights: torch.Tensor,
        state: Mapping[str, torch.Tensor | float],
        version: int,
        windows: Iterable[tuple[int, int, int, Iterable[int]]] = (),
    ) -> None:
        """Start from a checkpoint's values instead of the chief's; ``windows`` as :meth:`capture` has them."""
        self.weights.copy_(weights)
        self.version = version
        self.initialised = True
        if self._rule is not None:
            self._rule.load_state(self.weights, {n: v for n, v in state.items() if not n.startswith((PREFIX, CODING))})
        if self._compensator is not None:
            self._compensator.load_state(state)
        if self.coding is not None:
            self.coding.load_state(state)
        for slot, epoch, next_seq, above in windows:
            self._windows[slot] = (epoch, DedupWindow(next_seq, set(above), unsettled=True))


def _same_kind(known: Any, value: Any) -> bool:
    """Whether ``value`` may replace ``known``: numbers by numbers, lists by lists as long; anything for None."""
    if known is None:
        return True
    if isinstance(known, (list, tuple)):
        return isinstance(value, list) and len(value) == len(known) and all(map(_same_kind, known, value))
    if isinstance(known, bool) or not isinstance(known, (int, float)):
        return type(value) is type(known)
    return type(value) in (int, float) and math.isfinite(value)
