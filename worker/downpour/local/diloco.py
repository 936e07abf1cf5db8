"""``diloco:h``: distributed low-communication training (Douillard et al. 2023, algorithm 1).

The workers' mean change is an outer gradient g, for SGD with Nesterov momentum at the servers, as torch has it::

    g = mean(A - w_i)        v = mu v + g        A = A - lr (g + mu v)        w_i = A

With ``fragments=k`` (Streaming DiLoCo, Douillard et al. 2025) part j of k is exchanged h/k steps after part j - 1, each
once in h steps, so that an exchange moves 1/k of the bytes. A worker takes the answer in place of its own weights of
that part (their mixing factor is 0), and waits for it.
"""

from __future__ import annotations

import warnings
from typing import Any

from downpour.local.rounds import RoundsEngine
from downpour_common.modes import Mode


def outer(mode: Mode) -> dict[str, Any]:
    """Options of the servers' SGD."""
    momentum = mode.option("momentum")
    return {"lr": mode.option("lr"), "momentum": momentum, "nesterov": momentum > 0}


class DilocoEngine(RoundsEngine):
    """With fragments; few chunks make fewer of them."""

    @property
    def fragments(self) -> int:
        """See :class:`RoundsEngine`."""
        wanted = int(self._job.mode.option("fragments"))
        if wanted > len(self._chunks):
            warnings.warn(
                f"mode {self._job.mode}: the model has {len(self._chunks)} chunk(s), so it is exchanged in as many "
                "fragments; smaller chunks make more (--set chunk_bytes=64KiB)",
                stacklevel=2,
            )
        return wanted
