"""Why a process has ended, from what the operating system says of it."""

from __future__ import annotations

import pytest

from downpour_coordinator.processes import Process, explain


@pytest.mark.parametrize(
    ("code", "shown", "message", "reason"),
    [
        (3, 3, "exit code 3", "SCRIPT_FAILED"),
        (-9, 137, "killed by signal 9 (SIGKILL)", "PROCESS_KILLED"),
        (-40, 168, "killed by signal 40 (a real-time signal)", "PROCESS_KILLED"),
        (None, 1, "was lost", "NODE_LOST"),
    ],
)
def test_codes_and_signals_have_words_and_an_exit_code(code: int | None, shown: int, message: str, reason: str) -> None:
    process = Process("worker", 1, state="ended", node="w1", code=code, tail=("first", "last"))
    failure = explain(process, True, None, "train.py")
    assert (failure.exit_code, failure.message, failure.reason) == (shown, message, reason)
    assert (failure.role, failure.index, failure.host) == ("worker", 1, "w1")
    assert failure.details == ("" if code is None else "first\nlast")
