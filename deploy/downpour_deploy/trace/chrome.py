"""Spans → the trace event format of Chrome, which Perfetto reads: a process per worker, a track per thread."""

from __future__ import annotations

from typing import Any

from downpour_common.spans import BUSY, MOVING, WAITING
from downpour_deploy.trace.read import Process, Trace


def document(trace: Trace) -> dict[str, Any]:
    """The whole file, as plain values. Times in microseconds."""
    events: list[dict[str, Any]] = []
    for pid, process in enumerate(trace.processes, 1):
        events += _named(pid, process)
        for span in process.spans:
            events.append(
                {
                    "ph": "X",
                    "name": _title(span.name, span.facts),
                    "cat": kind_of(span.name),
                    "ts": span.begin_ns / 1000,
                    "dur": (span.end_ns - span.begin_ns) / 1000,
                    "pid": pid,
                    "tid": span.thread,
                    "args": {"step": span.step, **span.facts},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"job": trace.job}}


def kind_of(name: str) -> str:
    """``compute``, ``move``, ``wait`` or ``other``."""
    return "compute" if name in BUSY else "move" if name in MOVING else "wait" if name == WAITING else "other"


def _named(pid: int, process: Process) -> list[dict[str, Any]]:
    meta: list[tuple[str, int, dict[str, Any]]] = [
        ("process_name", 0, {"name": process.name}),
        ("process_sort_index", 0, {"sort_index": pid}),
    ]
    threads = sorted({span.thread for span in process.spans})
    meta += [("thread_name", t, {"name": "training" if t == 0 else f"thread {t}"}) for t in threads]
    return [{"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args} for name, tid, args in meta]


def _title(name: str, facts: Any) -> str:
    """``forward 3``: of micro-batch 3, as long as there are several."""
    return f"{name} {facts['microbatch']}" if "microbatch" in facts else name
