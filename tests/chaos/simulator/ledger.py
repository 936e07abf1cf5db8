"""What was pushed, what was acknowledged, and what became of it: the book that the invariants are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from simulator.scenario import PER_CHUNK

Who = tuple[int, int]
"""slot and epoch of a worker's process"""
PLACES = 8
"""Contributions in one element: each has six binary digits, of which the lowest counts."""
ONCE = sum(1 << (6 * place) for place in range(PLACES))
TWICE = sum(62 << (6 * place) for place in range(PLACES))


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True)
class Pushed:
    """One contribution, to all chunks. ``run``: how often the whole job had begun by then; ``push``: which of its
    worker's pushes brings it."""

    who: Who
    run: int
    push: int
    acknowledged: bool = False


@dataclass(slots=True)
class Step:
    """A worker's step of the synchronous mode: which samples it had."""

    epoch: int
    samples: tuple[int, ...]


@dataclass
class Ledger:
    """See the module."""

    synchronous: bool
    bound: int | None
    """ssp: clocks that a worker may be ahead"""
    run: int = 0
    pushed: list[Pushed] = field(default_factory=list)
    steps: dict[tuple[int, int], Step] = field(default_factory=dict)
    """sync: by slot and clock"""
    trained: dict[tuple[int, int], int] = field(default_factory=dict)
    """by pass and sample: steps that were completed with it"""
    n_push: int = 1
    contributed: dict[Who, int] = field(default_factory=dict)
    """by worker that pushes: the number that its next contribution will have"""
    _first: dict[Who, int] = field(default_factory=dict)
    ended_well: set[Who] = field(default_factory=set)
    _made: dict[Who, int] = field(default_factory=dict)
    _open: dict[Who, tuple[int, list[int]]] = field(default_factory=dict)

    def joined(self, who: Who, clock: int) -> None:
        """A worker is through with ``prepare``."""
        self._first[who] = clock

    def sends(self, who: Who, seq: int) -> None:
        """A contribution to a trainable chunk leaves a worker."""
        self.contributed[who] = max(seq + 1, self.contributed.get(who, 0))

    def begins(self, who: Who, clock: int, epoch: int, samples: list[int]) -> None:
        """A worker has a batch, and will push what it makes of it as ``clock``."""
        self._open[who] = (epoch, samples)
        if not self.synchronous:
            return
        step, key = Step(epoch, tuple(samples)), (who[0], clock)
        known = self.steps.setdefault(key, step)
        if known != step:
            raise Violation(f"worker/{who[0]} has {step} at clock {clock}, and had {known} before")

    def next(self, who: Who) -> tuple[int, int, float]:
        """The number of a new contribution, the element that it adds to, and what."""
        number = len(self.pushed)
        made = self._made[who] = self._made.get(who, -1) + 1
        self.pushed.append(Pushed(who, self.run, made // self.n_push))
        element, place = divmod(number, PLACES)
        if element >= PER_CHUNK:
            raise Violation("the simulated job goes on for ever: the ledger is full")
        return number, element, float(1 << (6 * place))

    def completed(self, who: Who, clock: int, number: int) -> None:
        """``optimizer.step()`` has returned."""
        epoch, samples = self._open.pop(who)
        for sample in samples:
            self.trained[epoch, sample] = self.trained.get((epoch, sample), 0) + 1
        if number >= 0 and (clock + 1 - self._first[who]) % self.n_push == 0:
            self.acknowledge(who)
        if self.bound is not None and who in self.contributed:
            done = self.contributed[who]
            for other, theirs in self.contributed.items():
                if theirs < done - self.bound:
                    raise Violation(
                        f"{who} has completed {done}, {other} only begun {theirs}: more than {self.bound} behind"
                    )

    def acknowledge(self, who: Who) -> None:
        """All that it has pushed has been answered."""
        for pushed in self.pushed:
            if pushed.who == who:
                pushed.acknowledged = True

    def gone(self, who: Who) -> None:
        """The process has ended, or does not count any more."""
        self.contributed.pop(who, None)

    def begin_again(self, clock: int) -> None:
        """The whole job does, from a checkpoint of that clock or from nothing: what came after it has not been."""
        self.run += 1
        self.contributed.clear()
        self.steps = {key: step for key, step in self.steps.items() if key[1] < clock}


def counts(weights: torch.Tensor) -> torch.Tensor:
    """The ledger's digits in a chunk's weights."""
    return weights.to(torch.int64)


def check_once(weights: torch.Tensor, where: str) -> None:
    """No contribution is in these weights twice."""
    if bool((counts(weights) & TWICE).any()):
        found = [i for i in range(weights.numel()) if int(weights[i]) & TWICE]
        raise Violation(f"{where} has a contribution twice, in elements {found}")


def applied(weights: torch.Tensor) -> set[int]:
    """Numbers of the contributions that are in these weights."""
    found = set()
    for element, value in enumerate(counts(weights).tolist()):
        for place in range(PLACES):
            if value >> (6 * place) & 1:
                found.add(element * PLACES + place)
    return found
