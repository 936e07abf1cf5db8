"""Results for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from downpour_common.sizes import format_bytes
from downpour_deploy.tune.search import KNEE_SHARE, Search


def table(search: Search) -> Table:
    """One row per batch size; the knee's is marked."""
    found = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("batch size", "samples/s", "ms/step", "memory", "of steps", "speed-up"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("", no_wrap=True)
    for row in search.rows:
        marks = ["knee"] if row is search.knee else []
        marks += ["the script's own"] if row.batch_size == search.own_batch_size else []
        found.add_row(
            str(row.batch_size),
            f"{row.samples_per_s:,.0f}" if row.samples_per_s >= 100 else f"{row.samples_per_s:.3g}",
            f"{1e3 * row.step_s:.{3 if row.step_s < 0.01 else 1}f}",
            format_bytes(row.peak_bytes),
            format_bytes(max(0, row.peak_bytes - row.baseline_bytes)),
            f"{row.samples_per_s / search.rows[0].samples_per_s:.2f}",
            ", ".join(marks),
        )
    return found


def conclusion(search: Search) -> str:
    """What the table says, in a sentence or two."""
    best, chosen = search.best, search.knee
    if best is None or chosen is None:
        return f"nothing was measured: {search.stopped}"
    share = chosen.samples_per_s / best.samples_per_s
    lines = [f"stopped: {search.stopped}"]
    if chosen is best:
        lines.append(f"take {chosen.batch_size}: the best throughput, and no smaller one has {KNEE_SHARE:.0%} of it")
    else:
        lines.append(f"take {chosen.batch_size}: {share:.0%} of the best throughput, which {best.batch_size} has")
    return "\n".join(lines)


def document(search: Search, script: str, workers: int) -> dict[str, Any]:
    """Seconds, bytes, samples per second of one worker."""
    best, chosen = search.best, search.knee
    return {
        "script": script,
        "workers": workers,
        "device": search.device,
        "own_batch_size": search.own_batch_size,
        "rows": [
            {
                "batch_size": row.batch_size,
                "samples_per_s": row.samples_per_s,
                "step_s": row.step_s,
                "baseline_bytes": row.baseline_bytes,
                "peak_bytes": row.peak_bytes,
                "speed_up": row.samples_per_s / search.rows[0].samples_per_s,
            }
            for row in search.rows
        ],
        "best": None if best is None else best.batch_size,
        "knee": None if chosen is None else chosen.batch_size,
        "stopped": search.stopped,
    }
