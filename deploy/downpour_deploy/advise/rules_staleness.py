"""Rules about contributions that come late."""

from __future__ import annotations

import math
import statistics

from downpour_deploy.advise.advice import Advice, setting, to
from downpour_deploy.advise.facts import Facts

HIGH = 4.0
"""Mean staleness in updates from which on it may do harm."""
LATE = 0.1
"""Share of contributions that come after their round from which on they are a waste."""
RISEN, UNSTEADY = 1.3, 0.5
"""A loss that ends at so many times its best; and whose spread is this part of its level."""


def unsteady(losses: tuple[float, ...]) -> str:
    """What is wrong with the way a loss goes, in words, or "". Looks at medians of eighths."""
    if any(not math.isfinite(value) for value in losses):
        return "is not finite"
    if len(losses) < 16:
        return ""
    part = len(losses) // 8
    levels = [statistics.median(losses[at * part : (at + 1) * part]) for at in range(8)]
    best = min(levels)
    if best > 0 and levels[-1] > RISEN * best and levels[-1] - best > 0.05 * abs(levels[0]):
        return f"has risen from {best:.3g} to {levels[-1]:.3g}"
    last = losses[-2 * part :]
    level = statistics.fmean(last)
    if level > 0.1 * abs(levels[0]) and statistics.pstdev(last) > UNSTEADY * level:
        return f"spreads by {statistics.pstdev(last) / level:.0%} of its level"
    return ""


def stale_and_unsteady(facts: Facts) -> Advice | None:
    """async, ssp: contributions are late, and the loss does not like it."""
    trouble = unsteady(facts.losses)
    if facts.mode.name not in ("async", "ssp") or facts.mean_staleness < HIGH or not trouble:
        return None
    changes = [setting(compensation="stale-lr")] if facts.spec.settings.compensation == "off" else []
    changes += [setting(compensation="dc-adaptive:2")] if changes else []
    changes += [to(mode="ssp:3")] if facts.mode.name == "async" else [to(mode="sync")]
    if facts.spec.replicas > 1:
        changes.append(to(workers=max(1, facts.spec.replicas // 2) * facts.spec.ranks))
    return Advice(
        "stale-and-unsteady",
        "Compensate for staleness or bound it, or use fewer workers.",
        f"Contributions are {facts.mean_staleness:.1f} updates late on average, and the loss {trouble}.",
        {"staleness_mean": facts.mean_staleness, "losses": len(facts.losses)},
        0.9,
        tuple(changes),
    )


def own_delays(facts: Facts) -> Advice | None:
    """async: contributions are late because workers keep their weights for several steps."""
    settings = facts.spec.settings
    if facts.mode.name != "async" or settings.n_fetch == 1 or facts.mean_staleness < HIGH:
        return None
    if not unsteady(facts.losses):
        return None
    return Advice(
        "own-delays",
        f"Fetch weights more often than every {settings.n_fetch} steps.",
        f"Contributions are {facts.mean_staleness:.1f} updates late on average.",
        {"staleness_mean": facts.mean_staleness, "n_fetch": settings.n_fetch},
        0.5,
        (setting(n_fetch=max(1, settings.n_fetch // 2)),),
    )


def late_rounds(facts: Facts) -> Advice | None:
    """sync,backup=b: too much work is thrown away."""
    backup = facts.mode.backup
    if not backup or not facts.pushes or facts.late < LATE * facts.pushes:
        return None
    share = facts.late / facts.pushes
    even = backup / facts.spec.replicas
    return Advice(
        "late-rounds",
        "Do without backup workers, or use what they compute: it is thrown away.",
        f"{facts.late:,} of {facts.pushes:,} contributions came after their round ({share:.0%}; workers of one pace "
        f"would lose {even:.0%}).",
        {"late": facts.late, "pushes": facts.pushes, "backup": backup},
        share,
        (to(mode="ssp:3"), to(mode="sync")),
    )
