"""Modes in which each worker trains on weights of its own, with the script's own optimizer: ``average``, ``easgd``,
``diloco``.

Every ``h`` steps it exchanges what has become of its weights. What it pushes is written into the flat gradients, which
are free between two steps, so that shared memory, codecs and the shards' dedup need nothing new; to the shards it is a
gradient, and their update rule is SGD with options of the mode (:data:`LOCAL`).

A new mode is one file here and one line below (and in ``common/modes.py`` and ``downpour_server/policy``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from downpour.local import average, diloco, easgd
from downpour.local.engine import LocalEngine
from downpour_common.modes import Mode

__all__ = ["LOCAL", "LocalEngine", "LocalMode"]


@dataclass(frozen=True, slots=True)
class LocalMode:
    """``engine``: takes what :class:`LocalEngine` takes. ``outer``: the options of the servers' SGD."""

    engine: type[LocalEngine]
    outer: Callable[[Mode], dict[str, Any]]


LOCAL: dict[str, LocalMode] = {
    "average": LocalMode(average.AverageEngine, average.outer),
    "easgd": LocalMode(easgd.EasgdEngine, easgd.outer),
    "diloco": LocalMode(diloco.DilocoEngine, diloco.outer),
}
"""By the name of the mode."""
