"""Batches from a replica's lead to its other ranks: plain structures of tensors, told in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from downpour_common import wire
from downpour_common.errors import ModelError

if TYPE_CHECKING:
    from downpour.parallel.group import Group

_TENSOR, _LIST, _TUPLE, _MAPPING, _PLAIN = range(5)
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Word:
    """What the lead says before each batch.

    ``samples`` of the batch; ``position``: (epoch, offset) of the training data once it is used, empty where unknown;
    ``stop``: the script may end its loop; ``leave``: the replica leaves the job now; ``over``: no more in this pass.
    """

    samples: int = 0
    position: tuple[int, ...] = ()
    stop: bool = False
    leave: bool = False
    over: bool = False


class Relay:
    """Both ends: :meth:`give` on the lead, :meth:`take` on all others of the replica, in the same order."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def give(self, word: Word, batch: Any = None) -> None:
        """Raises :class:`ModelError` for a batch that holds something else than tensors, arrays and plain values."""
        tensors: list[torch.Tensor] = []
        shape = _describe(batch, tensors)
        rows = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        head = wire.pack([word.samples, list(word.position), word.stop, word.leave, word.over, shape, rows])
        parts: list[Any] = [len(head).to_bytes(8, "little"), head]
        at = 8 + len(head)
        for tensor in tensors:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            parts += [bytes(-at % _ALIGN), data]
            at += -at % _ALIGN + data.nbytes
        self._group.broadcast_buffer(torch.frombuffer(bytearray().join(parts), dtype=torch.uint8))

    def take(self) -> tuple[Word, Any]:
        """What the lead gives."""
        held = self._group.broadcast_buffer(None)
        size = int.from_bytes(held[:8].numpy().tobytes(), "little")
        samples, position, stop, leave, over, shape, rows = wire.unpack(held[8 : 8 + size].numpy().tobytes())
        tensors, at = [], 8 + size
        for name, sizes in rows:
            dtype: torch.dtype = getattr(torch, name)
            count = int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize
            at += -at % _ALIGN
            tensors.append(held[at : at + count].view(dtype).view(sizes))
            at += count
        return Word(samples, tuple(position), stop, leave, over), _rebuild(shape, tensors)


def _describe(value: Any, tensors: list[torch.Tensor]) -> list[Any]:
    """``value`` with each tensor replaced by its number in ``tensors``, where it is added, on the host."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return [_TENSOR, len(tensors) - 1]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [_PLAIN, value]
    if type(value) is list or type(value) is tuple:
        return [_LIST if type(value) is list else _TUPLE, [_describe(v, tensors) for v in value]]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return [_MAPPING, [[key, _describe(v, tensors)] for key, v in value.items()]]
    raise ModelError(
        f"a batch holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be told to the other ranks "
        "of the replica; let collate_fn make tensors, numbers and strings in lists, tuples and dicts with text keys"
    )


def _rebuild(shape: list[Any], tensors: list[torch.Tensor]) -> Any:
    kind, value = shape
    if kind == _TENSOR:
        return tensors[value]
    if kind == _LIST:
        return [_rebuild(v, tensors) for v in value]
    if kind == _TUPLE:
        return tuple(_rebuild(v, tensors) for v in value)
    if kind == _MAPPING:
        return {key: _rebuild(v, tensors) for key, v in value}
    return value
