"""L-BFGS over vectors that lie elsewhere: the algorithm of mode ``lbfgs``, without messages, data or vectors.

Dean et al. 2012, section 4.2 (Sandblaster), with the two-loop recursion of Nocedal & Wright, algorithm 7.4. The
coordinator knows products of vectors only: what the recursion does with vectors it does with their coefficients over
the *basis* {s_1 … s_m, y_1 … y_m, g}, whose products it keeps (as Chen, Wang and Zhou 2014 do). So one message asks for
the products of an iteration and one more makes the direction, whatever the length of the history.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from downpour_common.errors import ConfigError
from downpour_common.vectors import DIRECTION, FIRST_PAIR, GRADIENT, POINT, TRIAL, WEIGHTS, Commands
from downpour_coordinator.linesearch import Trial, strong_wolfe

CURVATURE = 1e-10
"""Least s·y of a pair that is kept, as a share of |s| |y|: one below tells of rounding, not of curvature."""


@dataclass(frozen=True, slots=True)
class Options:
    """What :func:`downpour.minimize` is given, and what it makes of it."""

    samples: int
    """in the data set"""
    unit: int
    """samples of a mini-batch: portions are multiples of it"""
    max_iterations: int = 100
    max_evaluations: int = 0
    """0: as many as it takes"""
    tolerance_grad: float = 1e-5
    """stop where no element of the gradient is larger"""
    tolerance_change: float = 1e-9
    """stop where neither the loss nor any weight changes by more"""
    lr: float = 1.0
    """step that each line search tries first"""
    weight_decay: float = 0.0
    """the loss has ``weight_decay / 2 * |weights|²`` added"""
    noise: float = 1e-7
    """relative differences of losses that are rounding"""
    history: int = 0
    """pairs kept; 0: as the job's mode says"""

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Options:
        """From plain values. Raises :class:`ConfigError`."""
        try:
            options = cls(**document)
            for name in ("samples", "unit", "max_iterations"):
                if type(getattr(options, name)) is not int or getattr(options, name) < 1:
                    raise ConfigError(f"downpour.minimize: {name} is a number of at least 1")
            for name in ("max_evaluations", "history"):
                if type(getattr(options, name)) is not int or getattr(options, name) < 0:
                    raise ConfigError(f"downpour.minimize: {name} is a number of at least 0")
            for name in ("tolerance_grad", "tolerance_change", "lr", "weight_decay", "noise"):
                if not 0 <= getattr(options, name) < math.inf:
                    raise ConfigError(f"downpour.minimize: {name} is a finite number of at least 0")
            if not options.lr:
                raise ConfigError("downpour.minimize: lr is more than 0")
        except TypeError as error:
            raise ConfigError(f"downpour.minimize: {error}") from None
        return options


@dataclass(frozen=True, slots=True)
class Evaluate:
    """The loss at the weights is wanted, summed over all samples (not finite: it cannot be computed); and its
    gradient, summed as well, at the shards. They have been told of ``number``."""

    number: int


@dataclass(slots=True)
class Progress:
    """How far the algorithm is: told with each iteration."""

    iterations: int = 0
    evaluations: int = 0
    loss: float = math.inf
    gradient: float = math.inf
    """largest element, without a sign"""
    step: float = 0.0
    """of the line search"""


