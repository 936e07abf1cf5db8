"""How soon a process that has died is started again, and what is wrong with a job that goes on nevertheless."""

from __future__ import annotations

from downpour_coordinator.processes import Key, Process
from downpour_coordinator.training import Training

QUICK_S = 10.0
"""A process that has lived for less was started in vain."""
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 60.0
LONG_S = 60.0
"""A job that has trained for longer begins again at once, as often as that may be."""
SHARD_SILENT_S = 5.0
WORKER_SILENT_S = 10.0
"""Time without a word after which it is told; they speak about twice a second."""
STUCK_S = 4.0
"""A worker of a replica that says nothing for longer is to blame for the others' waiting."""
DEAF_S = 2.0
"""A coordinator that has not looked for longer has been away."""


def succeed(before: Process, now_s: float, proven: bool = False) -> Process:
    """The process that takes the place of one that has ended: at once, but later and later where one after the other
    has lived for a short time only. ``proven``: it had done its part, however short."""
    quick = before.quick + 1 if now_s - before.since_s < QUICK_S and not proven else 0
    wait_s = min(FIRST_BACKOFF_S * 2.0 ** min(quick - 2, 10), LONGEST_BACKOFF_S) if quick > 1 else 0.0
    return Process(
        *(before.role, before.index, before.epoch + 1),
        since_s=now_s,
        replaces=True,
        quick=quick,
        wait_s=wait_s,
        shards=before.shards,
        ranks=before.ranks,
    )


def whole_backoff_s(times: int) -> float:
    """Time to wait before the whole job begins again for the ``times``-th time in a row: nothing at first."""
    return 0.0 if times <= 1 else min(2.0 ** min(times - 1, 10), LONGEST_BACKOFF_S)


class Signs:
    """When which process was heard of last. Times in seconds."""

    def __init__(self) -> None:
        self._heard_s: dict[Key, tuple[int, float]] = {}
        self._listens_s = self._looked_s = float("-inf")

    def listening(self, now_s: float) -> None:
        """Call it often: time in which nobody listened is nobody's silence."""
        if now_s - self._looked_s > DEAF_S:
            self._listens_s = now_s
        self._looked_s = now_s

    def quiet_s(self, process: Process, now_s: float) -> float:
        """Time for which a process has said nothing, though it could have been heard."""
        epoch, heard_s = self._heard_s.setdefault(process.key, (process.epoch, now_s))
        if epoch != process.epoch:
            self.heard(process.key, process.epoch, now_s)
            return 0.0
        return now_s - max(heard_s, self._listens_s)

    def heard(self, key: Key, epoch: int, now_s: float) -> None:
        """It has said something."""
        self._heard_s[key] = (epoch, now_s)

    def silent(self, process: Process, limit_s: float, now_s: float) -> str:
        """Words about a process that has been silent for too long, or "". Silence counts from the first word, or look,
        on."""
        epoch, heard_s = self._heard_s.setdefault(process.key, (process.epoch, now_s))
        if epoch != process.epoch:
            self.heard(process.key, process.epoch, now_s)
        elif now_s - heard_s > limit_s:
            return f"{process.name} has not been heard of for {now_s - heard_s:.0f} s"
        return ""


def troubles(training: Training, processes: dict[Key, Process], signs: Signs, now_s: float) -> list[str]:
    """What is wrong with the processes of a job that trains, in words."""
    found = []
    for shard in training.away():
        process = processes.get(("server", shard.process))
        if not shard.recovers:
            found.append(f"{training.name_of(shard.process)} takes over as server/{shard.index}'s leader")
            continue
        where = f"checkpoint {shard.checkpoint}" if shard.checkpoint else "the last checkpoint"
        waits = ", and waits for a place" if process is not None and process.state == "pending" else ""
        found.append(f"{training.name_of(shard.process)} is coming back from {where}{waits}")
    for index, backup in training.backups.items():
        if not backup.promotable:
            process = processes.get(("server", backup.process))
            waits = "is started again later" if process is not None and process.state == "pending" else "is catching up"
            found.append(f"server/{index} has no backup ({training.name_of(backup.process)} {waits})")
    for process in processes.values():
        if process.role == "server":
            shard_ = training.shards[process.index % training.facts.shards]
            backup_ = training.backups.get(shard_.index)
            leads = shard_.process == process.index
            if process.running and (shard_.serves if leads else backup_ is not None and backup_.promotable):
                found.append(signs.silent(process, SHARD_SILENT_S, now_s))
            continue
        worker = training.workers.get(process.index)
        if worker is None or worker.gone or process.state == "ended":
            continue
        if worker.answered and process.running:
            found.append(signs.silent(process, WORKER_SILENT_S, now_s))
        elif not worker.answered and process.replaces:
            found.append(f"{process.title} is being replaced")
    return [text for text in found if text]
