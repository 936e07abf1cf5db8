"""Mode ``lbfgs`` in a worker: portions of the data, computed with the weights of an evaluation (Dean et al. 2012,
section 4.2). The vectors of L-BFGS are the shards', its decisions the coordinator's (``downpour_coordinator.lbfgs``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as trees
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from downpour.control import Control
from downpour.engine import Engine
from downpour.parallel.microbatch import Criterion, arguments
from downpour.spans import span
from downpour_common import failpoints
from downpour_common import messages as m
from downpour_common.errors import ConfigError, ModelError
from downpour_common.modes import Mode

INSTEAD = "call downpour.minimize(model, criterion, loader) in place of the training loop"


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where :func:`downpour.minimize` has come to; the model has these weights."""

    loss: float
    """mean over the samples, weight decay included"""
    gradient: float
    """largest element of its gradient, without a sign"""
    iterations: int
    evaluations: int
    """of the loss of all data and its gradient"""
    reason: str
    """``gradient`` and ``change``: the tolerance was met; ``iterations``, ``evaluations``: that many were made;
    ``no-decrease``: no step lowers the loss, as far as its rounding tells; ``not-finite``: nor can it be computed"""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What :func:`downpour.minimize` was given; None: the prepared ``torch.optim.LBFGS``'s, or a default."""

    max_iterations: int | None = None
    max_evaluations: int | None = None
    tolerance_grad: float | None = None
    tolerance_change: float | None = None
    lr: float | None = None
    history: int | None = None
    weight_decay: float | None = None

    def resolved(self, optimizer: torch.optim.LBFGS | None) -> dict[str, Any]:
        """Every option with its value."""
        values: dict[str, Any] = dict(DEFAULTS)
        if optimizer is not None:
            group = optimizer.param_groups[0]
            values |= {name: group[theirs] for name, theirs in THEIRS.items()}
            values["lr"] = float(values["lr"])
        return values | {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


DEFAULTS: dict[str, Any] = {
    "max_iterations": 100,
    "max_evaluations": 0,
    "tolerance_grad": 1e-5,
    "tolerance_change": 1e-9,
    "lr": 1.0,
    "history": 0,
    "weight_decay": 0.0,
}
"""``max_evaluations`` 0: as many as it takes; ``history`` 0: what the mode says, 10 if nothing."""
THEIRS = {
    "max_iterations": "max_iter",
    "max_evaluations": "max_eval",
    "tolerance_grad": "tolerance_grad",
    "tolerance_change": "tolerance_change",
    "lr": "lr",
    "history": "history_size",
}
"""What ``torch.optim.LBFGS`` calls it."""


class Data:
    """The samples of a loader by their numbers, each once; its sampler does not count."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        loader = getattr(loader, "_original", loader)
        dataset: Any = loader.dataset
        usual = isinstance(loader.sampler, SequentialSampler) or (
            isinstance(loader.sampler, RandomSampler) and not loader.sampler.replacement
        )
        if isinstance(dataset, IterableDataset) or loader.batch_size is None or not usual:
            raise ConfigError(
                "downpour.minimize takes each sample of a data set once in every evaluation: give it a DataLoader over "
                "a map-style data set with a batch_size, and without a sampler (torch.utils.data.Subset makes a part)"
            )
        self._dataset = dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn
        self.batch_size = loader.batch_size
        self.samples = len(self._dataset)
        if not self.samples:
            raise ConfigError("downpour.minimize: the data set has no samples")

    def batch(self, start: int, stop: int) -> tuple[Any, Any]:
        """Inputs and targets of these samples, as the loader would collate them."""
        if type(self._dataset) is TensorDataset and self._collate is default_collate:
            found: Any = [tensor[start:stop] for tensor in self._dataset.tensors]  # the same, many times faster
            return self._pair(found)
        numbers = list(range(start, stop))
        at_once = getattr(self._dataset, "__getitems__", None)
        return self._pair(self._collate(at_once(numbers) if callable(at_once) else [self._dataset[i] for i in numbers]))

    @staticmethod
    def _pair(found: Any) -> tuple[Any, Any]:
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ConfigError("downpour.minimize: the loader's batches must be pairs of inputs and targets")
        return found[0], found[1]


class Objective:
    """The loss of a model over data, and its gradient, both summed over samples. ``criterion``: the mean of a batch."""

    def __init__(self, model: nn.Module, criterion: Criterion, data: Data) -> None:
        self._model, self._criterion, self.data = model, criterion, data
        self._device = next(model.parameters()).device
        if any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p and part.training for part in model.modules()
        ):
            warnings.warn(
                "downpour.minimize: dropout makes another loss of every evaluation, which no line search can follow; "
                "call model.eval() before it, or leave dropout out",
                stacklevel=5,
            )

    def add(self, start: int, stop: int, over: Callable[[], bool] = lambda: False) -> float | None:
        """Add the gradient of these samples, batch by batch, to the parameters'; returns their loss, not finite where
        it cannot be computed, and None as soon as it is ``over``."""
        total, unit = 0.0, self.data.batch_size
        for first in range(start, stop, unit):
            if over():
                return None
            last = min(first + unit, stop)
            with span("input"):
                batch = self.data.batch(first, last)
                inputs, targets = trees.tree_map(self._placed, batch)
            with torch.enable_grad():
                loss = self._criterion(self._model(*arguments(inputs)), targets)
                total += float(loss.detach()) * (last - first)
                if not math.isfinite(total):
                    return math.inf
                (loss * (last - first)).backward()
        return total

    def _placed(self, leaf: Any) -> Any:
        return leaf.to(self._device) if isinstance(leaf, torch.Tensor) else leaf


class SandblasterEngine(Engine):
    """In place of steps: portions. Its optimizer is that of :func:`optimizer_for`."""

    _runs = 0
    _over: tuple[int, int] = (-1, -1)

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:  # noqa: ARG002
        """There are none. Raises :class:`ConfigError`."""
        raise ConfigError(f"mode lbfgs has no optimizer.step(): {INSTEAD}")

    def push(self, samples: int) -> None:  # noqa: ARG002
        """Only portions are pushed. Raises :class:`ConfigError`."""
        raise ConfigError(f"mode lbfgs has no downpour.push(): {INSTEAD}")

    def portion_over(self, notice: m.PortionOver) -> None:
        """In any thread: nobody waits for this portion any more."""
        self._over = notice.evaluation, notice.portion

    def minimize(
        self, objective: Objective, wishes: Wishes, mode: Mode, control: Control, between: Callable[[], None]
    ) -> Minimum:
        """Compute portions until the coordinator says that the minimum is found. ``between`` is called now and then."""
        self._runs += 1
        options = wishes.resolved(vars(self._optimizer)["theirs"])
        if wishes.history is None and "history" in dict(mode.options):
            options["history"] = 0
        double = all(weights.dtype is torch.float64 for weights in self._space.weights.values())
        options |= {"samples": objective.data.samples, "unit": objective.data.batch_size}
        options["noise"] = 1e-14 if double else 1e-7
        evaluation = -1
        finished: tuple[int, int, float, int] = (-1, 0, 0.0, 0)
        while True:
            with span("wait"):
                answer = control.take_portion(self._runs, options if finished[0] < 0 else {}, *finished)
            if isinstance(answer, m.Minimised):
                break
            self.counters.clock = answer.clock
            if answer.evaluation != evaluation:
                self.pull()
                evaluation = answer.evaluation
            loss = self._compute(objective, answer, between)
            finished = (-1, 0, 0.0, 0)
            if loss is not None:
                finished = (evaluation, answer.portion, loss, answer.stop - answer.start)
            between()
        self.pull()
        result = answer.result
        self.counters.clock = int(result["clock"])
        between()
        return Minimum(**{f.name: result[f.name] for f in fields(Minimum)})

    def _compute(self, objective: Objective, portion: m.Portion, between: Callable[[], None]) -> float | None:
        """The portion's loss, once all shards have its gradient; None: it is not wanted any more."""
        this = portion.evaluation, portion.portion

        def over() -> bool:
            between()
            return self._over == this

        self.zero_gradients()
        loss = objective.add(portion.start, portion.stop, over)
        if loss is None:
            return None
        self.counters.samples += portion.stop - portion.start
        if not math.isfinite(loss):
            return math.inf
        self._space.gather_gradients()
        if not all(torch.isfinite(flat).all() for flat in self._space.gradients.values()):
            return math.inf
        self.counters.pushes += 1
        failpoints.hit("worker.push.before")
        with span("push"):
            chunks = [c for ready in self._staging.outgoing(self._chunks, self._space.gradients) for c in ready]
            self._client.push_portion(chunks, portion.stop - portion.start, *this)
        failpoints.hit("worker.push.after")
        return loss


def optimizer_for(
    mode: Mode, model: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer | None:
    """The optimizer that describes what is to be trained: the script's, or, in mode ``lbfgs``, one that stands in for
    it and has no state, because no update rule is ever applied; the script's refuses to step then.

    Raises :class:`ModelError` where the script's and the mode do not go together.
    """
    ours = isinstance(optimizer, torch.optim.LBFGS)
    if mode.name != "lbfgs":
        if ours:
            raise ModelError(
                "torch.optim.LBFGS needs the loss of all data again and again: add --mode lbfgs, and "
                f"{INSTEAD} and of optimizer.step(closure)"
            )
        return optimizer
    if model is None:
        raise ModelError("mode lbfgs: give downpour.prepare a model")
    if optimizer is not None and not ours:
        raise ModelError(
            f"mode lbfgs: the servers run L-BFGS, and {type(optimizer).__name__} takes no part in it. Give "
            f"downpour.prepare the model and the loader alone, or a torch.optim.LBFGS for its options, and {INSTEAD}"
        )

    def step(*_arguments: Any) -> None:
        raise ConfigError(f"mode lbfgs has no optimizer.step(): {INSTEAD}")

    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer is not None:
        vars(optimizer)["step"] = step
        parameters = optimizer.param_groups[0]["params"]
    if not parameters:
        raise ModelError("nothing to train: no parameter of the model requires a gradient")
    found = torch.optim.SGD(parameters, lr=1.0)
    vars(found)["theirs"] = optimizer
    return found


def minimize_alone(objective: Objective, model: nn.Module, wishes: Wishes, theirs: torch.optim.LBFGS | None) -> Minimum:
    """Without a launcher: torch's own L-BFGS with its strong Wolfe line search, on all data in one process."""
    o = wishes.resolved(theirs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples, decay = objective.data.samples, o["weight_decay"]
    optimizer = torch.optim.LBFGS(
        parameters,
        lr=o["lr"],
        max_iter=o["max_iterations"],
        max_eval=o["max_evaluations"] or 25 * o["max_iterations"],
        tolerance_grad=o["tolerance_grad"],
        tolerance_change=o["tolerance_change"],
        history_size=o["history"] or 10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = objective.add(0, samples)
        assert found is not None
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / samples
            p.grad.add_(p.detach(), alpha=decay)
        square = sum(float(p.detach().double().square().sum()) for p in parameters) if decay else 0.0
        return torch.tensor(found / samples + decay / 2 * square, dtype=torch.float64)

    optimizer.step(closure)
    state = optimizer.state[parameters[0]]
    iterations, evaluations = int(state["n_iter"]), int(state["func_evals"])
    loss = float(closure())
    gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None and p.numel())
    reason = "change"
    if not math.isfinite(loss):
        reason = "not-finite"
    elif gradient <= o["tolerance_grad"]:
        reason = "gradient"
    elif iterations >= o["max_iterations"]:
        reason = "iterations"
    elif 0 < o["max_evaluations"] <= evaluations:
        reason = "evaluations"
    return Minimum(loss, gradient, iterations, evaluations + 1, reason)
