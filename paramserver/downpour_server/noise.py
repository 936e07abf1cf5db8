"""How noisy gradients are: the "simple" noise scale of McCandlish et al. 2018, estimated as contributions are applied.

A contribution is the mean gradient of b samples, g = G + noise, with E|g|² = |G|² + tr(Σ)/b (their eq. A.1), G the
gradient of the whole data and Σ the covariance of one sample's. From n contributions at the same weights, of b₁…bₙ
samples, with B = Σ bᵢ and the mean g = Σ (bᵢ/B) gᵢ,

    S = Σ (bᵢ/B) |gᵢ|²      E[S]   = |G|² + n tr(Σ)/B
                            E|g|²  = |G|² +   tr(Σ)/B

so that (n|g|² − S)/(n − 1) estimates |G|² and (S − |g|²) B/(n − 1) estimates tr(Σ), both without bias. Both are sums
over elements, so chunks and shards add up; the noise scale is their quotient tr(Σ)/|G|², which is taken last, of
averages over time.

In rounds the n contributions are those of the round. One that is applied alone is compared with the next one to its
chunk, n = 2, as if the update between them had not moved the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from downpour_server.contribution import Contribution
from downpour_server.tensors import Scratch, weighted_mean

FIRST_EVERY, LAST_EVERY = 8, 128
"""Updates of a chunk between two that are looked at: at first, and after a hundred looks or so."""
LONGEST = 100
"""Looks of which the newest counts one part; before, the average is that of all."""
HELD_BYTES = 16 << 20
"""Of contributions that wait to be compared with the next; a single one may be larger."""


class NoiseMeter:
    """Looks at some of a shard's updates; ``wanted``: at any. Values are in units of the gradients' squares."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._sums: dict[int, list[float]] = {}
        """by chunk: looks, version to look at next, averages of the estimates of tr(Σ) and of |G|²"""
        self._held: dict[int, list[object]] = {}
        """by chunk: samples and a copy of the contribution that is compared with the next one"""
        self._scratch = Scratch()

    def look(self, chunk: int, version: int, round_: Sequence[Contribution]) -> None:
        """The chunk, which is at ``version``, is about to absorb ``round_``, finite gradients of some samples each."""
        if not self._wanted or not round_:
            return
        sums = self._sums.setdefault(chunk, [0, 0, 0.0, 0.0])
        held = self._held.pop(chunk, None)
        if held is None and version < sums[1]:
            return
        parts = [(c.samples, c.gradient) for c in round_]
        if held is not None:
            samples, gradient = held
            assert isinstance(samples, int)
            assert isinstance(gradient, torch.Tensor)
            parts = [(samples, gradient), *parts[:1]]
        elif len(parts) == 1:
            self._hold(chunk, round_[0])
            return
        self._add(sums, version, *estimates(parts, self._scratch))

    def document(self) -> list[float]:
        """Estimates of tr(Σ) and |G|², and how many looks they are from at least; all 0 before the first."""
        known = [sums for sums in self._sums.values() if sums[0]]
        if not known:
            return [0.0, 0.0, 0]
        return [sum(s[2] for s in known), sum(s[3] for s in known), int(min(s[0] for s in known))]

    def _hold(self, chunk: int, contribution: Contribution) -> None:
        nbytes = sum(g.nbytes for _, g in self._held.values() if isinstance(g, torch.Tensor))
        if not self._held or nbytes + contribution.gradient.nbytes <= HELD_BYTES:  # else another time
            self._held[chunk] = [contribution.samples, contribution.gradient.clone()]

    @staticmethod
    def _add(sums: list[float], version: int, trace: float, square: float) -> None:
        sums[1] = version + min(LAST_EVERY, FIRST_EVERY + sums[0])
        if not (math.isfinite(trace) and math.isfinite(square)):  # finite gradients, whose squares are not
            return
        sums[0] += 1
        share = max(1 / sums[0], 1 / LONGEST)
        sums[2] += share * (trace - sums[2])
        sums[3] += share * (square - sums[3])


def estimates(parts: Sequence[tuple[int, torch.Tensor]], scratch: Scratch | None = None) -> tuple[float, float]:
    """tr(Σ) and |G|² from two or more (samples, mean gradient of them), flat and of one dtype and length."""
    count, total = len(parts), sum(samples for samples, _ in parts)
    mean = weighted_mean([g for _, g in parts], [samples for samples, _ in parts], scratch or Scratch())
    parted = sum(samples / total * _square(g) for samples, g in parts)
    whole = _square(mean)
    return (parted - whole) * total / (count - 1), (count * whole - parted) / (count - 1)


def _square(tensor: torch.Tensor) -> float:
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor).flatten()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return float(torch.dot(tensor, tensor))
