"""What was found out, as JSON files: how they begin, what stood in one before, and writing them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_lib.machine import Machine


def head(benchmark: str, schema: int, machine: Machine) -> dict[str, Any]:
    """How a benchmark's document begins: what it is, when and where it was made."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"schema": schema, "benchmark": benchmark, "date": now, "machine": asdict(machine)}


def before(path: Path, benchmark: str, schema: int) -> dict[str, Any]:
    """The document that is in the file already; empty where there is none of this benchmark and schema."""
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text())
    return document if (document.get("schema"), document.get("benchmark")) == (schema, benchmark) else {}


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
