"""Is there a seed that fails when a safeguard is taken away? Each mutation is patched in while worlds run.

python tests/chaos/mutations.py [NAME ...] [--jobs 2]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from simulator.patches import Patches
from simulator.scenario import Scenario, scenario
from simulator.world import calm_outcome, play

import downpour_server.service  # noqa: F401
from downpour_common.messages import Refusal
from downpour_coordinator import manifest, sources
from downpour_coordinator.training import Training
from downpour_server import recover, store
from downpour_server.dedup import DedupWindow, Seen
from downpour_server.members import Members
from downpour_server.passes import Passes
from downpour_server.policy.stale import StaleGate
from downpour_server.policy.synchronous import SyncGate
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk

Apply = Callable[[Patches], None]


@dataclass(frozen=True)
class Mutation:
    """``apply`` takes the safeguard away; it should be seen in one of ``budget`` worlds, of ``mode`` if that is given,
    in which a fault of one of ``kinds`` (any, if empty) happens to one of ``roles``."""

    name: str
    apply: Apply
    budget: int = 300
    mode: str | None = None
    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    def concerns(self, chosen: Scenario) -> bool:
        """Whether this world could show it."""
        if not self.kinds:
            return True
        roles = self.roles or ("",)
        return any(f.kind in self.kinds and f.target.startswith(roles) for f in chosen.faults)


def _dedup_off(p: Patches) -> None:
    p.set(DedupWindow, "look", lambda self, seq: Seen.NEW)


def _worker_epochs_off(p: Patches) -> None:
    """A shard takes what a process says that was replaced."""
    objection = Members.objection

    def lenient(self: Members, slot: int, epoch: int) -> Any:
        found = objection(self, slot, epoch)
        return None if found is not None and found[0] is Refusal.STALE_EPOCH else found

    p.set(Members, "objection", lenient)


def _old_shards_heard(p: Patches) -> None:
    """The coordinator believes a shard's process that it has given up."""
    take = Training._from_shard

    def trusting(self: Training, peer: bytes, message: Any, effects: Any) -> None:
        shard = self.shards.get(message.shard)
        if shard is not None and hasattr(message, "shard_epoch"):
            message = type(message)(
                *[
                    shard.epoch if f == "shard_epoch" else getattr(message, f)
                    for f in message.__dataclass_fields__
                    if f != "TAG"
                ]
            )
        take(self, peer, message, effects)

    p.set(Training, "_from_shard", trusting)


def _fsync_off(p: Patches) -> None:
    from simulator import disk

    p.set(disk.Disk, "syncs", False)
    init = disk.Disk.__init__

    def without(self: disk.Disk) -> None:
        init(self)
        self.syncs = False

    p.set(disk.Disk, "__init__", without)


def _digest_check_off(p: Patches) -> None:
    class Any_(str):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    class Sum:
        def __init__(self, data: bytes = b"") -> None:
            pass

        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return Any_("0" * 64)

    lenient = SimpleNamespace(sha256=Sum, file_digest=lambda *_: Sum())
    for module in (manifest, sources, recover):
        if hasattr(module, "hashlib"):
            p.set(module, "hashlib", lenient)


def _order_not_fixed(p: Patches) -> None:
    mean = store.weighted_mean
    p.set(store, "weighted_mean", lambda t, w, s: mean(t[::-1], w[::-1], s))
    changed = SyncGate.members_changed
    turn = [0]

    def any_order(self: SyncGate) -> Any:
        turn[0] += 1
        return [round_[:: 1 if turn[0] % 2 else -1] for round_ in changed(self)]

    p.set(SyncGate, "members_changed", any_order)


def _previous_weights_wrong(p: Patches) -> None:
    payload = StoredChunk.payload

    def newest(self: StoredChunk, previous: bool = False) -> Any:
        return payload(self)

    p.set(StoredChunk, "payload", newest)


def _lost_not_counted(p: Patches) -> None:
    p.set(ShardStats, "lose", lambda self, slot, chunk, count: None)


def _clocks_not_restored(p: Patches) -> None:
    p.set(StaleGate, "reached", lambda self, slot, seq: None)


