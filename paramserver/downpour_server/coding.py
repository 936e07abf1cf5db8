"""One chunk's codecs at its shard: contributions are decoded, weights are encoded, see ``--compress``.

Weights stay float32 here, so what an answer loses is not added up. With a codec that loses little each answer is
encoded from them. With others, what a worker has is its *view*: an answer is the encoded difference to it, and the
view follows, so that what one answer leaves out is in the next (as in Tang et al., "DoubleSqueeze", ICML 2019, with a
view in place of a residual). A worker whose view is not known gets it whole. In ``sync`` all have the same one, which
moves with each round; else there is one for each slot: as much memory as weights, for each worker.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from downpour_common.codecs import codec_for
from downpour_common.codecs.base import Codec, as_memory, as_tensor
from downpour_common.codecs.feedback import seed_of
from downpour_common.compression import Compression, is_coded
from downpour_common.layout import Chunk
from downpour_common.messages import Buffer
from downpour_server.tensors import as_bytes

PREFIX = "codec."
"""With which the names of what is kept here begin in a checkpoint."""
_RESIDUAL = f"{PREFIX}residual."


def coding_for(chunk: Chunk, compression: Compression, together: bool) -> ChunkCoding | None:
    """What there is to be done for ``chunk``; None: it travels as it is."""
    return ChunkCoding(chunk, compression, together) if compression and is_coded(chunk) else None


class _View:
    """What a worker has: ``flat`` never changes."""

    __slots__ = ("flat", "number")

    def __init__(self, number: int, flat: torch.Tensor) -> None:
        self.number = number
        self.flat = flat


class ChunkCoding:
    """See the module. ``together``: all workers have the same view. ``follows``: weights travel as differences to
    views. ``residuals``: by slot, what workers owed at the checkpoint that this shard began with; they fetch it."""

    def __init__(self, chunk: Chunk, compression: Compression, together: bool) -> None:
        self._chunk = chunk
        self._push: Codec | None = None if compression.push is None else codec_for(compression.push)
        self._pull: Codec | None = None if compression.pull is None else codec_for(compression.pull)
        self.follows = compression.pull is not None and not compression.pull.whole
        self._together = together
        self.residuals: dict[int, torch.Tensor] = {}
        self._number = 0
        self._views: dict[int, _View] = {}
        """by slot; -1: everybody's"""
        self._step: tuple[int, Buffer] | None = None
        """everybody's: number of the view before, and the difference to it"""
        self._whole: tuple[int, Buffer] | None = None
        """version and bytes of the weights that were encoded last"""

    # ------------------------------------------------------------ contributions

    @property
    def pushed_bytes(self) -> int | None:
        """Bytes of a contribution; None: it is not encoded."""
        return None if self._push is None else self._push.nbytes(self._chunk.numel)

    def gradient(self, payload: Buffer, seq: int) -> torch.Tensor:
        """The contribution in ``payload``, which has its size. Raises :class:`ProtocolError`."""
        assert self._push is not None
        gradient = torch.empty(self._chunk.numel)
        self._push.decode(as_tensor(payload), gradient, seed_of(self._chunk.index, seq))
        return gradient

    # ------------------------------------------------------------ answers

    @property
    def encodes(self) -> bool:
        """Whether weights are encoded."""
        return self._pull is not None

    def answer(self, slot: int, held: int, weights: torch.Tensor, version: int) -> tuple[int, int, Buffer]:
        """View, base and payload (see ``WeightsCoded``) for a worker that says it has view ``held``."""
        assert self._pull is not None
        if not self.follows:
            if self._whole is None or self._whole[0] != version:
                self._whole = version, as_memory(self._encoded(self._pull, weights, 0))
            return 0, 0, self._whole[1]
        if self._together:
            self.begin(weights)
            view = self._views[-1]
            if self._step is not None and self._step[0] == held:
                return view.number, held, self._step[1]
            return view.number, 0, as_bytes(view.flat)
        known = self._views.get(slot)
        if known is None or known.number != held:
            view = self._views[slot] = _View(self._next(), weights.clone())
            return view.number, 0, as_bytes(view.flat)
        self._views[slot], data = self._moved(known, weights)
        return self._views[slot].number, held, data

    def begin(self, weights: torch.Tensor) -> None:
        """These are the weights before a round: if nobody has a view yet, everybody's is exact."""
        if self.follows and self._together and not self._views:
            self._views[-1] = _View(self._next(), weights.clone())

    def advance(self, weights: torch.Tensor) -> None:
        """These are the weights after a round."""
        if self.follows and self._together:
            before = self._views[-1]
            self._views[-1], data = self._moved(before, weights)
            self._step = before.number, data

    def forget(self, slot: int) -> None:
        """Nothing is known of what the worker in ``slot`` has on its own."""
        self._views.pop(slot, None)

    def take_place(self, term: int) -> None:
        """Nothing is known of what any worker has on its own: it has that from a former shard, whose views have other
        numbers than those of this ``term`` from now on."""
        if not self._together:
            self._views.clear()
            self._number = term << 32

    def _moved(self, view: _View, weights: torch.Tensor) -> tuple[_View, Buffer]:
        assert self._pull is not None
        number, difference = self._next(), weights - view.flat
        data = self._encoded(self._pull, difference, seed_of(self._chunk.index, number))
        self._pull.decode(data, difference, seed_of(self._chunk.index, number))
        return _View(number, difference.add_(view.flat)), as_memory(data)

    def _encoded(self, codec: Codec, flat: torch.Tensor, seed: int) -> torch.Tensor:
        data = torch.empty(codec.nbytes(flat.numel()), dtype=torch.uint8)
        codec.encode(flat, data, seed)
        return data

    def _next(self) -> int:
        self._number += 1
        return self._number

    # ------------------------------------------------------------ checkpoints and backups

    def state(self) -> dict[str, torch.Tensor | float]:
        """What must outlive this process, by name: everybody's view, and residuals that were not fetched yet."""
        state: dict[str, torch.Tensor | float] = {f"{_RESIDUAL}{s}": r for s, r in self.residuals.items()}
        if -1 in self._views:
            state[f"{PREFIX}view"] = self._views[-1].flat
            state[f"{PREFIX}number"] = self._number
        return state

    def load_state(self, state: Mapping[str, torch.Tensor | float]) -> None:
        """The inverse of :meth:`state`; names of others are left alone."""
        if self._push is not None:
            self.residuals = {
                int(name.removeprefix(_RESIDUAL)): value
                for name, value in state.items()
                if name.startswith(_RESIDUAL) and isinstance(value, torch.Tensor)
            }
        view = state.get(f"{PREFIX}view")
        if self.follows and self._together and isinstance(view, torch.Tensor):
            number = state.get(f"{PREFIX}number", 0)
            assert not isinstance(number, torch.Tensor)
            self._number = int(number)
            self._views[-1] = _View(self._number, view)
            self._step = None


def residual_name(slot: int) -> str:
    """How a checkpoint calls what the worker in ``slot`` owes."""
    return f"{_RESIDUAL}{slot}"
