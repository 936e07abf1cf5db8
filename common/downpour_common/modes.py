"""How replicas agree: the ``--mode`` of a job, parsed.

::

    NAME[:ARGUMENT][,OPTION=VALUE]...[;GROUP=MODE]...

``average:50``, ``sync,backup=1``, ``diloco:100,lr=0.7,momentum=0.9``, ``sync;1=async`` (parameter group 1 of the
optimizer asynchronously, all others in rounds).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from downpour_common.errors import ConfigError

MODES: dict[str, str] = {
    "async": "apply each push on arrival, answer at once (Downpour SGD)",
    "ssp": "apply on arrival, answer when the slowest worker is at most s clocks behind (ssp:s)",
    "sync": "average one contribution of every worker by samples, in slot order, then answer all",
    "average": "h local steps, then the mean of all workers' weights (average:h, local SGD)",
    "easgd": "h local steps, then worker and servers move towards each other (easgd:h)",
    "diloco": "h local steps, then one outer Nesterov step with the workers' mean change (diloco:h)",
    "lbfgs": "L-BFGS on all data: gradients in portions, vectors on the shards (Sandblaster)",
}
"""Name → one line for people. The policy of the same name is registered in ``downpour_server.policy``."""


@dataclass(frozen=True, slots=True)
class Option:
    """One ``name=value`` of a mode: its default, its least and largest value, whether it counts something."""

    default: float
    least: float = 0.0
    most: float = math.inf
    whole: bool = False


OPTIONS: dict[str, dict[str, Option]] = {
    "sync": {"backup": Option(0, whole=True)},
    "easgd": {"alpha": Option(0.0, most=1.0), "momentum": Option(0.0, most=0.999)},
    "diloco": {
        "lr": Option(0.7, least=1e-6),
        "momentum": Option(0.9, most=0.999),
        "fragments": Option(1, least=1, most=1024, whole=True),
    },
    "lbfgs": {
        "history": Option(10, least=1, most=1000, whole=True),
        "portions": Option(4, least=1, most=4096, whole=True),
        "backup": Option(1, most=1, whole=True),
    },
}
"""By mode. ``backup`` of ``sync``: workers that a round does without; ``alpha`` 0: 0.9 / workers; ``fragments``: parts
of the model that are exchanged one after the other; ``history``: pairs of L-BFGS; ``portions``: of the data, per
worker; ``backup`` of ``lbfgs``, 0 or 1: whether workers with nothing to do repeat portions that others are still at."""
ARGUMENTS = {
    "ssp": (0, "ssp needs its bound in clocks, such as ssp:3"),
    "average": (1, "average needs its local steps, such as average:50"),
    "easgd": (1, "easgd needs its local steps, such as easgd:50"),
    "diloco": (1, "diloco needs its local steps, such as diloco:50"),
}
"""By mode: the least value of the number after the colon, and what to say where it is missing."""
KNOWN = "async, ssp:s such as ssp:3, sync, average:h such as average:50, easgd:h, diloco:h, lbfgs"
EACH_STEP = frozenset({"async", "ssp", "sync"})
"""Modes that exchange every step, so that parameter groups may have different ones of them."""


@dataclass(frozen=True)
class Mode:
    """``name`` of the policy, and its number: the bound ``staleness`` in clocks of ``ssp``, the local steps ``every``
    of ``average``, ``easgd`` and ``diloco`` (0 and 1 elsewhere). ``options`` are those given, in the table's order."""

    name: str
    staleness: int = 0
    every: int = 1
    options: tuple[tuple[str, float], ...] = ()
    groups: tuple[tuple[int, Mode], ...] = field(default=())
    """parameter groups with a mode of their own, ascending"""

    def __str__(self) -> str:
        number = {"ssp": f":{self.staleness}"}.get(self.name, f":{self.every}" if self.local else "")
        options = "".join(f",{name}={value:g}" for name, value in self.options)
        return f"{self.name}{number}{options}" + "".join(f";{group}={mode}" for group, mode in self.groups)

    def option(self, name: str) -> float:
        """The value of an option of this mode, given or not."""
        return dict(self.options).get(name, OPTIONS[self.name][name].default)

    @cached_property
    def backup(self) -> int:
        """``sync``: contributions that a round does without. 0 elsewhere."""
        return int(self.option("backup")) if self.name == "sync" else 0

    @property
    def synchronous(self) -> bool:
        """Whether *all* contributions are applied by complete rounds, one per step, so that data and weights follow
        from the seed alone."""
        return self.name == "sync" and not self.backup and not self.groups

    @property
    def local(self) -> bool:
        """Whether workers take steps of their own with their own optimizer, and exchange weights now and then."""
        return self.name in ("average", "easgd", "diloco")

    @property
    def in_rounds(self) -> bool:
        """Whether contributions of several workers are applied as one update."""
        return self.name in ("sync", "average", "diloco")

    @property
    def joined_by_number(self) -> bool:
        """Whether some parameter groups train in rounds that contributions name by their numbers, while workers join
        and leave: one that joins says from which on it takes part."""
        modes = (self, *dict(self.groups).values())
        return not self.synchronous and any(
            mode.name in ("average", "diloco") or (mode.name == "sync" and not mode.backup) for mode in modes
        )

    def of_group(self, group: int) -> Mode:
        """The mode of a parameter group; of -1, that of everything else."""
        return dict(self.groups).get(group, Mode(self.name, self.staleness, self.every, self.options))


