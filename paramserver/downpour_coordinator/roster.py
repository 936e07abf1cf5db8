"""The processes that one job has and should have."""

from __future__ import annotations

from typing import Any

from downpour_coordinator.processes import Key, Process
from downpour_coordinator.recovery import succeed

DRAIN_S = 30.0
"""Time that a worker which is to leave is given to complete its step."""


class Roster:
    """By (role, index). What is ``pending`` should be started, what is ``stopping`` should end; others see to it.

    ``ranks``: workers of each replica, which are wanted, started again and let go together.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.all: dict[Key, Process] = {}

    def workers(self) -> list[Process]:
        """All workers, ended ones included."""
        return [p for p in self.all.values() if p.role == "worker"]

    def servers(self) -> list[Process]:
        """All shards, ended ones included."""
        return [p for p in self.all.values() if p.role == "server"]

    def mates(self, process: Process) -> list[Process]:
        """The workers of this one's replica, itself among them, ended ones included."""
        first = process.index - process.index % self.ranks
        found = (self.all.get((process.role, slot)) for slot in range(first, first + self.ranks))
        return [p for p in found if p is not None]

    def staying(self) -> list[Process]:
        """Workers that have not ended for good and are not about to leave."""
        return [
            p
            for p in self.workers()
            if (p.state != "ended" or p.fallen in ("again", "over")) and p.fallen != "out" and not p.leaving
        ]

    def pending(self) -> list[Process]:
        """What needs a place, shards first."""
        return sorted((p for p in self.all.values() if p.state == "pending"), key=lambda p: (p.role, p.index))

    def stopping(self) -> list[Process]:
        """What is to end and has not yet."""
        return [p for p in self.all.values() if p.running and p.stop is not None]

    def populate(self, workers: int, shards: int, replication: int, shard_epoch: int, now_s: float) -> None:
        """All anew, with epochs that nothing before has had."""
        epochs = {key: p.epoch + 1 for key, p in self.all.items()}
        self.all.clear()
        for slot in range(workers):
            epoch = epochs.get(("worker", slot), 0)
            self.all["worker", slot] = Process("worker", slot, epoch, since_s=now_s, ranks=self.ranks)
        for index in range(shards * replication):
            epoch = max(shard_epoch, epochs.get(("server", index), 0))
            self.all["server", index] = Process("server", index, epoch, since_s=now_s, shards=shards)

    def want_worker(self, slot: int, now_s: float) -> Process:
        """One more worker, or another one for a slot whose worker has ended."""
        before = self.all.get(("worker", slot))
        process = Process("worker", slot, before.epoch + 1 if before else 0, since_s=now_s, ranks=self.ranks)
        self.all["worker", slot] = process
        return process

    def succeed(self, before: Process, now_s: float, proven: bool = False) -> Process:
        """Another process in the place of one that has died; see :func:`downpour_coordinator.recovery.succeed`."""
        process = self.all[before.key] = succeed(before, now_s, proven)
        return process

    def succeed_together(self, mates: list[Process], now_s: float) -> list[Process]:
        """Other processes in the places of a replica's, all with one epoch, and all at one time."""
        after = [self.succeed(p, now_s) for p in mates]
        for process in after:
            process.epoch = max(p.epoch for p in after)
            process.quick = max(p.quick for p in after)
            process.wait_s = max(p.wait_s for p in after)
        return after

    def free_slots(self, count: int) -> list[int]:
        """The lowest ``count`` slots of replicas without a worker."""
        wanted = count // self.ranks
        taken = {p.index // self.ranks for p in self.workers() if p.state != "ended"}
        free = [replica for replica in range(len(taken) + wanted) if replica not in taken][:wanted]
        return [replica * self.ranks + rank for replica in free for rank in range(self.ranks)]

    def let_go(self, process: Process, replace: bool) -> bool:
        """A worker is to leave while the job goes on; False when it never was."""
        if process.state == "pending":
            process.state = "ended"
            return False
        process.leaving, process.replace = True, replace
        process.stop = DRAIN_S if process.stop is None else process.stop
        return True

    def stop(self, processes: list[Process], grace_s: float) -> bool:
        """These are to end, with no more grace than this; whether all have."""
        for process in processes:
            if process.state == "pending":
                process.state = "ended"
            elif process.running and (process.stop is None or process.stop > grace_s):
                process.stop = grace_s
        return not any(p.running for p in processes)

    def document(self) -> list[dict[str, Any]]:
        """Plain values, for the journal."""
        return [p.document() for p in self.all.values()]

    @classmethod
    def from_document(cls, document: list[dict[str, Any]], now_s: float, ranks: int = 1) -> Roster:
        """The inverse of :meth:`document`; waits begin anew."""
        self = cls(ranks)
        for fields in document:
            process = Process.from_document(fields)
            process.since_s = now_s
            self.all[process.key] = process
        return self
