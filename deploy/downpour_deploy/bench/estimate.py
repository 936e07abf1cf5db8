"""What measured rates mean for training. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from downpour_deploy.bench.measure import Found, Point

AS_GOOD = 0.95
"""Of the best rate: from there on, the default size is kept."""


def percentile(ascending: Sequence[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of the values do not exceed."""
    return ascending[min(len(ascending) - 1, int(part * len(ascending)))]


def best(points: Sequence[Point], default_bytes: int) -> Point:
    """The size that moves most both ways; the default's if it is about as good."""
    fastest = max(points, key=lambda point: point.both)
    for point in points:
        if point.chunk_bytes == default_bytes and point.both >= AS_GOOD * fastest.both:
            return point
    return fastest


def step_s(found: Found, point: Point, model_bytes: int) -> float:
    """Seconds to push a gradient of ``model_bytes`` and to pull the weights, both under way at the same time."""
    return 2 * model_bytes / point.both + percentile(found.round_trips_s, 0.5)
