"""Checkpoints as text and as JSON. Pure functions but for the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from downpour_common.sizes import format_bytes
from downpour_coordinator.sources import Found
from downpour_deploy.jobs.tables import clean, columns, count, duration


def document(found: Found) -> dict[str, Any]:
    """One checkpoint. ``sound`` is None where its files were not read."""
    manifest = found.manifest
    fields = manifest.fields if manifest is not None else {}
    return {
        "number": found.number,
        "place": found.place,
        "clock": fields.get("clock"),
        "epoch": fields.get("data", {}).get("epoch"),
        "bytes": manifest.nbytes if manifest is not None else None,
        "written_s": found.written_s,
        "mode": fields.get("mode"),
        "shards": fields.get("shards"),
        "job": fields.get("job"),
        "sound": False if found.problems else True if found.checked else None,
        "problems": list(found.problems),
    }


def table(found: Sequence[Found], now_s: float | None = None) -> list[str]:
    """``downpour checkpoint ls``"""
    now_s = time.time() if now_s is None else now_s
    rows: list[Sequence[object]] = [("NUMBER", "CLOCK", "SIZE", "AGE", "MODE", "SHARDS", "")]
    for each in found:
        if each.manifest is None:
            rows.append((each.number, "-", "-", _age(each, now_s), "-", "-", f"DAMAGED: {each.problems[0]}"))
            continue
        fields = each.manifest.fields
        state = "sound" if each.checked else ""
        if each.problems:
            state = f"DAMAGED: {'; '.join(each.problems)}"
        size = format_bytes(each.manifest.nbytes)
        mode = fields.get("mode", "-")
        rows.append((each.number, fields["clock"], size, _age(each, now_s), mode, fields["shards"], state))
    return columns(rows)


def verdict(found: Found) -> list[str]:
    """``downpour checkpoint verify``, one checkpoint."""
    if not found.problems and found.manifest is not None:
        files = count(len(found.manifest.files), "file")
        return [f"{clean(found.place)}: sound ({files}, {format_bytes(found.manifest.nbytes)})"]
    return [f"{clean(found.place)}: DAMAGED", *(f"    {clean(problem)}" for problem in found.problems)]


def _age(found: Found, now_s: float) -> str:
    return "-" if found.written_s is None else duration(max(0.0, now_s - found.written_s))
