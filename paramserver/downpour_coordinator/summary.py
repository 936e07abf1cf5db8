"""What is left of a job in figures: ``summary.json`` in its folder, the document of ``downpour run --json``."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

SUMMARY = "summary.json"


def write_summary(folder: str, document: dict[str, Any]) -> None:
    """Write it, whole or not at all. Raises ``OSError``."""
    path = os.path.join(folder, SUMMARY)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def forget_summary(folder: str) -> None:
    """A job begins there: what an earlier one has left does not count any more. Raises ``OSError``."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, SUMMARY))
