"""A line search for the strong Wolfe conditions (Nocedal & Wright, Numerical Optimization, algorithms 3.5 and 3.6).

A generator: it yields the step to try, and is sent the loss there and its derivative along the line.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

C1, C2 = 1e-4, 0.9
"""Of the conditions f(α) ≤ f(0) + C1 α f'(0) and |f'(α)| ≤ C2 |f'(0)|."""
MOST_TRIALS = 25
FARTHEST, NEAREST = 10.0, 1.1
"""By how much a step that is too short grows, at most and at least."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A step ``at``, the ``loss`` there (not finite: it cannot be computed) and its ``slope`` along the line."""

    at: float
    loss: float
    slope: float


Search = Generator[float, tuple[float, float], Trial]


def strong_wolfe(loss: float, slope: float, first: float, noise: float = 0.0) -> Search:
    """Search from ``first``; returns the trial that meets the conditions, or, where none is found, the best one: with
    ``at`` 0 if none has a lower loss. ``loss`` and ``slope``, which is negative: at 0.

    ``noise``: differences of losses below ``noise * |loss|`` are rounding, and mean nothing.
    """
    origin = before = Trial(0.0, loss, slope)
    slack = noise * abs(loss)
    at = first
    for number in range(MOST_TRIALS):
        here = yield from _tried(at)
        above = not math.isfinite(here.loss) or here.loss > loss + C1 * at * slope + slack
        if above or (number > 0 and here.loss >= before.loss + slack):
            return (yield from _zoom(origin, slack, before, here, MOST_TRIALS - number - 1))
        if abs(here.slope) <= -C2 * slope:
            return here
        if here.slope >= 0:
            return (yield from _zoom(origin, slack, here, before, MOST_TRIALS - number - 1))
        longest = at + (FARTHEST - 1) * max(at - before.at, at * 0.1)
        at, before = _between(before, here, at * NEAREST, longest), here
    return before


def _tried(at: float) -> Search:
    loss, slope = yield at
    return Trial(at, loss if math.isfinite(slope) else math.inf, slope)


def _zoom(origin: Trial, slack: float, low: Trial, high: Trial, trials: int) -> Search:
    """Algorithm 3.6: ``low`` is the best step so far, and a good one lies between it and ``high``."""
    for _ in range(trials):
        width = abs(high.at - low.at)
        if width * abs(low.slope) <= 1e-3 * slack or width <= 1e-12 * max(low.at, high.at):
            break  # nothing in between can be told from it
        near, far = sorted((low.at, high.at))
        here = yield from _tried(_between(low, high, near + 0.1 * width, far - 0.1 * width))
        bound = origin.loss + C1 * here.at * origin.slope + slack
        if not math.isfinite(here.loss) or here.loss > bound or here.loss > low.loss + slack:
            high = here
            continue
        if abs(here.slope) <= -C2 * origin.slope:
            return here
        if here.slope * (high.at - low.at) >= 0:
            high = low
        low = here
    return low


def _between(one: Trial, other: Trial, least: float, most: float) -> float:
    """Where the cubic through both has its minimum (Nocedal & Wright, equation 3.59), kept in ``least`` … ``most``; the
    middle where there is no such cubic."""
    if not (math.isfinite(one.loss) and math.isfinite(other.loss)):
        return (least + most) / 2
    if one.at > other.at:
        one, other = other, one
    d1 = one.slope + other.slope - 3 * (one.loss - other.loss) / (one.at - other.at)
    square = d1 * d1 - one.slope * other.slope
    if not square >= 0:
        return (least + most) / 2
    d2 = math.sqrt(square)
    below = other.slope - one.slope + 2 * d2
    if below == 0 or not math.isfinite(below):
        return (least + most) / 2
    found = other.at - (other.at - one.at) * (other.slope + d2 - d1) / below
    return min(max(found, least), most)
