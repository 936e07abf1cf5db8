"""What the servers do about contributions that are late: ``--set compensation=…``, parsed.

::

    off | stale-lr | dc[:STRENGTH] | dc-adaptive[:STRENGTH] | gap
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from downpour_common.errors import ConfigError

STRENGTHS: dict[str, float | None] = {"off": None, "stale-lr": None, "dc": 0.04, "dc-adaptive": 2.0, "gap": None}
"""By way: the strength (λ) it has unless another is given; None: it takes none. Of the same names are those in
``downpour_server.compensation``."""
KNOWN = "off, stale-lr, dc:0.04, dc-adaptive:2, gap"
SPARE_BASES = 3
"""Weights that are kept for a worker at most, beyond one for each step that its gradients are held back: those it
computes on, those that are on their way to it (``fetch_ahead``), and one more that it may have pulled."""


@dataclass(frozen=True, slots=True)
class CompensationSpec:
    """``name`` of the way, and its ``strength``, 0 where it takes none."""

    name: str
    strength: float = 0.0

    def __str__(self) -> str:
        return self.name if STRENGTHS[self.name] is None else f"{self.name}:{self.strength:g}"

    @property
    def needs_bases(self) -> bool:
        """Whether it compares weights with those that a contribution was computed on."""
        return self.name in ("dc", "dc-adaptive", "gap")


def parse_compensation(text: str) -> CompensationSpec:
    """What ``text`` describes, as in the module; raises :class:`ConfigError` naming what is allowed."""
    name, colon, argument = text.strip().partition(":")
    if name not in STRENGTHS:
        near = difflib.get_close_matches(name, STRENGTHS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"compensation: unknown way {text!r}{hint} (known: {KNOWN})")
    usual = STRENGTHS[name]
    if usual is None:
        if colon:
            raise ConfigError(f"compensation: {name} takes no number, found {text!r}")
        return CompensationSpec(name)
    if not colon:
        return CompensationSpec(name, usual)
    try:
        strength = float(argument)
    except ValueError:
        strength = math.nan
    if not 0 < strength < math.inf:
        raise ConfigError(f"compensation: {name} takes a number above 0, such as {name}:{usual:g}; found {text!r}")
    return CompensationSpec(name, strength)
