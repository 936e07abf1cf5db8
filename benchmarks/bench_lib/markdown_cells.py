"""What tables in Markdown are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, all others to the right."""
    aligned = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, aligned, *rows)]


def where(document: Document) -> str:
    """When and on what it was measured."""
    machine = document["machine"]
    return (
        f"{document['date'][:10]}, {machine['cpu_model']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"libzmq {machine['libzmq']}."
    )
