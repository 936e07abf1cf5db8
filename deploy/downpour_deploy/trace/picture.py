"""The swimlane as SVG, alone or in a page with the figures; both need nothing else."""

from __future__ import annotations

from html import escape

from downpour_deploy.trace.chrome import kind_of
from downpour_deploy.trace.measure import Measured, Window
from downpour_deploy.trace.read import Process, Span, Trace
from downpour_deploy.trace.show import text

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#59a14f",
    "send": "#f2b134",
    "receive": "#e58606",
    "exchange": "#edc948",
    "push": "#b07aa1",
    "pull": "#d37295",
    "wait": "#bab0ac",
}
OTHER = "#9d7660"
WIDTH, LANE, GAP, TOP = 960, 26, 6, 54
_LETTER = 7
"""About the width of a character."""


def picture(trace: Trace, measured: Measured, part: Window, html: bool) -> str:
    """An SVG document, or an HTML page with it and with what ``downpour report`` prints."""
    svg = _svg(trace, measured, part)
    if not html:
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + svg
    figures = escape("\n".join(text(measured)))
    title = escape(f"{trace.job}: {part.title}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f'<body style="font-family:sans-serif;margin:2em">\n{svg}<pre>{figures}</pre>\n</body></html>\n'
    )


def _svg(trace: Trace, measured: Measured, part: Window) -> str:
    margin = max(len(process.name) for process, _ in part.rows) * _LETTER + 16
    height = TOP + len(part.rows) * (LANE + GAP) + 30
    total = margin + WIDTH + 16
    busy = ", ".join(
        f"replica {r.replica} {r.utilisation:.1%} busy" + (f" (at best {r.theory:.1%})" if r.theory else "")
        for r in measured.replicas
        if r.ranks > 1
    )
    title = f"{trace.job}, {part.title}" + (f": {busy}" if busy else "")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" viewBox="0 0 {total} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-size="14">{escape(title)}</text>',
        *_legend(part),
    ]
    scale = WIDTH / max(1, part.end_ns - part.begin_ns)
    for number, (process, spans) in enumerate(part.rows):
        lines += _lane(process, spans, part, margin, TOP + number * (LANE + GAP), scale)
    lines += _axis(part, margin, height - 24)
    return "\n".join([*lines, "</svg>", ""])


def _legend(part: Window) -> list[str]:
    present = {span.name for _, spans in part.rows for span in spans}
    names = [name for name in COLOURS if name in present]
    names += ["other"] if present - COLOURS.keys() else []
    lines, x = [], 8
    for name in names:
        lines.append(f'<rect x="{x}" y="28" width="12" height="12" fill="{COLOURS.get(name, OTHER)}"/>')
        lines.append(f'<text x="{x + 16}" y="38">{name}</text>')
        x += 28 + len(name) * _LETTER
    return lines


def _lane(process: Process, spans: tuple[Span, ...], part: Window, margin: int, y: int, scale: float) -> list[str]:
    lines = [
        f'<text x="{margin - 8}" y="{y + 17}" text-anchor="end">{escape(process.name)}</text>',
        f'<rect x="{margin}" y="{y}" width="{WIDTH}" height="{LANE}" fill="#f2f2f2"/>',
    ]
    for span in spans:
        begin, end = max(span.begin_ns, part.begin_ns), min(span.end_ns, part.end_ns)
        x, wide = margin + (begin - part.begin_ns) * scale, max(0.3, (end - begin) * scale)
        inset = 0 if kind_of(span.name) == "compute" else 5
        facts = "".join(f", {key} {value}" for key, value in span.facts.items())
        title = escape(f"{span.name}, {(span.end_ns - span.begin_ns) / 1e6:.3f} ms, step {span.step}{facts}")
        lines.append(
            f'<rect x="{x:.2f}" y="{y + inset}" width="{wide:.2f}" height="{LANE - 2 * inset}" '
            f'fill="{COLOURS.get(span.name, OTHER)}"><title>{title}</title></rect>'
        )
        label = str(span.facts.get("microbatch", ""))
        if label and wide > len(label) * _LETTER + 2:
            lines.append(
                f'<text x="{x + wide / 2:.2f}" y="{y + 17}" text-anchor="middle" fill="#ffffff">{escape(label)}</text>'
            )
    return lines


def _axis(part: Window, margin: int, y: int) -> list[str]:
    took_ms = (part.end_ns - part.begin_ns) / 1e6
    lines = [f'<path d="M{margin} {y}H{margin + WIDTH}" stroke="#000000"/>']
    for tick in range(5):
        x = margin + WIDTH * tick // 4
        anchor = "start" if tick == 0 else "end" if tick == 4 else "middle"
        lines.append(f'<path d="M{x} {y}v4" stroke="#000000"/>')
        lines.append(f'<text x="{x}" y="{y + 17}" text-anchor="{anchor}">{took_ms * tick / 4:.4g} ms</text>')
    return lines