@dataclass(slots=True)
class History:
    """The pairs (s, y) that there are, in the slots of a ring, and the products that the recursion needs."""

    size: int
    order: list[int] = field(default_factory=list)
    """slots, the oldest first; always 0 to ``len(order) - 1`` in some order"""
    sy: dict[tuple[int, int], float] = field(default_factory=dict)
    """s_i · y_j"""
    yy: dict[tuple[int, int], float] = field(default_factory=dict)
    sg: list[float] = field(default_factory=list)
    """by slot, s_i · g of the present gradient"""
    yg: list[float] = field(default_factory=list)

    @property
    def next_slot(self) -> int:
        """Where the next pair goes: beside the others, or in the place of the oldest."""
        return len(self.order) if len(self.order) < self.size else self.order[0]

    def s(self, slot: int) -> int:
        """The vector s of a slot."""
        return FIRST_PAIR + slot

    def y(self, slot: int) -> int:
        """The vector y of a slot."""
        return FIRST_PAIR + self.size + slot

    def add(self, slot: int, sy: list[float], yy: float, sg: list[float], yg: list[float]) -> None:
        """The pair in ``slot`` is the newest. By slot: its s · y_j, and s_j · g and y_j · g of the new gradient g; its
        y · y is ``yy``, and its other products with y follow, because it is the difference of two gradients."""
        self.order = [*(other for other in self.order if other != slot), slot]
        for j in self.order[:-1]:
            self.sy[slot, j], self.sy[j, slot] = sy[j], sg[j] - self.sg[j]
            self.yy[slot, j] = self.yy[j, slot] = yg[j] - self.yg[j]
        self.sy[slot, slot], self.yy[slot, slot] = sy[slot], yy
        self.sg, self.yg = sg, yg

    def without(self, slot: int, sg: list[float], yg: list[float]) -> None:
        """The pair in ``slot`` is of no use. Where it has taken another's place, all begins anew: that is rare."""
        if slot in self.order:
            self.clear()
        else:
            self.sg, self.yg = sg[:slot], yg[:slot]

    def clear(self) -> None:
        """No pairs any more: the direction is steepest descent's."""
        self.order, self.sg, self.yg = [], [], []

    def direction(self) -> tuple[float, list[float], list[float]]:
        """Coefficients of -H g: of g, and by slot of s and y.

        Nocedal & Wright, algorithm 7.4, on coefficients: q is g + Σ a_y y, and r is γ q + Σ a_s s.
        """
        order, count = self.order, len(self.order)
        if not count:
            return -1.0, [], []
        of_y = [0.0] * count
        for i in reversed(order):  # only younger y are in q so far
            of_y[i] = -(self.sg[i] + sum(of_y[j] * self.sy[i, j] for j in order if of_y[j])) / self.sy[i, i]
        gamma = self.sy[order[-1], order[-1]] / self.yy[order[-1], order[-1]]
        of_s = [0.0] * count
        for i in order:  # only older s are in r so far
            product = gamma * (self.yg[i] + sum(of_y[j] * self.yy[i, j] for j in order))
            product += sum(of_s[j] * self.sy[j, i] for j in order if of_s[j])
            of_s[i] = -of_y[i] - product / self.sy[i, i]
        return -gamma, [-c for c in of_s], [-gamma * c for c in of_y]

    def slope(self, square: float, of_g: float, of_s: list[float], of_y: list[float]) -> float:
        """The product of a direction, by its coefficients, with the gradient, whose own is ``square``."""
        return of_g * square + sum(c * p for c, p in zip([*of_s, *of_y], [*self.sg, *self.yg], strict=True))


Ask = Commands | Evaluate
Algorithm = Generator[Ask, list[float], str]
"""Yields what is to be done, and is sent the results, of :class:`Evaluate` the loss. Returns why it ends."""


def minimise(options: Options, progress: Progress, history: int, first: int) -> Algorithm:
    """Minimise from the shards' weights on. At the end the weights are the point reached.

    ``progress`` is kept up to date, and its counts go on from what they are. Evaluations are numbered from ``first``
    upwards. Ends with ``gradient``, ``change``, ``iterations``, ``evaluations``, ``no-decrease``, or ``not-finite``
    where there is no loss to begin with.
    """
    return _Run(options, progress, History(options.history or history), first).run()


