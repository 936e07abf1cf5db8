"""Advice as text and as JSON. Pure functions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from downpour_common.replicas import counted
from downpour_deploy.advise.advice import Advice
from downpour_deploy.advise.facts import Facts
from downpour_deploy.advise.rules import rough
from downpour_deploy.figures import measure_rows
from downpour_deploy.jobs.tables import clean, columns, count

WIDTH = 100


def text(facts: Facts, advice: Sequence[Advice], document: Mapping[str, Any]) -> list[str]:
    """``downpour advise``"""
    spec = facts.spec
    rows: list[tuple[str, str]] = [
        ("job", f"{clean(facts.job)}  {clean(facts.state)}".rstrip()),
        ("mode", f"{spec.mode}, {counted(spec.workers, spec.ranks)}, {count(spec.shards, 'shard')}"),
        ("throughput", f"{facts.throughput:,.0f} samples/s over {facts.train_s:.1f} s, {facts.wait_share:.0%} waiting"),
        *measure_rows(document),
    ]
    lines = [*columns(rows), ""]
    if caution := rough(facts):
        lines += [f"note: {caution}", ""]
    if not advice:
        return [*lines, "Nothing to change: no figure stands out."]
    for number, each in enumerate(advice, 1):
        lines += _wrapped(f"{number}. ", each.what)
        lines += _wrapped("   why: ", each.why)
        for at, change in enumerate(each.changes):
            lines.append(f"   {'try: ' if not at else 'or:  '}{change.options}")
        lines.append("")
    return lines[:-1]


def as_document(facts: Facts, advice: Sequence[Advice]) -> dict[str, Any]:
    """``downpour advise --json``"""
    return {
        "job": facts.job,
        "state": facts.state,
        "mode": facts.spec.mode,
        "workers": facts.spec.workers,
        "shards": facts.spec.shards,
        "steps": facts.steps,
        "samples": facts.samples,
        "train_s": facts.train_s,
        "throughput": facts.throughput,
        "wait_share": facts.wait_share,
        "noise_scale": facts.noise_scale,
        "efficiency": facts.efficiency,
        "goodput": facts.goodput,
        "staleness": dict(facts.staleness or {}),
        "note": rough(facts),
        "advice": [each.document() for each in advice],
    }


def _wrapped(first: str, words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
