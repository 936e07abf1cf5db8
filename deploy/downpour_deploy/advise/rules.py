"""All rules, and what they say together."""

from __future__ import annotations

from collections.abc import Callable

from downpour_deploy.advise import rules_health, rules_noise, rules_staleness, rules_traffic, rules_waiting
from downpour_deploy.advise.advice import Advice
from downpour_deploy.advise.facts import Facts

Rule = Callable[[Facts], Advice | None]

RULES: tuple[Rule, ...] = (
    rules_health.not_finite,
    rules_health.diverges,
    rules_health.pushes_lost,
    rules_staleness.stale_and_unsteady,
    rules_staleness.own_delays,
    rules_staleness.late_rounds,
    rules_waiting.straggler,
    rules_waiting.rounds_wait,
    rules_waiting.bound_too_tight,
    rules_waiting.short_steps,
    rules_waiting.local_steps,
    rules_waiting.loading,
    rules_traffic.much_traffic,
    rules_traffic.saturated,
    rules_traffic.uneven_shards,
    rules_noise.more_pays,
    rules_noise.less_is_enough,
    rules_noise.only_noise,
    rules_noise.not_counted,
)
LEAST_STEPS, LEAST_S = 50, 5.0


def advise(facts: Facts) -> list[Advice]:
    """What there is to say, the weightiest first. Nothing that the job could not take is recommended."""
    found = [advice.for_job(facts.spec) for rule in RULES if (advice := rule(facts)) is not None]
    return sorted((advice for advice in found if advice is not None), key=lambda advice: -advice.weight)


def rough(facts: Facts) -> str:
    """Why the figures are not to be trusted, or ""."""
    if not facts.steps:
        return "nothing has been trained yet"
    if facts.steps < LEAST_STEPS or facts.train_s < LEAST_S:
        return f"only {facts.steps} steps in {facts.train_s:.1f} s so far; later figures differ from those of the start"
    return ""