def _bound_off(p: Patches) -> None:
    p.set(StaleGate, "may_answer", lambda self, slot, seq: True)


def _pass_forgotten(p: Patches) -> None:
    """EndEpoch of a pass that has turned over waits for the next one."""
    p.set(Passes, "is_over", lambda self, which: False)


def _windows_not_restored(p: Patches) -> None:
    restore = StoredChunk.restore

    def forgetting(self: StoredChunk, *arguments: Any, **named: Any) -> None:
        restore(self, *arguments, **named)
        self._windows.clear()

    p.set(StoredChunk, "restore", forgetting)


def _torn_rounds(p: Patches) -> None:
    """A round does not wait for everybody."""

    def hasty(self: SyncGate, contribution: Any) -> Any:
        self._applied[contribution.slot] = contribution.seq
        return [[contribution]]

    p.set(SyncGate, "offer", hasty)


def _leases_not_returned(p: Patches) -> None:
    from downpour_coordinator.data import DataState

    p.set(DataState, "release", lambda self, slot: None)


KILLS = ("kill", "kill at", "zombie")
MUTATIONS = (
    Mutation("dedup off", _dedup_off),
    Mutation("fencing of workers off", _worker_epochs_off, kinds=("zombie",), roles=("worker",)),
    Mutation("old shards are heard", _old_shards_heard, 300, None, ("zombie",), ("server",)),
    Mutation("fsync off", _fsync_off, kinds=("power",)),
    Mutation("digest check off", _digest_check_off, 400, kinds=("flip", "power")),
    Mutation("reduction order not fixed", _order_not_fixed, mode="sync"),
    Mutation("rounds do not wait", _torn_rounds, mode="sync"),
    Mutation("previous weights are the newest", _previous_weights_wrong, 300, "sync", KILLS, ("worker",)),
    Mutation("a pass that is over is forgotten", _pass_forgotten, 300, "sync", KILLS, ("worker",)),
    Mutation("lost pushes are not counted", _lost_not_counted, 300, "async", KILLS, ("server",)),
    Mutation("windows are not restored", _windows_not_restored, 300, "async", KILLS, ("server",)),
    Mutation("ssp: no bound", _bound_off, mode="ssp:0"),
    Mutation("ssp: clocks are not restored", _clocks_not_restored, 300, "ssp:0", KILLS, ("server",)),
    Mutation("leases are not returned", _leases_not_returned, 300, "async", KILLS, ("worker",)),
)


def caught(mutation: Mutation) -> tuple[int, str]:
    """The first seed that fails with the mutation and not without, and what is violated; -1 if there is none."""
    patches, tried = Patches(), 0
    for seed in itertools.count():
        chosen = scenario(seed, mutation.mode)
        if not mutation.concerns(chosen):
            continue
        tried += 1
        if tried > mutation.budget:
            break
        if chosen.synchronous:
            calm_outcome(chosen)  # unharmed
        mutation.apply(patches)
        try:
            violation = _violation(chosen)
        finally:
            patches.undo()
        if violation and not play(chosen).violation:
            return seed, violation
    return -1, ""


def _violation(chosen: Any) -> str:
    try:
        return play(chosen).violation
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _row(name: str) -> tuple[str, int, str, float]:
    import torch

    torch.set_num_threads(1)
    mutation = next(m for m in MUTATIONS if m.name == name)
    started_s = time.monotonic()
    seed, violation = caught(mutation)
    return name, seed, violation, time.monotonic() - started_s


def main() -> int:
    """Exit code 1 if a mutation survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only those whose names hold one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    names = [m.name for m in MUTATIONS if not arguments.names or any(n in m.name for n in arguments.names)]
    survivors = 0
    print(f"{'taken away':34} {'seen by':>9} {'after':>7}  as")
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for name, seed, violation, took_s in pool.imap_unordered(_row, names):
            survivors += seed < 0
            seen = f"seed {seed}" if seed >= 0 else "SURVIVES"
            print(
                f"{name:34} {seen:>9} {took_s:5.1f} s  {violation.splitlines()[0][:80] if violation else ''}",
                flush=True,
            )
    print(f"{len(names) - survivors} of {len(names)} are seen")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
