"""Whether a job pays: throughput, staleness, the gradients' noise scale, statistical efficiency, goodput.

::

    B   noise scale, tr(Σ)/|G|²                    McCandlish et al. 2018; see downpour_server.noise
    m₀  samples of one worker's step
    M   samples that an update stands for          sync: those of its round; async, ssp: m₀ (1 + mean staleness)
    E   statistical efficiency, (B + m₀)/(B + M)   Pollux, Qiao et al. 2021
    goodput = throughput × E                       samples/s of a lone worker's batch that would train as well

For the asynchronous modes M is an approximation: a contribution that is s updates late is taken as one of a batch of
s + 1 that had been computed together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from downpour_common import messages as m
from downpour_common.config import JobSpec
from downpour_common.measures import unmeasured
from downpour_common.modes import Mode
from downpour_common.replicas import is_lead
from downpour_coordinator.training import Training

LEAST_LOOKS = 10
"""Updates of each chunk that an estimate of the noise scale is made from, at least."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Of a whole job, or of a part of its time. ``None``: not known, or not measured."""

    throughput: float
    """samples per second of all workers"""
    batch: float
    """m₀"""
    batch_total: float
    """M"""
    noise_scale: float | None
    """B, in samples"""
    unmeasured: str
    """why there is no noise scale, or "" """
    staleness: dict[str, float]
    """mean, p50, p99, max, of contributions to chunks; empty without any"""
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by name: throughput, wait_share, staleness"""
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by name: ``busy`` (share of its time; None: unknown), bytes, refused"""

    @property
    def efficiency(self) -> float | None:
        """E: progress of a sample here, as a part of that of a sample in a lone worker's batch."""
        if self.noise_scale is None or not self.batch:
            return None
        return efficiency(self.noise_scale, self.batch, self.batch_total)

    @property
    def goodput(self) -> float | None:
        """Throughput × efficiency."""
        share = self.efficiency
        return None if share is None else self.throughput * share

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "throughput": round(self.throughput, 3),
            "batch": round(self.batch, 2),
            "batch_total": round(self.batch_total, 2),
            "noise_scale": _rounded(self.noise_scale),
            "unmeasured": self.unmeasured,
            "efficiency": _rounded(self.efficiency),
            "goodput": _rounded(self.goodput),
            "staleness": self.staleness,
            "by_worker": self.workers,
            "by_server": self.servers,
        }


def efficiency(noise_scale: float, lone: float, total: float) -> float:
    """(B + m₀)/(B + M), at most 1: a worker whose batch is smaller than the mean is no better than it."""
    return min(1.0, (noise_scale + lone) / (noise_scale + total))


def samples_together(mode: Mode, batch: float, replicas: int, mean_staleness: float) -> float:
    """M. ``replicas``: that contribute now."""
    if mode.in_rounds:
        return batch * max(1, replicas - mode.backup)
    return batch * (1.0 + mean_staleness)


def noise_of(training: Training) -> tuple[float | None, str]:
    """The noise scale, or None and why there is none."""
    reports = [s.report["noise"] for s in training.shards.values() if s.report.get("noise")]
    looked = [noise for noise in reports if noise[2]]
    if not looked or min(noise[2] for noise in looked) < LEAST_LOOKS:
        return None, "too few updates yet"
    trace, square = sum(noise[0] for noise in looked), sum(noise[1] for noise in looked)
    if square <= 0.0:
        return None, "too large for what a batch shows: nothing but noise is seen"
    return max(0.0, trace) / square, ""


