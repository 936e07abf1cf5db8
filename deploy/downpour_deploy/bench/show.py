"""Results for people and for programs."""

from __future__ import annotations

from typing import Any

from downpour_common.sizes import format_bytes
from downpour_deploy.bench.estimate import best, percentile, step_s
from downpour_deploy.bench.measure import Found
from downpour_deploy.jobs.tables import columns

_HEAD = ("CHUNK", "THERE GB/s", "BACK GB/s", "BOTH WAYS GB/s", "PUSH AND PULL ms")


def text(found: Found, where: str, model_bytes: int, default_bytes: int) -> str:
    """``where``: how the link is described; ``default_bytes``: size of chunks unless set otherwise."""
    median_ms, late_ms = (1e3 * percentile(found.round_trips_s, part) for part in (0.5, 0.99))
    winner = best(found.points, default_bytes)
    rows = [
        (
            f"{format_bytes(point.chunk_bytes)}{' *' if point is winner else ''}",
            *(f"{rate / 1e9:.3f}" for rate in (point.there, point.back, point.both)),
            f"{1e3 * step_s(found, point, model_bytes):.1f}",
        )
        for point in found.points
    ]
    model = _megabytes(model_bytes)
    took_ms = 1e3 * step_s(found, winner, model_bytes)
    setting = "the default" if winner.chunk_bytes == default_bytes else f"--set chunk_bytes={winner.chunk_bytes}"
    return "\n".join(
        [
            where,
            f"round trip of a small message: median {median_ms:.3f} ms, p99 {late_ms:.3f} ms "
            f"({len(found.round_trips_s)} of them)",
            "",
            *columns([_HEAD, *rows]),
            "",
            f"best chunk: {format_bytes(winner.chunk_bytes)} ({setting})",
            f"a model of {model}: push and pull take about {took_ms:.{0 if took_ms >= 20 else 1}f} ms per step over "
            "this link; the update itself comes on top",
        ]
    )


def document(found: Found, address: str, encrypted: bool, model_bytes: int, default_bytes: int) -> dict[str, Any]:
    """Seconds, bytes, and bytes per second; ``both`` counts both directions."""
    winner = best(found.points, default_bytes)
    return {
        "address": address,
        "encrypted": encrypted,
        "round_trip_s": {
            "median": percentile(found.round_trips_s, 0.5),
            "p99": percentile(found.round_trips_s, 0.99),
            "count": len(found.round_trips_s),
        },
        "window_bytes": found.window_bytes,
        "points": [
            {"chunk_bytes": p.chunk_bytes, "there": p.there, "back": p.back, "both": p.both} for p in found.points
        ],
        "best_chunk_bytes": winner.chunk_bytes,
        "model_bytes": model_bytes,
        "step_s": step_s(found, winner, model_bytes),
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:g} MB" if count % 1_000_000 == 0 else format_bytes(count)
