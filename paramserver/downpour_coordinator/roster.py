"""The processes that one job has and should have."""

from __future__ import annotations

from typing import Any

from downpour_coordinator.processes import Key, Process
from downpour_coordinator.recovery import succeed

DRAIN_S = 30.0
"""Time that a worker which is to leave is given to complete its step."""


class Roster:
    """By (role, index). What is ``pending`` should be started, what is ``stopping`` should end; others see to it."""

    def __init__(self) -> None:
        self.all: dict[Key, Process] = {}

    def workers(self) -> list[Process]:
        """All workers, ended ones included."""
        return [p for p in self.all.values() if p.role == "worker"]

    def servers(self) -> list[Process]:
        """All shards, ended ones included."""
        return [p for p in self.all.values() if p.role == "server"]

    def staying(self) -> list[Process]:
        """Workers that have not ended and are not about to leave."""
        return [p for p in self.workers() if p.state != "ended" and not p.leaving]

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
            self.all["worker", slot] = Process("worker", slot, epochs.get(("worker", slot), 0), since_s=now_s)
        for index in range(shards * replication):
            epoch = max(shard_epoch, epochs.get(("server", index), 0))
            self.all["server", index] = Process("server", index, epoch, since_s=now_s, shards=shards)

    def want_worker(self, slot: int, now_s: float) -> Process:
        """One more worker, or another one for a slot whose worker has ended."""
        before = self.all.get(("worker", slot))
        process = Process("worker", slot, before.epoch + 1 if before else 0, since_s=now_s)
        self.all["worker", slot] = process
        return process

    def succeed(self, before: Process, now_s: float, proven: bool = False) -> Process:
        """Another process in the place of one that has died; see :func:`downpour_coordinator.recovery.succeed`."""
        process = self.all[before.key] = succeed(before, now_s, proven)
        return process

    def free_slots(self, count: int) -> list[int]:
        """The lowest ``count`` slots without a worker."""
        taken = {p.index for p in self.workers() if p.state != "ended"}
        return [slot for slot in range(len(taken) + count) if slot not in taken][:count]

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
    def from_document(cls, document: list[dict[str, Any]], now_s: float) -> Roster:
        """The inverse of :meth:`document`; waits begin anew."""
        self = cls()
        for fields in document:
            process = Process.from_document(fields)
            process.since_s = now_s
            self.all[process.key] = process
        return self
