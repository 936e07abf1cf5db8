"""Measures of a trace as text and as JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from downpour_common.sizes import format_bytes
from downpour_common.spans import BUSY, MOVING, WAITING
from downpour_deploy.jobs.tables import clean, columns, count
from downpour_deploy.trace.measure import Measured, Rank, Replica
from downpour_deploy.trace.read import Trace

KNOWN = (*BUSY, *MOVING, WAITING)


def text(measured: Measured) -> list[str]:
    """``downpour report``, below the swimlane."""
    lines = [_of_replica(each) for each in measured.replicas if each.ranks > 1]
    names = [n for n in KNOWN if any(n in rank.shares for rank in measured.ranks)]
    names += sorted({n for rank in measured.ranks for n in rank.shares} - set(names))
    rows: list[Sequence[object]] = [("SHARE OF TIME", "SECONDS", *map(str.upper, names), "NONE")]
    for rank in measured.ranks:
        none = max(0.0, 1 - sum(rank.shares.values()))
        rows.append(
            (
                rank.process.name,
                f"{rank.seconds:.1f}",
                *(f"{rank.shares[n]:.1%}" if n in rank.shares else "-" for n in names),
                f"{none:.1%}",
            )
        )
    lines += ["", *columns(rows), ""] if lines else [*columns(rows), ""]
    sizes = sorted({key for rank in measured.ranks for key in rank.process.sizes}, key=_size_order)
    head = ("BYTES", "PUSHED", "PULLED", "BETWEEN RANKS", *(key.replace("_", " ").upper() for key in sizes))
    rows = [head]
    for rank in measured.ranks:
        moved = rank.process.moved
        numbers = [moved.get("pushed"), moved.get("pulled"), rank.between_ranks]
        numbers += [rank.process.sizes.get(key) for key in sizes]
        rows.append((rank.process.name, *("-" if n is None else format_bytes(n) for n in numbers)))
    return [*lines, *columns(rows)]


def as_document(trace: Trace, measured: Measured) -> dict[str, Any]:
    """``downpour report --json``: times in seconds, shares and utilisation from 0 to 1, sizes in bytes."""
    return {
        "job": trace.job,
        "damaged_lines": trace.damaged,
        "replicas": [
            {
                "replica": each.replica,
                "ranks": each.ranks,
                "steps": each.steps,
                "utilisation": each.utilisation,
                "theory": each.theory,
                "stages": each.stages,
                "microbatches": each.microbatches,
                "schedule": each.schedule,
            }
            for each in measured.replicas
        ],
        "workers": [_worker(rank) for rank in measured.ranks],
    }


def remarks(trace: Trace) -> list[str]:
    """What a reader of the figures should know."""
    lines = [
        f"{each.name}: {count(each.dropped, 'span')} dropped, since they came faster than they could be sent"
        for each in trace.processes
        if each.dropped
    ]
    lines += [f"{each.name}: {count(each.missing, 'line')} missing" for each in trace.processes if each.missing]
    if trace.damaged:
        lines.append(f"{count(trace.damaged, 'damaged line')} skipped")
    if trace.unaligned:
        lines.append(f"the clocks of {count(trace.unaligned, 'host')} are unknown; times there are only their own")
    return [clean(line) for line in lines]


def _of_replica(each: Replica) -> str:
    busy = f"{each.utilisation:.1%} busy over {count(each.steps, 'step')}"
    if each.theory is None:
        return f"replica {each.replica}: {count(each.ranks, 'rank')} {busy} in forward and backward"
    shape = f"{clean(each.schedule)}, {count(each.stages, 'stage')}, {count(each.microbatches, 'micro-batch')}"
    shape = shape.replace("batchs", "batches")
    return f"replica {each.replica}: pipeline {busy} ({shape}: at best {each.theory:.1%} with stages of equal cost)"


def _worker(rank: Rank) -> dict[str, Any]:
    process = rank.process
    return {
        "worker": process.worker,
        "epoch": process.epoch,
        "replica": process.replica,
        "stage": process.stage,
        "rank": process.rank,
        "seconds": rank.seconds,
        "spans": len(process.spans),
        "dropped": process.dropped,
        "missing_lines": process.missing,
        "shares": rank.shares,
        "sizes": process.sizes,
        "moved": {**process.moved, "between_ranks": rank.between_ranks},
    }


def _size_order(key: str) -> tuple[int, str]:
    order = ("weights", "gradients", "weights_and_gradients", "activations", "peak_memory", "peak_cuda")
    return (order.index(key) if key in order else len(order), key)
