"""What all codecs have in common."""

from __future__ import annotations

from typing import Protocol

import torch

from downpour_common.messages import Buffer


class Codec(Protocol):
    """Encodes flat float32 tensors of ``n`` elements as ``nbytes(n)`` bytes, and decodes them.

    The bytes are flat uint8 tensors that begin where any element may. Equal inputs give equal bytes in every process
    of the same kind. ``seed`` is a number below 2^63 that both sides know.
    """

    name: str

    def nbytes(self, numel: int) -> int:
        """Bytes of ``numel`` elements."""

    def encode(self, flat: torch.Tensor, out: torch.Tensor, seed: int) -> None:
        """Write ``flat``, which is finite and stays as it is, to ``out``."""

    def decode(self, data: torch.Tensor, out: torch.Tensor, seed: int) -> None:
        """Write what ``data`` stands for to the float32 ``out``. Raises :class:`ProtocolError` for bytes that no
        encoder makes and that cannot be used."""

    def spoil(self, out: torch.Tensor) -> None:
        """Write to ``out`` what decodes as NaN, at least in one element: the mark of what is not finite."""


class Spoilt:
    """:meth:`Codec.spoil` where bytes that are all ones mean NaN."""

    def spoil(self, out: torch.Tensor) -> None:
        """See :class:`Codec`."""
        out.fill_(255)


def as_tensor(data: Buffer) -> torch.Tensor:
    """The bytes of ``data`` as a flat uint8 tensor over its memory; copied where that may not be written to."""
    view = memoryview(data)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8) if view.nbytes else _NOTHING


def as_memory(data: torch.Tensor) -> memoryview:
    """The memory of a flat uint8 tensor."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


_NOTHING = torch.empty(0, dtype=torch.uint8)


def blocks_of(numel: int, block: int) -> int:
    """How many blocks ``numel`` elements are, the last of which may be shorter."""
    return -(-numel // block)


def in_blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """``flat`` as rows of ``block`` elements: itself where it has whole blocks, else a copy with zeros at its end."""
    rows = blocks_of(flat.numel(), block)
    if flat.numel() == rows * block:
        return flat.view(rows, block)
    padded = torch.zeros(rows * block, dtype=flat.dtype)
    padded[: flat.numel()] = flat
    return padded.view(rows, block)