class _Run:
    def __init__(self, options: Options, progress: Progress, history: History, first: int) -> None:
        self._options = options
        self._progress = progress
        self._history = history
        self._next = first

    def run(self) -> Algorithm:
        options, progress, history = self._options, self._progress, self._history
        progress.loss, _ = yield from self._evaluate(Commands().begin())
        if not math.isfinite(progress.loss):
            return "not-finite"
        progress.gradient, square = yield Commands().copy(GRADIENT, TRIAL).maxabs(GRADIENT).dot(GRADIENT, GRADIENT)
        if not math.isfinite(square):
            return "not-finite"
        if progress.gradient <= options.tolerance_grad:
            return "gradient"
        while progress.iterations < options.max_iterations:
            found = yield from self._search(square)
            if found is None:
                yield Commands().copy(WEIGHTS, POINT)
                if self._spent or not history.order:
                    return "evaluations" if self._spent else "no-decrease"
                history.clear()  # what it knows is of no use here
                continue
            before, progress.loss, progress.step = progress.loss, found.loss, found.at
            square, moved = yield from self._advance(history.next_slot)
            progress.iterations += 1
            if progress.gradient <= options.tolerance_grad:
                return "gradient"
            if moved <= options.tolerance_change or abs(before - found.loss) < options.tolerance_change:
                return "change"
            if self._spent:
                return "evaluations"
        return "iterations"

    def _advance(self, slot: int) -> Generator[Ask, list[float], tuple[float, float]]:
        """The weights become the point, and the pair in ``slot`` tells of the way. Returns g · g and the largest change
        of a weight."""
        history = self._history
        s, y, count = history.s(slot), history.y(slot), max(len(history.order), slot + 1)
        step = Commands().copy(s, WEIGHTS).axpy(s, POINT, [-1.0])
        step.copy(y, TRIAL).axpy(y, GRADIENT, [-1.0])
        step.copy(GRADIENT, TRIAL).copy(POINT, WEIGHTS).maxabs(GRADIENT).dot(GRADIENT, GRADIENT)
        step.maxabs(s).dot(s, s).dot(y, y).dot(s, history.y(0), count)
        step.dot(GRADIENT, history.s(0), count).dot(GRADIENT, history.y(0), count)
        largest, square, moved, ss, yy, *products = yield step
        self._progress.gradient = largest
        sy, sg, yg = (products[i * count : (i + 1) * count] for i in range(3))
        if sy[slot] > CURVATURE * math.sqrt(ss * yy):
            history.add(slot, sy, yy, sg, yg)
        else:
            history.without(slot, sg, yg)
        return square, moved

    def _search(self, square: float) -> Generator[Ask, list[float], Trial | None]:
        """A step along the next direction; the weights and the trial's gradient are those there. None: there is no step
        that lowers the loss. ``square``: g · g."""
        options, history = self._options, self._history
        of_g, of_s, of_y = history.direction()
        slope = history.slope(square, of_g, of_s, of_y)
        if not -math.inf < slope < 0:
            return None
        first = options.lr * (1.0 if history.order else min(1.0, 1 / math.sqrt(square)))
        step = Commands().zero(DIRECTION).axpy(DIRECTION, GRADIENT, [of_g])
        step.axpy(DIRECTION, history.s(0), of_s).axpy(DIRECTION, history.y(0), of_y)
        search = strong_wolfe(self._progress.loss, slope, first, options.noise)
        at = next(search)
        while True:
            told = yield from self._evaluate(step.copy(WEIGHTS, POINT).axpy(WEIGHTS, DIRECTION, [at]), DIRECTION)
            last, step = at, Commands()
            try:
                at = search.send(told)
            except StopIteration as end:
                found: Trial = end.value
                break
            if self._spent:
                return None
        if found.at == 0:
            return None
        if found.at != last:  # the shards have the gradient of the last one
            loss, _ = yield from self._evaluate(Commands().copy(WEIGHTS, POINT).axpy(WEIGHTS, DIRECTION, [found.at]))
            return found if math.isfinite(loss) else None
        return found

    def _evaluate(self, before: Commands, along: int = -1) -> Generator[Ask, list[float], tuple[float, float]]:
        """The mean loss at the weights that ``before`` makes, and the derivative ``along`` a vector; the mean gradient
        is the trial's. Not finite where it cannot be computed."""
        options, number = self._options, self._next
        self._next += 1
        self._progress.evaluations += 1
        yield before.evaluate(number)
        (total,) = yield Evaluate(number)
        if not math.isfinite(total):
            return math.inf, 0.0
        mean = Commands().scale(TRIAL, 1 / options.samples)
        if options.weight_decay:
            mean.axpy(TRIAL, WEIGHTS, [options.weight_decay]).dot(WEIGHTS, WEIGHTS)
        if along >= 0:
            mean.dot(TRIAL, along)
        results = yield mean
        loss = total / options.samples
        if options.weight_decay:
            loss += options.weight_decay / 2 * results[0]
        return (loss, results[-1] if along >= 0 else 0.0) if math.isfinite(loss) else (math.inf, 0.0)

    @property
    def _spent(self) -> bool:
        return 0 < self._options.max_evaluations <= self._progress.evaluations
