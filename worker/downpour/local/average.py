"""``average:h``: local SGD, or the supervisor that gathers and averages weights.

Every h steps all workers take the mean of their weights (McDonald et al. 2010; Stich 2019, "Local SGD converges fast
and communicates little"): ``A = A - mean(A - w_i) = mean(w_i)``.
"""

from __future__ import annotations

from typing import Any

from downpour.local.rounds import RoundsEngine
from downpour_common.modes import Mode


def outer(_mode: Mode) -> dict[str, Any]:
    """Options of the servers' SGD: they take the mean change as it is."""
    return {"lr": 1.0, "momentum": 0.0, "nesterov": False}


class AverageEngine(RoundsEngine):
    """All of the model in one exchange."""
