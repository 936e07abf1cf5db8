"""Verdicts for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from downpour_deploy.doctor.verdict import Status, Verdict
from downpour_deploy.jobs.tables import clean


def text(verdicts: Sequence[Verdict], skipped: Sequence[str]) -> str:
    """A line per check, its action below it, and a line that sums up."""
    width = max((len(verdict.name) for verdict in verdicts), default=0)
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.status}  {verdict.name:<{width}}  {clean(verdict.detail)}")
        if verdict.action:
            lines.append(f"{'':<{width + 8}}→ {clean(verdict.action)}")
    if skipped:
        lines += ["", f"not checked, because the coordinator did not answer: {', '.join(skipped)}"]
    counts = Counter(verdict.status for verdict in verdicts)
    return "\n".join([*lines, "", ", ".join(f"{counts[status]} {status}" for status in Status)])


def document(verdicts: Sequence[Verdict], skipped: Sequence[str]) -> dict[str, Any]:
    """``ok``: nothing has failed. ``skipped``: names of checks that could not be made."""
    checks = [{"name": v.name, "status": v.status.value, "detail": v.detail, "action": v.action} for v in verdicts]
    ok = all(verdict.status is not Status.FAIL for verdict in verdicts)
    return {"checks": checks, "ok": ok, "skipped": list(skipped)}
