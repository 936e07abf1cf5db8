"""Rules about workers that wait: for each other, for one of them, for the exchange itself, for data."""

from __future__ import annotations

import statistics

from downpour_deploy.advise.advice import Advice, setting, to
from downpour_deploy.advise.facts import Facts

WAITS = 0.25
"""Share of time from which on waiting is worth a change."""
SLOW = 0.7
"""A worker with less than this part of the others' pace holds a round up."""
EFFICIENT = 0.5
"""Statistical efficiency below which faster workers would do little; see :mod:`downpour_deploy.advise.rules_noise`."""
SHORT_STEP_S = 0.005
"""A step whose exchange costs as much as its arithmetic."""
EASY = 0.02
"""Share of time that nobody notices."""


def straggler(facts: Facts) -> Advice | None:
    """One worker is slower than the others. In rounds it shows as the one that does not wait."""
    if len(facts.workers) < 2 or facts.spec.ranks > 1 or facts.mode.name not in ("sync", "ssp") or facts.mode.backup:
        return None
    by_waiting = sorted(facts.workers, key=lambda w: w.wait_share)
    slow, others = by_waiting[0], [w.wait_share for w in by_waiting[1:]]
    rest = statistics.median(others)
    pace = (1.0 - rest) / max(1.0 - slow.wait_share, 1e-9)
    if rest < WAITS or pace > SLOW:
        return None
    changes = [to(mode="sync,backup=1")] if len(facts.workers) > 2 and facts.mode.name == "sync" else []
    slack = max(4, 2 * facts.mode.staleness) if facts.mode.name == "ssp" else 4
    return Advice(
        "straggler",
        f"Do not wait for {slow.name}: it is slower than the others; or see what else runs on its host.",
        f"The others wait {rest:.0%} of their time, {slow.name} {slow.wait_share:.0%}, so a step takes it "
        f"{1 / pace:.1f} times as long.",
        {"worker": slow.name, "wait_share": slow.wait_share, "others_wait_share": rest},
        rest,
        (*changes, to(mode=f"ssp:{slack}"), to(mode="async")),
    )


def rounds_wait(facts: Facts) -> Advice | None:
    """All workers wait alike in rounds of every step, and statistical efficiency is left over."""
    if facts.mode.name != "sync" or facts.spec.replicas == 1 or facts.wait_share < WAITS or straggler(facts):
        return None
    if facts.efficiency is not None and facts.efficiency < EFFICIENT:
        return None
    spare = f", and a sample is worth {facts.efficiency:.0%} of a lone worker's" if facts.efficiency else ""
    figures: dict[str, float | int | str] = {"wait_share": facts.wait_share, "step_s": round(facts.step_s, 5)}
    if facts.efficiency is not None:
        figures["efficiency"] = facts.efficiency
    return Advice(
        "rounds-wait",
        "Exchange without waiting for all, or more rarely.",
        f"Workers wait {facts.wait_share:.0%} of their time for the round, {facts.step_s * 1000:.1f} ms a step{spare}.",
        figures,
        facts.wait_share,
        (to(mode="ssp:3"), to(mode="async"), to(mode="average:8")),
    )


def bound_too_tight(facts: Facts) -> Advice | None:
    """ssp: workers stand at their bound."""
    bound = facts.mode.staleness
    if facts.mode.name != "ssp" or facts.wait_share < WAITS or facts.clock_gap_max < bound or straggler(facts):
        return None
    return Advice(
        "bound-too-tight",
        f"Let workers be further ahead than {bound} clocks.",
        f"They wait {facts.wait_share:.0%} of their time, and have stood {facts.clock_gap_max} clocks ahead of the "
        f"slowest; the bound is {bound}.",
        {"wait_share": facts.wait_share, "clock_gap_max": facts.clock_gap_max, "bound": bound},
        facts.wait_share / 2,
        (to(mode=f"ssp:{max(2 * bound, bound + 2)}"), to(mode="async")),
    )


def short_steps(facts: Facts) -> Advice | None:
    """Asynchronous steps are so short that the exchange is most of them."""
    if facts.mode.name != "async" or facts.wait_share < WAITS or facts.step_s > SHORT_STEP_S or not facts.steps:
        return None
    return Advice(
        "short-steps",
        "Do more between two exchanges: larger batches, or several steps for each exchange.",
        f"A step takes {facts.step_s * 1000:.1f} ms, of which {facts.wait_share:.0%} is waiting for the servers.",
        {"step_s": round(facts.step_s, 6), "wait_share": facts.wait_share},
        facts.wait_share,
        (setting(n_push=5, n_fetch=5), to(mode="average:8")),
    )


def local_steps(facts: Facts) -> Advice | None:
    """average, easgd, diloco: the number of local steps does not fit what an exchange costs."""
    mode, every = facts.mode, facts.mode.every
    if not mode.local or not facts.steps:
        return None
    options = "".join(f",{name}={value:g}" for name, value in mode.options)
    figures: dict[str, float | int | str] = {"wait_share": facts.wait_share, "every": every}
    if facts.wait_share >= WAITS:
        return Advice(
            "local-steps",
            f"Exchange more rarely than every {every} steps.",
            f"Workers wait {facts.wait_share:.0%} of their time for the exchange.",
            figures,
            facts.wait_share / 2,
            (to(mode=f"{mode.name}:{2 * every}{options}"),),
        )
    if facts.wait_share < EASY and every >= 8:
        return Advice(
            "local-steps",
            f"Exchange more often than every {every} steps: it costs next to nothing, and keeps replicas together.",
            f"Workers wait {facts.wait_share:.1%} of their time for the exchange.",
            figures,
            EASY,
            (to(mode=f"{mode.name}:{every // 2}{options}"),),
        )
    return None


def loading(facts: Facts) -> Advice | None:
    """A trace shows that workers stand still between their spans, or wait for samples."""
    if not facts.shares:
        return None
    idle = max(0.0, 1.0 - sum(facts.shares.values()))
    if idle < WAITS:
        return None
    return Advice(
        "loading",
        "See what the script does between its steps: reading samples is the usual suspect (DataLoader's num_workers).",
        f"In the trace {idle:.0%} of the workers' time is neither computing nor exchanging.",
        {"idle_share": round(idle, 4)},
        idle,
    )
