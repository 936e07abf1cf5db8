"""Which workers a shard still waits for. One object per shard, shared by the policies of its chunks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Members:
    """Slots 0..workers-1. A slot is *awaited* until it ended its epoch or left."""

    workers: int
    ended: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)

    def awaited(self) -> list[int]:
        """Slots that owe the open round a contribution, ascending."""
        return [slot for slot in range(self.workers) if slot not in self.ended and slot not in self.left]

    def end_epoch(self, slot: int) -> None:
        """``slot`` has no more in this epoch."""
        self.ended.add(slot)

    def leave(self, slot: int) -> None:
        """``slot`` has no more, ever."""
        self.left.add(slot)
        self.ended.discard(slot)

    def turn_over(self) -> bool:
        """Begin the next epoch if nobody has more in this one; asked once the gates have done their last rounds."""
        if self.ended and not self.awaited():
            self.ended.clear()
            return True
        return False
