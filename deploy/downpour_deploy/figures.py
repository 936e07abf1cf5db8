"""A job's measures as text for people: rows of a name and a value. Pure functions of the coordinator's documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORKERS_SHOWN = 16


def measure_rows(document: Mapping[str, Any], by_worker: bool = False) -> list[tuple[str, str]]:
    """What ``downpour run`` and ``downpour status`` say of how well a job trains; ``by_worker``: of each as well."""
    rows = []
    if document.get("noise_scale") is not None:
        rows.append(("noise scale", f"{document['noise_scale']:,.4g} samples"))
    elif document.get("unmeasured"):
        rows.append(("noise scale", f"not measured: {document['unmeasured']}"))
    if document.get("efficiency") is not None:
        together = f"batches of {document.get('batch', 0):,.4g} as one of {document.get('batch_total', 0):,.4g}"
        rows.append(("efficiency", f"{document['efficiency']:.1%} of a lone worker's per sample ({together})"))
        rows.append(("goodput", f"{document.get('goodput') or 0:,.0f} samples/s"))
    if stale := staleness_text(document.get("staleness")):
        rows.append(("staleness", f"{stale} updates"))
    if by_worker:
        rows += worker_rows(document)
    if target := target_text(document.get("target")):
        rows.append(("target", target))
    return rows


def staleness_text(stale: Any) -> str:
    """``mean 1.2, median 1, 99 % 3, largest 5``; "" without any."""
    if not isinstance(stale, Mapping) or not {"p50", "p99", "max"} <= set(stale):
        return ""
    mean = f"mean {stale['mean']:.2g}, " if "mean" in stale else ""
    return f"{mean}median {stale['p50']}, 99 % {stale['p99']}, largest {stale['max']}"


def worker_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Throughput, waiting and staleness of the first workers."""
    rows = []
    workers = document.get("by_worker") or {}
    for name, worker in list(workers.items())[:WORKERS_SHOWN]:
        rate = worker.get("throughput")
        parts = [] if rate is None else [f"{rate:,.0f} samples/s"]
        parts.append(f"{worker.get('wait_share') or 0:.0%} waiting")
        stale = staleness_text(worker.get("staleness"))
        parts += [f"staleness {stale}"] if stale else []
        rows.append((name, ", ".join(parts)))
    return rows


def target_text(target: Any) -> str:
    """``loss<=0.1 reached after 12.3 s, at clock 400, 12,800 samples``; "" where nothing was to be reached."""
    if not isinstance(target, Mapping):
        return ""
    wanted, reached, value = target.get("wanted"), target.get("reached"), target.get("value")
    if isinstance(reached, Mapping):
        at = f"at clock {reached.get('clock', 0):,}, {reached.get('samples', 0):,} samples"
        return f"{wanted} reached after {reached.get('seconds', 0):,.1f} s, {at}"
    return f"{wanted} not reached ({'no such value was logged' if value is None else f'last {value:.5g}'})"