def measure(
    training: Training, spec: JobSpec, train_s: float, since: dict[int, int] | None = None, since_s: float | None = None
) -> Measures:
    """What there is to tell. ``train_s``: since the first step; ``since``: samples by slot at the time ``since_s`` of
    it, from which on throughputs are told instead."""
    ranks, mode = training.facts.ranks, training.facts.mode
    progress = samples_by_slot(training)
    before = since or {}
    span_s = train_s - (since_s or 0.0)
    rates = {slot: max(0, n - before.get(slot, 0)) / span_s if span_s > 0 else 0.0 for slot, n in progress.items()}
    counts = training.staleness()
    mean = sum(k * n for k, n in counts.items()) / counts.total() if counts else 0.0
    batch = _batch(training)
    live = [slot for slot in training.live() if is_lead(slot, ranks)]
    replicas = len(live) or len({slot // ranks for slot in progress})
    noise, why = (None, reason) if (reason := unmeasured(spec)) else noise_of(training)
    if not why and not batch:
        noise, why = None, "samples are not counted; prepare the loader, or call downpour.add_samples"
    return Measures(
        sum(rates.values()),
        batch,
        samples_together(mode, batch, replicas, mean),
        noise,
        why,
        {"mean": round(mean, 3), **quantiles(counts)} if counts else {},
        _workers(training, rates, train_s),
        _servers(training),
    )


def samples_by_slot(training: Training) -> dict[int, int]:
    """Samples of each slot's workers, so far, of those that count them."""
    found: dict[int, int] = {}
    for progress in _told(training):
        if is_lead(progress.slot, training.facts.ranks):
            found[progress.slot] = found.get(progress.slot, 0) + progress.samples
    return found


def _told(training: Training) -> list[m.Progress]:
    return [*training.former, *(w.progress for w in training.workers.values() if w.progress is not None)]


def _batch(training: Training) -> float:
    """Samples of a step, on average over the workers that are or were there last."""
    samples = steps = 0
    for worker in training.workers.values():
        if worker.progress is not None and is_lead(worker.slot, training.facts.ranks) and worker.start:
            samples += worker.progress.samples
            steps += max(0, worker.progress.clock - worker.start[0])
    return samples / steps if steps else 0.0


def _workers(training: Training, rates: dict[int, float], train_s: float) -> dict[str, dict[str, Any]]:
    waited: dict[int, float] = {}
    for progress in _told(training):
        waited[progress.slot] = waited.get(progress.slot, 0.0) + progress.wait_s
    stale = training.staleness_by_slot()
    return {
        f"worker/{slot}": {
            "throughput": round(rates[slot], 3) if slot in rates else None,
            "wait_share": round(min(1.0, wait_s / train_s), 4) if train_s > 0 else 0.0,
            "staleness": of_bins(stale[slot]) if slot in stale else {},
        }
        for slot, wait_s in sorted(waited.items())
    }


def _servers(training: Training) -> dict[str, dict[str, Any]]:
    found = {}
    for index, shard in training.shards.items():
        report = shard.report
        up_s = report.get("up_s", 0.0)
        found[f"server/{index}"] = {
            "busy": round(report["cpu_s"] / up_s, 3) if up_s and "cpu_s" in report else None,
            "bytes": report.get("bytes_in", 0) + report.get("bytes_out", 0),
            "refused": report.get("refused", 0),
        }
    return found


def quantiles(counts: dict[int, int]) -> dict[str, int]:
    """Median, 99th percentile and largest value of a histogram; empty for an empty one."""
    total = sum(counts.values())
    if not total:
        return {}
    values = sorted((value, count) for value, count in counts.items() if count)

    def at(share: float) -> int:
        seen = 0
        for value, count in values:
            seen += count
            if seen >= share * total:
                return value
        return values[-1][0]

    return {"p50": at(0.5), "p99": at(0.99), "max": values[-1][0]}


def of_bins(row: list[int]) -> dict[str, float]:
    """What a worker's row in a shard's report says: mean and max exactly; p50 and p99 as their bin's upper end."""
    total, largest, *bins = row
    counts = {min(largest, at if at < 2 else 1 << (at - 1)): 0 for at in range(len(bins))}
    for at, count in enumerate(bins):
        counts[min(largest, at if at < 2 else 1 << (at - 1))] += count
    return {"mean": round(total / max(1, sum(bins)), 3), **quantiles(counts), "max": largest}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
