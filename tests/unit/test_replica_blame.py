"""Which rank of a replica is to blame when one ends, or stands still, and the others raise because of that."""

from __future__ import annotations

import pytest
from coordinator_kit import World

from downpour_common import messages as m
from downpour_coordinator.phases import Phase
from downpour_coordinator.processes import Failure
from downpour_coordinator.recovery import STUCK_S

GONE, LATE = "MateLost: it has ended", "MateLost: it is late"


def world(ranks: int = 2, **fields: int) -> World:
    """Replicas whose failures may be answered by starting them again."""
    there = World(2 * ranks, 1, "async", tensor=ranks, **{"restarts": 3, **fields}).start()
    there.tick(0.0)
    return there


def loses(there: World, slot: int, consequence: str) -> None:
    """A rank says that it has lost another."""
    error, trace = (GONE, "") if consequence == "gone" else (LATE, "Traceback of the wait")
    there.hear(("worker", slot), m.ReportFailure(*there.me(slot), error, trace, consequence))
    there.settle()


def blamed(there: World) -> Failure:
    failure = there.life.failure or there.life.last_failure
    assert failure is not None
    return failure


@pytest.mark.parametrize("consequence", ["gone", "late"])
def test_one_that_raises_is_to_blame_though_its_mate_has_said_more(consequence: str) -> None:
    there = world()
    loses(there, 2, consequence)
    there.fails(3)
    assert (blamed(there).index, blamed(there).message) == (3, "ValueError: no")


@pytest.mark.parametrize(("code", "message"), [(4, "exit code 4"), (-11, "killed by signal 11 (SIGSEGV)")])
def test_one_that_ends_without_a_word_is_to_blame_whoever_is_seen_to_end_first(code: int, message: str) -> None:
    there = world()
    loses(there, 2, "gone")
    there.end(("worker", 3), code)
    assert (blamed(there).index, blamed(there).message) == (3, message)
    there = world(ranks=3)
    there.process("worker", 4).state, there.process("worker", 4).code = "ended", code
    loses(there, 5, "gone")
    there.end(("worker", 5), 1)
    assert (blamed(there).index, blamed(there).message) == (4, message)


def test_one_that_says_nothing_any_more_is_to_blame() -> None:
    there = world(ranks=3)
    for _ in range(int(STUCK_S) + 2):
        there.wait(1.0, 1.0)
        for slot in (0, 1, 2, 3, 5):
            there.progress(slot, 1)
    loses(there, 3, "late")
    there.end(("worker", 3), 1)
    assert blamed(there).who == "worker/4 (replica 1, rank 1)"
    assert "has not been heard of for" in blamed(there).message
    assert blamed(there).message.endswith("worker/3 (replica 1, rank 0) waited for it in vain")
    assert blamed(there).details == "Traceback of the wait"


def test_where_nobody_else_is_to_blame_the_one_that_waited_is_shown() -> None:
    """The scripts of two ranks have taken different ways."""
    there = world(restarts=0)
    loses(there, 3, "gone")
    loses(there, 2, "late")
    there.end(("worker", 3), 1)
    there.wait_for(Phase.OVER)
    assert (blamed(there).index, blamed(there).message) == (2, LATE)
    assert blamed(there).details == "Traceback of the wait"


def test_one_whose_mate_ended_its_script_too_early() -> None:
    there = world()
    there.leave(2)
    loses(there, 3, "gone")
    there.end(("worker", 3), 1)
    assert (blamed(there).index, blamed(there).message) == (3, GONE)
