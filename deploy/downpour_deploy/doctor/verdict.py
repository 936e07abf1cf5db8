"""What a check comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from downpour_common import exitcodes


class Status(StrEnum):
    """How bad it is."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``detail``: what was found. ``action``: the one thing to do about it; "" exactly when nothing is to be done."""

    name: str
    status: Status
    detail: str
    action: str = ""
    code: int = exitcodes.OK
    """the exit code that it asks for"""

    def __post_init__(self) -> None:
        assert bool(self.action) == (self.status is not Status.PASS), self.name


def passed(name: str, detail: str) -> Verdict:
    """Nothing to do."""
    return Verdict(name, Status.PASS, detail)


def warned(name: str, detail: str, action: str) -> Verdict:
    """It may work, or work badly."""
    return Verdict(name, Status.WARN, detail, action)


def failed(name: str, detail: str, action: str, code: int = exitcodes.FAILED) -> Verdict:
    """It will not work."""
    return Verdict(name, Status.FAIL, detail, action, code)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 without FAIL; 69 when the coordinator cannot be reached, 77 when it refuses, else 1."""
    codes = {verdict.code for verdict in verdicts}
    for code in (exitcodes.UNREACHABLE, exitcodes.REFUSED, exitcodes.FAILED):
        if code in codes:
            return code
    return exitcodes.OK