def parse_mode(text: str) -> Mode:
    """The mode that ``text`` describes, as in the module; raises :class:`ConfigError` naming what is allowed."""
    whole, *parts = text.strip().split(";")
    mode = _parse_one(whole)
    if not parts:
        return mode
    groups: dict[int, Mode] = {}
    for part in parts:
        number, equals, own = part.strip().partition("=")
        if not equals or not number.strip().isdecimal():
            raise ConfigError(f"mode: expected GROUP=MODE such as 1=async after ';', found {part!r}")
        if groups.setdefault(int(number), parsed := _parse_one(own)) != parsed:
            raise ConfigError(f"mode: parameter group {int(number)} is given twice, with different modes")
    others = [m for m in (mode, *groups.values()) if m.name not in EACH_STEP]
    if others:
        raise ConfigError(
            f"mode: parameter groups may be async, ssp:s or sync, which exchange every step; {others[0]} does not"
        )
    return Mode(mode.name, mode.staleness, mode.every, mode.options, tuple(sorted(groups.items())))


def with_groups(mode: str, group_modes: Iterable[str]) -> str:
    """``mode`` with the ``GROUP=MODE`` of ``--group-mode`` added, not checked."""
    return ";".join((mode, *group_modes))


def _parse_one(text: str) -> Mode:
    head, *assignments = text.strip().split(",")
    name, colon, argument = head.strip().partition(":")
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"mode: unknown mode {text!r}{hint} (known: {KNOWN})")
    number = 0
    if name in ARGUMENTS:
        least, missing = ARGUMENTS[name]
        if not argument.isdecimal():
            raise ConfigError(f"mode: {missing}; found {text!r}")
        number = int(argument)
        if number < least:
            raise ConfigError(f"mode: {missing}, at least {least}; found {text!r}")
    elif colon:
        raise ConfigError(f"mode: {name!r} takes no argument, found {text!r}")
    options = _options(name, assignments)
    return Mode(name, number if name == "ssp" else 0, 1 if name not in ARGUMENTS or name == "ssp" else number, options)


def _options(name: str, assignments: list[str]) -> tuple[tuple[str, float], ...]:
    known = OPTIONS.get(name, {})
    given: dict[str, float] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        option = known.get(key)
        if not equals or option is None:
            options = f"its options: {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"mode: {name} does not know {assignment.strip()!r}; {options}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not option.least <= value <= option.most or (option.whole and value != int(value)) or math.isinf(value):
            kind = "a whole number" if option.whole else "a number"
            most = f" to {option.most:g}" if option.most < math.inf else " or more"
            raise ConfigError(f"mode: {name}'s {key} is {kind}, {option.least:g}{most}; found {text!r}")
        given[key] = value
    return tuple((key, given[key]) for key in known if key in given)
