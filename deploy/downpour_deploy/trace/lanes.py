"""The swimlane as text: a line per rank, a column per moment, a letter for what the rank spends most of it on."""

from __future__ import annotations

from collections import defaultdict

from downpour_deploy.jobs.tables import clean
from downpour_deploy.trace.measure import Window
from downpour_deploy.trace.read import Span

LETTERS = {
    "forward": "F",
    "backward": "B",
    "send": "s",
    "receive": "r",
    "exchange": "x",
    "push": "p",
    "pull": "P",
    "wait": "w",
}
_COLOURS = {"F": 34, "B": 32, "s": 33, "r": 33, "x": 33, "p": 35, "P": 35, "w": 90}
OTHER, NOTHING = "o", "·"
LEAST = 20
"""Columns for the spans, however narrow the terminal is."""


def draw(part: Window, wide: int, coloured: bool = False) -> list[str]:
    """Lines of at most ``wide`` columns, colour codes not counted."""
    names = [clean(process.name) for process, _ in part.rows]
    margin = max(map(len, names)) + 2
    cells = max(LEAST, wide - margin)
    took_ms = (part.end_ns - part.begin_ns) / 1e6
    seen: set[str] = set()
    lines = []
    for name, (_, spans) in zip(names, part.rows, strict=True):
        letters = _letters(spans, part, cells)
        seen.update(letters)
        lines.append(name.ljust(margin) + (_painted(letters) if coloured else letters))
    known = [f"{letter} {name}" for name, letter in LETTERS.items() if letter in seen]
    known += [f"{OTHER} other"] if OTHER in seen else []
    return [f"{part.title}, {took_ms:.1f} ms: " + ", ".join([*known, f"{NOTHING} nothing"]), *lines]


def _letters(spans: tuple[Span, ...], part: Window, cells: int) -> str:
    """Spans that lie within others come later in ``spans`` and win over them."""
    width = max(1.0, (part.end_ns - part.begin_ns) / cells)
    taken: list[dict[str, float]] = [defaultdict(float) for _ in range(cells)]
    for span in spans:
        letter = LETTERS.get(span.name, OTHER)
        begin, end = max(span.begin_ns, part.begin_ns) - part.begin_ns, min(span.end_ns, part.end_ns) - part.begin_ns
        for cell in range(min(cells - 1, int(begin / width)), min(cells - 1, int(end / width)) + 1):
            overlap = min(end, (cell + 1) * width) - max(begin, cell * width)
            if overlap <= 0:
                continue
            for other in taken[cell]:
                taken[cell][other] = min(taken[cell][other], width - overlap)
            taken[cell][letter] += overlap
    return "".join(_most(cell, width) for cell in taken)


def _most(cell: dict[str, float], width: float) -> str:
    nothing = width - sum(cell.values())
    if not cell or max(cell.values()) < nothing:
        return NOTHING
    return max(cell, key=lambda letter: cell[letter])


def _painted(letters: str) -> str:
    return "".join(f"\x1b[{_COLOURS[c]}m{c}\x1b[0m" if c in _COLOURS else c for c in letters)
