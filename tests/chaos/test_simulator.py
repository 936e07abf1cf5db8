"""The simulator on a few seeds, and that it is what it says: repeatable, and able to see what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutations import MUTATIONS, caught
from simulator.scenario import scenario
from simulator.world import play

QUICK = 200
GROUPS = 4


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_invariant_is_violated(group: int) -> None:
    """A fourth of the quick seeds each."""
    for seed in range(group, QUICK, GROUPS):
        outcome = play(scenario(seed))
        replay = f"python tests/chaos/simulate.py --seed {seed} --trace"
        assert not outcome.violation, f"{outcome.violation}\n{replay}"


def test_a_seed_is_one_story() -> None:
    """Twice the same seed: the same events at the same times."""
    chosen = next(scenario(seed) for seed in range(100) if scenario(seed).faults and scenario(seed).synchronous)
    first, second = (play(chosen, tracing=True) for _ in range(2))
    assert first.log == second.log
    assert first.log


@pytest.mark.parametrize("name", ["dedup off", "fsync off", "reduction order not fixed"])
def test_mutations_are_seen(name: str) -> None:
    """What the simulator is for: with the safeguard gone, a seed soon fails."""
    mutation = next(m for m in MUTATIONS if m.name == name)
    seed, _ = caught(mutation)
    assert seed >= 0, f"{mutation.budget} seeds, and nothing was seen"
