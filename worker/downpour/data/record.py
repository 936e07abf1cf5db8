"""What a worker has taken of one pass, and what of that it is done with. Plain bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Part:
    """One batch's place in its pass: positions ``start:stop``; ``offset`` and ``last`` as in ``rounds.Round``.

    ``samples`` are in it: positions may be of whole batches.
    """

    start: int
    stop: int
    samples: int
    offset: int = 0
    last: bool = False


@dataclass(slots=True)
class PassRecord:
    """One pass. A batch is *finished* when a step has used it, or when the script has gone on without gradients; when
    the pass is complete, all are."""

    trained: int = 0
    """samples that a step has used"""
    complete: bool = False
    _taken: list[Part] = field(default_factory=list)
    """given to the script and not finished"""
    _current: Part | None = None
    """the last of these, until the script asks for the next one"""
    _finished: list[tuple[int, int]] = field(default_factory=list)

    def take(self, part: Part) -> None:
        """The script gets a batch."""
        self._taken.append(part)
        self._current = part

    def next_asked(self, learning: bool) -> None:
        """The script asks for the next batch; without ``learning`` it is done with those before."""
        self._current = None
        if not learning:
            self._finish(self._taken)

    def stepped(self) -> None:
        """A step was completed with all that was taken."""
        self.trained += sum(part.samples for part in self._taken)
        self._current = None
        self._finish(self._taken)

    def end(self, complete: bool) -> None:
        """The pass is over; when it was left early, the batch at hand is not finished."""
        if self._current is not None and not complete:
            self._taken.remove(self._current)
        self._finish(self._taken)
        self.complete = self.complete or complete

    def report(self) -> list[tuple[int, int]]:
        """Positions finished since the last report, touching ones joined."""
        done, self._finished = self._finished, []
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(done):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return joined

    def _finish(self, parts: list[Part]) -> None:
        self._finished += [(part.start, part.stop) for part in parts]
        self._taken = []
