"""A value that a job is to reach: ``--target``, parsed.

::

    NAME<=VALUE   at most; NAME=VALUE is the same, as losses are meant to fall
    NAME>=VALUE   at least; NAME=+VALUE is the same, and needs no quotes in a shell

``loss=0.1``, ``accuracy=+0.97``, ``'return>=475'``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from downpour_common.errors import ConfigError

_GRAMMAR = re.compile(r"\s*([A-Za-z_][\w./-]*)\s*(<=|>=|=)\s*(\S+)\s*")
_RISES = re.compile(r"acc|accuracy|reward|return|score|f1|auc|precision|recall|bleu")
"""Words in names of what is meant to grow, of which a plain ``=`` says too little."""


@dataclass(frozen=True, slots=True)
class Target:
    """``name`` as it is given to ``downpour.log``, and the value that it is to reach, from above or from below."""

    name: str
    value: float
    at_least: bool

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.at_least else '<='}{self.value:g}"

    def met_by(self, value: float) -> bool:
        """Whether ``value`` is good enough. NaN never is."""
        return value >= self.value if self.at_least else value <= self.value


def parse_target(text: str) -> Target:
    """The target that ``text`` describes, as in the module; raises :class:`ConfigError`."""
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"target: expected NAME=VALUE (at most) or NAME=+VALUE (at least), such as loss=0.1 (found {text!r})"
        )
    name, relation, number = found.groups()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"target: {number!r} is no number; expected NAME=VALUE, such as loss=0.1 or accuracy=+0.97")
    rises = relation == "=" and number.startswith("+")
    words = re.split(r"[\W_]+", name.lower())
    if relation == "=" and not rises and any(_RISES.fullmatch(word) for word in words):
        raise ConfigError(
            f"target: {name}={number} means at most; write {name}=+{number} for at least {number}, "
            f"or '{name}<={number}' if at most is meant"
        )
    return Target(name, value, relation == ">=" or rises)
