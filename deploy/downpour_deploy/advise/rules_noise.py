"""Rules about the gradients' noise scale: how many samples an update may stand for.

They hold for the moment that they are made at: the noise scale grows while a loss falls (McCandlish et al. 2018).
"""

from __future__ import annotations

from downpour_deploy.advise.advice import Advice, to
from downpour_deploy.advise.facts import Facts

FAR_ABOVE = 4.0
"""Noise scale over samples of an update from which on more samples pay."""
KEEP = 0.7
"""Statistical efficiency that is worth keeping."""
WASTED = 0.5
"""… and one below which workers are wasted."""


def samples_for(efficiency: float, noise_scale: float, batch: float) -> float:
    """M that gives this efficiency: (B + m₀)/E − B."""
    return (noise_scale + batch) / efficiency - noise_scale


def more_pays(facts: Facts) -> Advice | None:
    """The noise scale is far above what an update stands for."""
    noise, total, batch = facts.noise_scale, facts.batch_total, facts.batch
    if noise is None or not total or not batch or noise < FAR_ABOVE * total:
        return None
    ranks, replicas = facts.spec.ranks, facts.spec.replicas
    most = samples_for(KEEP, noise, batch)
    fitting = max(replicas + 1, min(4 * replicas, int(most / batch)))
    return Advice(
        "more-pays",
        "More workers or larger batches pay: samples are worth nearly as much in larger updates.",
        f"The noise scale is {noise:,.0f} samples, an update stands for {total:,.0f}; up to {most:,.0f} it keeps "
        f"{KEEP:.0%} of its efficiency.",
        {"noise_scale": noise, "batch_total": total, "batch_total_most": round(most, 1)},
        0.2,
        (to(workers=fitting * ranks),),
    )


def less_is_enough(facts: Facts) -> Advice | None:
    """Updates stand for far more samples than the noise scale."""
    noise, total, batch, share = facts.noise_scale, facts.batch_total, facts.batch, facts.efficiency
    if noise is None or share is None or not batch or share >= WASTED:
        return None
    ranks, replicas = facts.spec.ranks, facts.spec.replicas
    fewer = max(1, min(replicas - 1, int(samples_for(KEEP, noise, batch) / batch)))
    return Advice(
        "less-is-enough",
        "Use fewer workers or smaller batches: updates hold more samples than gradients need. Local modes would not "
        "help, they only move the same samples together later.",
        f"The noise scale is {noise:,.0f} samples, an update stands for {total:,.0f}, so a sample is worth {share:.0%} "
        f"of a lone worker's with its batches of {batch:,.0f}.",
        {"noise_scale": noise, "batch_total": total, "efficiency": share},
        1.0 - share,
        (to(workers=fewer * ranks),) if replicas > 1 else (),
    )


def only_noise(facts: Facts) -> Advice | None:
    """No gradient shows in what is measured."""
    if not facts.unmeasured.startswith("too large") or facts.steps < 200:
        return None
    return Advice(
        "only-noise",
        "Use larger batches or a lower learning rate: single updates show nothing but noise.",
        "The noise scale is larger than can be seen; either the loss has come to rest, or batches are far too small.",
        {"batch_total": facts.batch_total},
        0.1,
    )


def not_counted(facts: Facts) -> Advice | None:
    """Nobody knows how many samples a step takes."""
    if not facts.unmeasured.startswith("samples are not counted"):
        return None
    return Advice(
        "not-counted",
        "Have samples counted: prepare the loader as well (downpour.prepare(model, optimizer, loader)), or call "
        "downpour.add_samples.",
        "Without them there is no throughput, no noise scale and no efficiency.",
        {"steps": facts.steps},
        0.05,
    )
