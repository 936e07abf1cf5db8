"""Traces made by hand: lines of spans.jsonl, and timetables of pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Task = tuple[str, int]
"""``forward`` or ``backward``, and the micro-batch."""


def batch(worker: int = 0, spans: Iterable[list[Any]] = (), **fields: Any) -> dict[str, Any]:
    """A line as a traced worker would send it."""
    return {
        "version": 1,
        "job": "digits-3f2a9c",
        "worker": worker,
        "epoch": 0,
        "host": "h",
        "born_ns": 5,
        "number": 0,
        "clock": [1_000, 10],
        "place": {"replica": worker, "rank": 0, "ranks": 1},
        "dropped": 0,
        "sizes": {"weights": 4096, "peak_memory": 1 << 20},
        "moved": {"pushed": 2048, "pulled": 1024},
        "spans": list(spans),
        **fields,
    }


def lines(*batches: dict[str, Any]) -> list[str]:
    """A file of them."""
    return [json.dumps(each) for each in batches]


def gpipe(stage: int, stages: int, microbatches: int) -> list[Task]:
    """A stage's tasks: all forwards, then all backwards."""
    every = range(microbatches)
    return [("forward", i) for i in every] + [("backward", i) for i in every]


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Task]:
    """A stage's tasks: as many forwards as fill the pipeline, then one backward after each forward."""
    ahead = min(microbatches, stages - stage)
    tasks: list[Task] = [("forward", i) for i in range(ahead)]
    for i in range(microbatches):
        tasks.append(("backward", i))
        if ahead + i < microbatches:
            tasks.append(("forward", ahead + i))
    return tasks


def timetable(orders: list[list[Task]], took: dict[str, int], start: int, step: int) -> list[list[list[Any]]]:
    """Rows by stage: each task begins as soon as its stage is free and what it needs is there."""
    last = len(orders) - 1
    ends: dict[tuple[str, int, int], int] = {}
    rows: list[list[list[Any]]] = [[] for _ in orders]
    free = [start] * len(orders)
    while any(len(rows[s]) < len(orders[s]) for s in range(len(orders))):
        for stage, tasks in enumerate(orders):
            if len(rows[stage]) == len(tasks):
                continue
            name, i = tasks[len(rows[stage])]
            if name == "forward":
                needs = [] if stage == 0 else [(name, i, stage - 1)]
            else:
                needs = [("forward", i, stage), *([] if stage == last else [(name, i, stage + 1)])]
            if all(need in ends for need in needs):
                begin = max([free[stage], *(ends[need] for need in needs)])
                free[stage] = ends[name, i, stage] = begin + took[name]
                rows[stage].append([name, begin, took[name], 0, step, {"stage": stage, "microbatch": i}])
    return rows


def pipeline(schedule: str, stages: int, microbatches: int, steps: int, first: int = 1 << 40) -> list[str]:
    """The trace of one replica, of ``steps`` steps a millisecond apart."""
    order = gpipe if schedule == "gpipe" else one_f_one_b
    orders = [order(s, stages, microbatches) for s in range(stages)]
    rows: list[list[list[Any]]] = [[] for _ in range(stages)]
    start = first
    for step in range(steps):
        found = timetable(orders, {"forward": 1_000_000, "backward": 2_000_000}, start, step)
        for stage, new in enumerate(found):
            rows[stage] += new
        end = max(row[1] + row[2] for each in found for row in each)
        for each in rows:
            each.append(["push", end, 500_000, 0, step])
        start = end + 1_000_000
    place = {"replica": 0, "ranks": stages, "stages": stages, "microbatches": microbatches, "schedule": schedule}
    return lines(*(batch(s, rows[s], place={**place, "rank": s, "stage": s, "tensor_rank": 0}) for s in range(stages)))
