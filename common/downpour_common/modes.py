"""How replicas agree: the ``--mode`` of a job, parsed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from downpour_common.errors import ConfigError

MODES: dict[str, str] = {
    "async": "apply each push on arrival, answer at once (Downpour SGD)",
    "ssp": "apply on arrival, answer when the slowest worker is at most s clocks behind (ssp:s)",
    "sync": "average one contribution of every worker by samples, in slot order, then answer all",
}
"""Name → one line for people. The policy of the same name is registered in ``downpour_server.policy``."""


@dataclass(frozen=True, slots=True)
class Mode:
    """``name`` of the policy and, for ``ssp``, the bound ``staleness`` in clocks (0 elsewhere)."""

    name: str
    staleness: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.staleness}" if self.name == "ssp" else self.name

    @property
    def synchronous(self) -> bool:
        """Whether contributions are applied by rounds, so that data and weights follow from the seed alone."""
        return self.name == "sync"


def parse_mode(text: str) -> Mode:
    """``async`` | ``ssp:s`` | ``sync`` → :class:`Mode`; raises :class:`ConfigError` naming what is allowed."""
    name, colon, argument = text.strip().partition(":")
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"mode: unknown mode {text!r}{hint} (known: async, ssp:s such as ssp:3, sync)")
    if name != "ssp":
        if colon:
            raise ConfigError(f"mode: {name!r} takes no argument, found {text!r}")
        return Mode(name)
    if not argument.isdecimal():
        raise ConfigError(f"mode: ssp needs its bound in clocks, such as ssp:3; found {text!r}")
    return Mode(name, int(argument))
