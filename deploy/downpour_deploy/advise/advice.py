"""What a rule has to say, and what of it a job can follow."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from downpour_common.config import JobSpec, job_spec
from downpour_common.errors import ConfigError

_OPTIONS = {"workers": "-w", "shards": "-s", "restarts": "--restarts", "replication": "--replication"}


@dataclass(frozen=True, slots=True)
class Change:
    """Fields of a :class:`JobSpec` with other values, those of ``settings`` in a dict of their own."""

    fields: dict[str, Any]

    @property
    def options(self) -> str:
        """As they are typed behind ``downpour run``."""
        parts = []
        for name, value in self.fields.items():
            if name == "settings":
                parts += [f"--set {shlex.quote(f'{key}={setting}')}" for key, setting in value.items()]
            else:
                parts.append(f"{_OPTIONS.get(name, f'--{name}')} {shlex.quote(str(value))}")
        return " ".join(parts)

    def suits(self, spec: JobSpec) -> bool:
        """Whether the job could be described so."""
        known = spec.model_dump()
        fields = {**known, **self.fields, "settings": {**known["settings"], **self.fields.get("settings", {})}}
        try:
            return job_spec(**fields) != spec
        except ConfigError:
            return False


@dataclass(frozen=True, slots=True)
class Advice:
    """``what`` to do and ``why``, in words; the ``figures`` that lead to it; ``changes`` that would do it, the one to
    try first first. ``weight``: about which share of the work it may save, for the order."""

    rule: str
    what: str
    why: str
    figures: dict[str, float | int | str]
    weight: float
    changes: tuple[Change, ...] = field(default=())

    def for_job(self, spec: JobSpec) -> Advice | None:
        """With those changes that the job can take; None if it has some and can take none."""
        possible = tuple(change for change in self.changes if change.suits(spec))
        if self.changes and not possible:
            return None
        return Advice(self.rule, self.what, self.why, self.figures, self.weight, possible)

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "rule": self.rule,
            "what": self.what,
            "why": self.why,
            "figures": self.figures,
            "changes": [{"options": change.options, "fields": change.fields} for change in self.changes],
        }


def to(**fields: Any) -> Change:
    """A change of these fields."""
    return Change(fields)


def setting(**settings: Any) -> Change:
    """A change of these settings."""
    return Change({"settings": settings})
