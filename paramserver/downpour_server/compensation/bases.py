"""The weights that workers compute on, as a chunk keeps them: by slot, those given to it that it may still speak of.

A slot's contributions come in the order of what they were computed on, so with each one those before its own go. What
was given out is noted, not copied: only when an update is about to change it does it become a copy, one for all slots
that have it. Beyond ``most`` of one slot the oldest goes: its worker has fetched again and again without a push.
"""

from __future__ import annotations

from collections import deque

import torch


class Bases:
    """See the module."""

    def __init__(self, most: int) -> None:
        self.kept: dict[int, deque[tuple[int, torch.Tensor | None]]] = {}
        """by slot, ascending: version, and its weights, which nobody writes to; None: they are the chunk's own still"""
        self._most = most

    def given(self, slot: int, version: int) -> None:
        """``slot`` gets the chunk's weights as they are, which are of this ``version``."""
        kept = self.kept.setdefault(slot, deque())
        if not kept or kept[-1][0] != version:
            kept.append((version, None))
            if len(kept) > self._most:
                kept.popleft()

    @property
    def wanted(self) -> bool:
        """Whether the chunk's weights, as they are, are among those kept."""
        return any(kept and kept[-1][1] is None for kept in self.kept.values())

    def keep(self, weights: torch.Tensor) -> None:
        """The chunk's weights, as they are, lie in ``weights``, which nobody writes to from now on."""
        for kept in self.kept.values():
            at = len(kept) - 1
            while at >= 0 and kept[at][1] is None:
                kept[at] = (kept[at][0], weights)
                at -= 1

    def let_go(self) -> None:
        """The chunk's weights are about to change, and are not kept."""
        for kept in self.kept.values():
            while kept and kept[-1][1] is None:
                kept.pop()

    def known(self, slot: int, version: int) -> bool:
        """Whether the weights of ``version`` that ``slot`` had are here; those before are not needed any more."""
        kept = self.kept.get(slot)
        while kept and kept[0][0] < version:
            kept.popleft()
        return kept is not None and len(kept) > 0 and kept[0][0] == version

    def of(self, slot: int, version: int) -> torch.Tensor | None:
        """The weights of ``version`` that ``slot`` had; None if they are not here, or are the chunk's own still."""
        return self.kept[slot][0][1] if self.known(slot, version) else None

    def forget(self, slot: int) -> None:
        """The worker in ``slot`` is another one, or none."""
        self.kept.pop(slot, None)
