"""Changes to a job's description while it runs: what may change, and how far a change is.

A change is checked against the whole description first. Then the job takes a checkpoint, all its processes end, and it
goes on from that checkpoint with the new description: so every mode can follow every other one. It costs no restart.
If the job does not come to its first step with it, the change is taken back, and the job goes on as it was.

::

    wanted → (checkpoint committed) leaving → (all ended) on trial → (a step was made) settled
                                                                   → (failed before) taken back
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from downpour_common.config import JobSpec, Settings, job_spec
from downpour_common.errors import ConfigError

OF_JOB = ("mode", "target", "compress")
"""Keys of the job itself that may change, beside those of its settings."""
FIXED = ("chunk_bytes", "transport", "port", "checkpoint_url")
"""Settings that a job keeps: they are of its start, or of the launcher's own sockets and copies."""
OUTCOMES_KEPT = 16


def changed(spec: JobSpec, assignments: Iterable[str]) -> JobSpec:
    """``spec`` with these ``key=value``. Raises :class:`ConfigError` with everything that is wrong with it."""
    fields = spec.model_dump(mode="json")
    problems, given = [], False
    for text in assignments:
        key, equals, value = (part.strip() for part in text.partition("="))
        name = key.removeprefix("settings.")
        given = True
        if not equals:
            problems.append(f"{text}: expected key=value")
        elif name in FIXED:
            problems.append(f"{name}: a job keeps this from its start; stop it, and go on with --resume")
        elif name in Settings.model_fields:
            fields["settings"][name] = value
        elif key in OF_JOB:
            fields[key] = value
        elif key == "workers":
            problems.append("workers: `downpour scale` changes the number of workers of a cluster's job")
        elif key in JobSpec.model_fields:
            problems.append(f"{key}: cannot change while the job runs; stop it, and go on with --resume")
        else:
            near = difflib.get_close_matches(key, (*OF_JOB, *Settings.model_fields), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OF_JOB)}, and what --set takes"
            problems.append(f"{key}: no such key; {hint}")
    if not given:
        problems.append("nothing to set: give key=value, such as mode=sync")
    if problems:
        raise ConfigError(*problems)
    return job_spec(**fields)


def differences(before: JobSpec, after: JobSpec) -> dict[str, list[Any]]:
    """What differs: key → [before, after]."""
    old, new = (spec.model_dump(mode="json") for spec in (before, after))
    old, new = ({**fields, **fields["settings"]} for fields in (old, new))
    return {key: [old[key], value] for key, value in new.items() if key != "settings" and value != old[key]}


class Changes:
    """The change of a job that is under way, and what became of former ones."""

    def __init__(self) -> None:
        self.token = ""
        """of the newest"""
        self.wanted: JobSpec | None = None
        """asked for and not in force yet"""
        self.leaving = False
        """the job's processes end for it"""
        self.before: JobSpec | None = None
        """what was in force before the one that is on trial"""
        self.number = 0
        """of the checkpoint from which the job goes on with it"""
        self._outcomes: dict[str, str] = {}
        """by token: why it is not in force; "" if it is"""

    @property
    def wish(self) -> str:
        """Token of the checkpoint that the change waits for, "" without a change that waits for one."""
        return f"set {self.token}" if self.wanted is not None and not self.leaving else ""

    def knows(self, token: str) -> bool:
        """Whether this change has been asked for."""
        return token == self.token or token in self._outcomes

    def ask(self, token: str, spec: JobSpec, assignments: Iterable[str]) -> None:
        """A change of ``spec``. Raises :class:`ConfigError` where it is impossible, or another one is under way."""
        if not 0 < len(token) <= 64:
            raise ConfigError("a change has a token of at most 64 characters")
        after = changed(spec, assignments)
        if self.wanted is not None or self.before is not None:
            raise ConfigError("another change of this job is under way; wait for it")
        self.token, self.number = token, 0
        if after == spec:
            self._over("")
        else:
            self.wanted = after

    def leave(self, number: int) -> None:
        """Checkpoint ``number`` is there; all processes are to end."""
        self.leaving, self.number = True, number

    def take(self, spec: JobSpec) -> JobSpec:
        """All have ended: what the job goes on with, on trial."""
        assert self.wanted is not None
        after, self.before, self.wanted, self.leaving = self.wanted, spec, None, False
        return after

    def settled(self) -> None:
        """The job trains with it."""
        if self.before is not None:
            self.before = None
            self._over("")

    def take_back(self, why: str) -> JobSpec:
        """It does not: what the job goes on with."""
        assert self.before is not None
        before, self.before = self.before, None
        self._over(why)
        return before

    def progress(self, token: str, over: bool) -> tuple[str, str]:
        """How far a change is: waiting, changing, changed or failed, and why it failed. ``over``: the job is."""
        if token in self._outcomes:
            error = self._outcomes[token]
            return ("failed" if error else "changed"), error
        if over:
            return "failed", "the job has ended before it"
        return ("changing" if self.leaving or self.before is not None else "waiting"), ""

    def _over(self, error: str) -> None:
        self._outcomes[self.token] = error
        while len(self._outcomes) > OUTCOMES_KEPT:
            del self._outcomes[next(iter(self._outcomes))]

    def document(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {
            "token": self.token,
            "wanted": self.wanted and self.wanted.model_dump(mode="json"),
            "leaving": self.leaving,
            "before": self.before and self.before.model_dump(mode="json"),
            "number": self.number,
            "outcomes": list(self._outcomes.items()),
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Changes:
        """The inverse of :meth:`document`."""
        self = cls()
        self.token, self.leaving, self.number = document["token"], document["leaving"], document["number"]
        self.wanted, self.before = (
            JobSpec(**document[name]) if document[name] else None for name in ("wanted", "before")
        )
        self._outcomes = dict(document["outcomes"])
        return self
