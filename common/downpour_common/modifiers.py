"""What modifies a mode (``compensation``, ``warm_start``, ``clip``, ``inject_staleness``), and which go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from downpour_common.compensation import parse_compensation

if TYPE_CHECKING:
    from downpour_common.config import JobSpec

WARM_START = "warm-start"
"""What the workers of a job agree on once worker 0 has taken its first steps alone."""


def problems_of(spec: JobSpec) -> list[str]:
    """What is wrong with a job's modifiers, in words."""
    settings, mode = spec.settings, spec.parsed_mode
    names = {mode.name, *(own.name for _, own in mode.groups)}
    each_step = (settings.n_push, settings.n_fetch) == (1, 1)
    problems = []
    compensation = parse_compensation(settings.compensation)
    if compensation.name != "off":
        if not names <= {"async", "ssp"}:
            problems.append(
                "settings.compensation: belongs to modes async and ssp, where contributions are late; mode "
                f"{spec.mode} has none to compensate"
            )
        elif compensation.needs_bases and not each_step:
            problems.append(
                f"settings.compensation: {compensation.name} compares weights with those that a gradient was computed "
                "on, which local steps change; leave n_push and n_fetch at 1, or use stale-lr"
            )
    if settings.warm_start and not names <= {"async", "ssp", "easgd"}:
        problems.append(
            "settings.warm_start: belongs to modes async, ssp and easgd; in mode "
            f"{spec.mode} workers wait for each other"
        )
    if settings.clip and settings.fetch == "layers":
        problems.append(
            "settings.clip: the norm is that of all gradients, and with fetch=layers the first have left before the "
            "last are there; leave one out"
        )
    if settings.clip and mode.name == "lbfgs":
        problems.append("settings.clip: a clipped gradient is none that lbfgs could search along; leave it out")
    if settings.inject_staleness:
        apart = {
            f"mode {spec.mode}, it belongs to async": names != {"async"},
            "n_push and n_fetch": not each_step,
            "fetch_ahead": settings.fetch_ahead,
            "fetch=layers": settings.fetch == "layers",
            "tensor and pipeline": spec.ranks > 1,
        }
        problems += [
            f"settings.inject_staleness: does not go with {what}; leave one out"
            for what, given in apart.items()
            if given
        ]
    return problems
