"""Rules about what goes wrong: NaN, losses that rise, what died, targets."""

from __future__ import annotations

from downpour_deploy.advise.advice import Advice, setting, to
from downpour_deploy.advise.facts import Facts
from downpour_deploy.advise.rules_staleness import HIGH, unsteady


def not_finite(facts: Facts) -> Advice | None:
    """Contributions with NaN or Inf were left out, or ended the job."""
    if not facts.non_finite:
        return None
    clip = facts.spec.settings.clip
    return Advice(
        "not-finite",
        "Clip gradients and lower the learning rate" + (f" (they are clipped at {clip:g})." if clip else "."),
        f"{facts.non_finite:,} contributions held NaN or Inf and were left out.",
        {"non_finite": facts.non_finite, "clip": clip},
        1.0,
        (setting(clip=clip / 2 if clip else 1.0),),
    )


def diverges(facts: Facts) -> Advice | None:
    """The loss rises, and staleness is not to blame."""
    trouble = unsteady(facts.losses)
    if not trouble or facts.non_finite or facts.mean_staleness >= HIGH:
        return None
    clip = facts.spec.settings.clip
    return Advice(
        "diverges",
        "Lower the learning rate, or clip gradients.",
        f"The loss {trouble}; contributions are not late ({facts.mean_staleness:.1f} updates on average).",
        {"staleness_mean": facts.mean_staleness, "losses": len(facts.losses), "clip": clip},
        0.8,
        (setting(clip=clip / 2 if clip else 1.0),),
    )


def pushes_lost(facts: Facts) -> Advice | None:
    """Shards have died, and took work along."""
    if not facts.lost_pushes:
        return None
    return Advice(
        "pushes-lost",
        "Give each shard a backup, or write checkpoints more often.",
        f"{facts.lost_pushes:,} pushes were lost with shards that died.",
        {"lost_pushes": facts.lost_pushes, "pushes": facts.pushes},
        min(0.5, facts.lost_pushes / max(1, facts.pushes)),
        (to(replication=2), setting(checkpoint_s=10)),
    )
