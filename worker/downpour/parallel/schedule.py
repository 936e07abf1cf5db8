"""In which order each rank of a pipeline computes.

GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019) and interleaved 1F1B (Narayanan et al. 2021). The order of the
last is the one that ``torch.distributed.pipelining`` computes; its lists for the first two are left aside, since that
for 1F1B numbers the last stage's micro-batches from one. The orders are carried out by
:class:`downpour.parallel.pipeline.Pipeline` and not by torch's runtimes, which want one rank per stage and equal
micro-batches, and of which the one for interleaved schedules refuses skip connections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from downpour_common.replicas import Schedule


class Action(NamedTuple):
    """One micro-batch's forward or backward in one stage."""

    stage: int
    kind: Literal["forward", "backward"]
    microbatch: int


def fitting(schedule: Schedule, positions: int, microbatches: int) -> int:
    """The most micro-batches, up to ``microbatches``, that the schedule can take."""
    if schedule != "interleaved":
        return microbatches
    return next(m for m in range(microbatches, 0, -1) if m % max(1, m // positions) == 0)


def orders(schedule: Schedule, positions: int, stages: int, microbatches: int) -> list[list[Action]]:
    """What each of ``positions`` ranks does, in order; stage ``s`` is at position ``s % positions``.

    Of several stages at a position only ``interleaved`` makes use. ``microbatches`` must be :func:`fitting`.
    """
    if schedule == "interleaved":
        return _interleaved(positions, stages, microbatches)
    if schedule == "gpipe":
        return [
            [
                *(a for s in range(p, stages, positions) for a in _all(s, "forward", microbatches)),
                *(a for s in reversed(range(p, stages, positions)) for a in _all(s, "backward", microbatches)),
            ]
            for p in range(positions)
        ]
    return [_one_by_one(stage, stages, microbatches) for stage in range(stages)]


def forwards(positions: int, stages: int, microbatches: int) -> list[list[Action]]:
    """What each rank does where nothing is to be trained."""
    rounds = [range(first, min(first + positions, microbatches)) for first in range(0, microbatches, positions)]
    return [
        [Action(s, "forward", m) for these in rounds for s in range(position, stages, positions) for m in these]
        for position in range(positions)
    ]


def _all(stage: int, kind: Literal["forward", "backward"], microbatches: int) -> list[Action]:
    return [Action(stage, kind, m) for m in range(microbatches)]


def _one_by_one(stage: int, stages: int, microbatches: int) -> list[Action]:
    """As many micro-batches on their way as there are stages left, then each backward makes room for a forward."""
    ahead = min(microbatches, stages - stage)
    found = [Action(stage, "forward", m) for m in range(ahead)]
    for m in range(microbatches):
        found.append(Action(stage, "backward", m))
        if m + ahead < microbatches:
            found.append(Action(stage, "forward", m + ahead))
    return found


@dataclass(slots=True)
class _Seat:
    """What torch's schedule asks a stage for in order to make its lists."""

    stage_index: int
    num_stages: int
    group_size: int
    group_rank: int = 0
    is_last: bool = False
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)


def _interleaved(positions: int, stages: int, microbatches: int) -> list[list[Action]]:
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    seats: list[Any] = [_Seat(s, stages, positions) for s in range(0, stages, positions)]
    found = ScheduleInterleaved1F1B(seats, microbatches).pipeline_order
    kinds: dict[str, Literal["forward", "backward"]] = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}
    return [
        [
            Action(step.stage_index, kinds[step.computation_type.name], step.microbatch_index or 0)
            for step in found[position]
            if step is not None and step.computation_type.name in kinds
        ]
        for position in range(positions)
    ]
