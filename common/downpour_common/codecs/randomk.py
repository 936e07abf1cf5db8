"""Elements drawn at random, of which only the values travel."""

from __future__ import annotations

import math

import numpy as np
import torch

from downpour_common.codecs.base import Spoilt


class RandomK(Spoilt):
    """A ``fraction`` of the elements, drawn anew each time, unscaled, because what is left waits: Stich, Cordonnier and
    Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, rand_k. Both sides draw the places from the seed::

        k = ⌈f n⌉        one place of each of k nearly equal parts of the chunk        x̂ᵢ = xᵢ  there,  0 elsewhere

    Drawing by parts keeps the places apart and in order, and each element's chance is that of plain drawing. The bytes:
    ``k`` values as float32.
    """

    name = "randomk"

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def nbytes(self, numel: int) -> int:
        """See :class:`downpour_common.codecs.base.Codec`."""
        return 4 * self._count(numel)

    def encode(self, flat: torch.Tensor, out: torch.Tensor, seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        torch.index_select(flat, 0, self._places(flat.numel(), seed), out=out.view(torch.float32))

    def decode(self, data: torch.Tensor, out: torch.Tensor, seed: int) -> None:
        """See :class:`downpour_common.codecs.base.Codec`."""
        out.zero_()
        out.index_copy_(0, self._places(out.numel(), seed), data.view(torch.float32))

    def _count(self, numel: int) -> int:
        return math.ceil(self._fraction * numel)

    def _places(self, numel: int, seed: int) -> torch.Tensor:
        """int64, ascending, each once; the same in every process on every machine."""
        count = self._count(numel)
        ends = np.arange(count + 1, dtype=np.uint64) * np.uint64(numel) // np.uint64(max(1, count))
        first, lengths = ends[:-1], np.diff(ends)
        drawn = _mixed(np.arange(count, dtype=np.uint64) + _mixed(np.array([seed], dtype=np.uint64)))
        return torch.from_numpy((first + ((drawn >> np.uint64(32)) * lengths >> np.uint64(32))).astype(np.int64))


def _mixed(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
