"""Rules about bytes that travel, and the shards that take them."""

from __future__ import annotations

from downpour_common.compression import parse_compression
from downpour_common.sizes import format_bytes
from downpour_deploy.advise.advice import Advice, Change, setting, to
from downpour_deploy.advise.facts import Facts
from downpour_deploy.advise.rules_waiting import WAITS

MUCH_PER_S = 50e6
"""Bytes per second of all workers from which on a network is worth sparing."""
BUSY = 0.8
"""Share of its time that a shard computes from which on it may hold others up."""
UNEVEN = 1.5
"""Times as busy as the others' median."""


def much_traffic(facts: Facts) -> Advice | None:
    """Workers wait, and much is sent."""
    if not facts.sent or facts.wait_share < WAITS or facts.bytes_per_s < MUCH_PER_S or facts.mode.name == "lbfgs":
        return None
    compress = parse_compression(facts.spec.compress)
    changes: list[Change] = []
    if not compress:
        changes += [to(compress="push=bf16,pull=bf16"), to(compress="push=topk:0.01,pull=bf16")]
    elif compress.push is None:
        changes.append(to(compress=f"push=bf16,{compress}"))
    if facts.mode.local:
        changes.append(to(mode=f"{facts.mode.name}:{2 * facts.mode.every}"))
    else:
        changes.append(to(mode="diloco:50"))
    if facts.mode.name == "async" and facts.spec.settings.n_push == 1:
        changes.append(setting(n_push=5, n_fetch=5))
    return Advice(
        "much-traffic",
        "Send less: compress what travels, or exchange more rarely.",
        f"Workers wait {facts.wait_share:.0%} of their time while {format_bytes(int(facts.bytes_per_s))}/s move, "
        f"{format_bytes(facts.bytes_moved // max(1, facts.pushes))} with each push.",
        {"wait_share": facts.wait_share, "bytes_per_s": round(facts.bytes_per_s), "pushes": facts.pushes},
        facts.wait_share,
        tuple(changes),
    )


def saturated(facts: Facts) -> Advice | None:
    """The shards compute most of the time, and workers wait for them."""
    known = [server.busy for server in facts.servers if server.busy is not None]
    if not known or min(known) < BUSY or facts.wait_share < WAITS / 2:
        return None
    shards = facts.spec.shards
    return Advice(
        "saturated",
        "Give the servers more shards, on cores of their own.",
        f"{'Each' if shards > 1 else 'The'} shard computes {min(known):.0%} of its time or more, and workers wait "
        f"{facts.wait_share:.0%} of theirs.",
        {"busy": min(known), "wait_share": facts.wait_share, "shards": shards},
        facts.wait_share,
        (to(shards=2 * shards),),
    )


def uneven_shards(facts: Facts) -> Advice | None:
    """One shard has far more to do than the others."""
    known = [(server.busy, server.name) for server in facts.servers if server.busy is not None]
    if len(known) < 2:
        return None
    most, name = max(known)
    others = sorted(busy for busy, other in known if other != name)
    rest = others[len(others) // 2]
    if most < BUSY / 2 or most < UNEVEN * rest or facts.wait_share < WAITS / 2:
        return None
    return Advice(
        "uneven-shards",
        f"Spread the load of {name}: fewer shards, if one tensor is most of the model and its rule keeps it whole; or "
        "see what else runs on its host.",
        f"{name} computes {most:.0%} of its time, the others {rest:.0%}.",
        {"server": name, "busy": most, "others_busy": rest},
        facts.wait_share / 2,
        (to(shards=facts.spec.shards - 1),),
    )
