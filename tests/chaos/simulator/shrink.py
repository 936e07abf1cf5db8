"""Makes a failing world smaller: as few faults as still fail, then as little work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

from simulator.scenario import Scenario, scenario
from simulator.world import play

BUDGET = 200
"""Worlds that are tried at most."""


def with_faults(chosen: Scenario, numbers: str) -> Scenario:
    """Only the faults of these numbers; ``-``: none."""
    wanted = [] if numbers == "-" else [int(n) for n in numbers.split(",")]
    return replace(chosen, faults=tuple(chosen.faults[n] for n in wanted))


def _smaller(chosen: Scenario) -> Iterator[Scenario]:
    for index in range(len(chosen.faults)):
        yield replace(chosen, faults=chosen.faults[:index] + chosen.faults[index + 1 :])
    for field, less in (("passes", 1), ("tensors", 1), ("workers", 1), ("shards", 1)):
        value = getattr(chosen, field)
        if value > less:
            yield replace(chosen, **{field: value - 1})
    if chosen.samples > chosen.batch:
        yield replace(chosen, samples=chosen.samples - chosen.batch)
    weather = chosen.weather
    for name in ("loss", "copies", "rare"):
        if getattr(weather, name):
            yield replace(chosen, weather=replace(weather, **{name: 0.0}))


def smallest(chosen: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """As small as the budget allows."""
    left, again = BUDGET, True
    while again and left > 0:
        again = False
        for candidate in _smaller(chosen):
            left -= 1
            if fails(candidate):
                chosen, again = candidate, True
                break
            if left <= 0:
                break
    return chosen


def report(seed: int, mode: str | None) -> str:
    """What is left of a failing seed, and how to see it again."""
    before = scenario(seed, mode)
    kind = play(before).violation[:25]
    small = smallest(before, lambda s: play(s).violation[:25] == kind)
    changed = [
        f"{name}={getattr(small, name)!r}"
        for name in ("workers", "shards", "tensors", "passes", "samples", "weather")
        if getattr(small, name) != getattr(before, name)
    ]
    numbers = ",".join(str(before.faults.index(f)) for f in small.faults) or "-"
    chosen = f" --mode {mode}" if mode else ""
    return (
        f"smallest: {small.describe()}\n  {play(small).violation[:600]}\n"
        f"replay:   python tests/chaos/simulate.py --seed {seed}{chosen} --faults {numbers} --trace"
        + (f"\n  (smaller still with {', '.join(changed)})" if changed else "")
    )


shrink = SimpleNamespace(with_faults=with_faults, report=report)
