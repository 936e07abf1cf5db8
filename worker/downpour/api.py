"""The functions of ``import downpour``. Without a launcher they do nothing, and ``prepare`` is the identity."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from downpour.context import WorkerContext, from_environment
from downpour.tuning import Trial, measured, trial_asked_for
from downpour_common.errors import ConfigError
from downpour_common.quick_start import defer_compiler

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from downpour.parallel.microbatch import Criterion
    from downpour.parallel.plan import Plan
    from downpour.sandblaster import Minimum
    from downpour.session import Session

_context: WorkerContext | None = from_environment()
_trial: Trial | None = trial_asked_for() if _context is None else None
if _context is not None or _trial is not None:
    defer_compiler()
_session: Session | None = None
_local_model: Any = None
_local_optimizer: Any = None
"""a ``torch.optim.LBFGS``, if that was given"""
_stopped = False
"""without a launcher: whether this script has called :func:`stop`"""


def prepare(*objects: Any, plan: Plan | None = None) -> Any:
    """Make a script's model, optimizer and data loaders part of the job; returns them in the order given.

    Any of ``torch.nn.Module``, ``torch.optim.Optimizer`` and ``torch.utils.data.DataLoader`` may be given; at most
    one model and one optimizer, any number of loaders, the training loader first. One object is returned as itself,
    several as a tuple. Call it once, after the model is on its device.

    ``plan`` says how the model is split where a replica has several ranks (``--tensor``, ``--pipeline``); without it
    Downpour finds a way by itself.

    Under a launcher the model's parameters become views into flat vectors and take the job's weights, the
    optimizer's ``step`` pushes and pulls, and the loaders yield this worker's part of each pass. Without one, all
    are returned untouched.

    Raises :class:`downpour.ModelError` for what cannot be distributed, :class:`downpour.ModelMismatch` when this
    worker's model differs from the job's, :class:`downpour.PeerTimeout` when the job does not come together.
    """
    global _local_model, _local_optimizer
    from torch import nn
    from torch.optim import LBFGS, Optimizer
    from torch.utils.data import DataLoader

    models = [o for o in objects if isinstance(o, nn.Module)]
    optimizers = [o for o in objects if isinstance(o, Optimizer)]
    loaders = [o for o in objects if isinstance(o, DataLoader)]
    if len(models) + len(optimizers) + len(loaders) != len(objects) or len(models) > 1 or len(optimizers) > 1:
        kinds = ", ".join(type(o).__name__ for o in objects)
        raise ConfigError(
            "downpour.prepare takes at most one nn.Module, at most one torch.optim.Optimizer and any number of "
            f"DataLoaders; it was given: {kinds or 'nothing'}"
        )
    _local_model = models[0] if models else None
    _local_optimizer = optimizers[0] if optimizers and isinstance(optimizers[0], LBFGS) else None
    prepared: list[Any] = list(objects)
    new: Iterator[Any]
    if _context is not None:
        session = _join(_context)
        new = iter(session.prepare(_local_model, optimizers[0] if optimizers else None, loaders, plan))
        prepared = [next(new) if isinstance(o, DataLoader) else o for o in objects]
    elif _trial is not None:
        new = iter(measured(_trial, _local_model, optimizers[0] if optimizers else None, loaders))
        prepared = [next(new) if isinstance(o, DataLoader) else o for o in objects]
    return prepared[0] if len(prepared) == 1 else tuple(prepared)


def _join(context: WorkerContext) -> Session:
    global _session
    if _session is None:
        from downpour.session import Session
        from downpour_common import failpoints, wire
        from downpour_common.process import keep_freed_memory
        from downpour_common.transport.zeromq import ZmqClient

        failpoints.arm(f"worker/{context.slot}", context.worker_epoch)
        keep_freed_memory()
        _session = Session(context, ZmqClient(wire.CONTROL_HEADER_LIMIT, context.transport_keys()))
        _watch_the_end(_session)
    return _session


def _watch_the_end(session: Session) -> None:
    """Finish the session when the script ends, or report why it did not end well."""
    previous = sys.excepthook

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        told = session.fail(error, text)
        if told == text:
            previous(kind, error, trace)
        else:
            sys.stderr.write(told)

    sys.excepthook = on_exception
    atexit.register(_finish, session)


def _finish(session: Session) -> None:
    """At the script's end; what goes wrong here must not pass for success, as errors at exit otherwise do."""
    try:
        session.finish()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def log(**values: float) -> None:
    """Add scalars (numbers or one-element tensors) to the run's ``metrics.jsonl`` and progress, at this clock.

    Raises :class:`downpour.ConfigError` for what is not a number.
    """
    numbers = {name: _number(name, value) for name, value in values.items()}
    if _session is not None:
        _session.log(numbers)


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"downpour.log: {name} is not a number: {value!r:.60}") from None


def is_chief() -> bool:
    """Whether this is the worker with the lowest slot, which prints, evaluates and saves. True without a launcher.

    That is worker 0 for as long as it lives, then the next one.
    """
    if _session is not None:
        return _session.is_chief
    return _context is None or _context.is_chief


def rank() -> int:
    """This replica's number: 0 to ``world_size() - 1`` as long as none has left the job; 0 without a launcher.

    It is the worker's slot, unless ``--tensor`` or ``--pipeline`` make a replica of several workers.
    """
    return 0 if _context is None else _context.replica


def world_size() -> int:
    """The number of replicas, which changes when one joins or leaves; 1 without a launcher."""
    if _session is not None:
        return _session.workers
    return 1 if _context is None else _context.workers // _context.ranks


def forward_backward(model: nn.Module, criterion: Criterion, inputs: Any, targets: Any) -> torch.Tensor:
    """Forward and backward of one batch; returns the loss, detached, the same on all ranks of a replica.

    In place of ``loss = criterion(model(inputs), targets)`` and ``loss.backward()``. A model in pipeline stages needs
    it, because its micro-batches are under way forward and backward at the same time; with ``--microbatches`` and no
    pipeline it adds up the gradients of smaller batches. ``criterion(outputs, targets)`` gives the mean over the
    samples. ``inputs`` and ``targets`` are tensors, or tuples of them, with the samples along their first dimension.
    """
    if _session is not None:
        return _session.forward_backward(model, criterion, inputs, targets)
    from downpour.parallel.microbatch import microbatched

    return microbatched(model, criterion, inputs, targets, 1)


def minimize(
    model: nn.Module,
    criterion: Criterion,
    loader: DataLoader[Any],
    *,
    max_iterations: int | None = None,
    max_evaluations: int | None = None,
    tolerance_grad: float | None = None,
    tolerance_change: float | None = None,
    lr: float | None = None,
    history: int | None = None,
    weight_decay: float | None = None,
) -> Minimum:
    """Minimise the mean of ``criterion(outputs, targets)`` over all samples of ``loader``'s data set by L-BFGS with a
    strong Wolfe line search (``--mode lbfgs``, Sandblaster: Dean et al. 2012, section 4.2).

    In place of a training loop, after ``prepare(model, loader)``. All workers call it with the same arguments, compute
    small portions of the data, and get the same result; the model has the minimum's weights then. ``criterion`` gives
    the mean of a batch, which is of the loader's ``batch_size``; each sample counts once in each evaluation, so a
    sampler or ``shuffle`` does not. The loss must be the same whenever it is computed: no dropout, no random
    augmentation, batch norm in evaluation mode. Without a launcher ``torch.optim.LBFGS`` does the same alone.

    ``max_iterations`` (100); ``max_evaluations`` of the whole data (none); ``tolerance_grad`` (1e-5): end where no
    element of the gradient is larger; ``tolerance_change`` (1e-9): end where neither the loss nor any weight changes by
    more; ``lr`` (1): the step that each line search tries first; ``history`` (10): pairs of changes that are
    remembered; ``weight_decay`` w (0): adds ``w / 2 * |weights|²``. What is left out is taken from the
    ``torch.optim.LBFGS`` that ``prepare`` was given, if it was given one.

    Raises :class:`downpour.ConfigError` for another mode, other data, or other arguments than the other workers'.
    """
    from downpour.sandblaster import Data, Objective, Wishes, minimize_alone

    wishes = Wishes(max_iterations, max_evaluations, tolerance_grad, tolerance_change, lr, history, weight_decay)
    if _session is not None:
        return _session.minimize(model, criterion, loader, wishes)
    if _context is not None:
        raise ConfigError("downpour.minimize: call downpour.prepare(model, loader) first")
    return minimize_alone(Objective(model, criterion, Data(loader)), model, wishes, _local_optimizer)


def unsplit(model: nn.Module) -> nn.Module:
    """``model`` with the newest weights, as one worker can run it alone: itself, or a copy if it is split over ranks.

    For evaluation on the chief: ``if downpour.is_chief(): evaluate(downpour.unsplit(model))``. The copy needs the
    memory of the whole model. Without a launcher ``model`` is returned as it is. Raises
    :class:`downpour.ConfigError` for another model than the prepared one.
    """
    if _session is None:
        return model
    return _session.unsplit(model)


def seed() -> int:
    """The job's seed (``--seed``), the same in all workers; 0 without a launcher."""
    return 0 if _context is None else _context.seed


def clock() -> int:
    """Steps that this worker has completed, those before a resume included; 0 without a launcher."""
    return 0 if _session is None else _session.clock


def epoch() -> int:
    """Passes finished over the training loader, those before a resume included; 0 without a launcher."""
    return 0 if _session is None else _session.epoch


def device() -> torch.device:
    """The device for this worker's model: a CUDA device where there is one (``--device``), else the CPU.

    Raises :class:`downpour.ConfigError` when the job asks for CUDA and there is none.
    """
    import torch

    wanted = "auto" if _context is None else _context.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device in this process")
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", (0 if _context is None else _context.slot) % torch.cuda.device_count())
    return torch.device("cpu")


def pull() -> None:
    """Fetch the newest weights into the model now; before an evaluation, say."""
    if _session is not None:
        _session.pull()


def push(samples: int = 1) -> None:
    """Send the gradients at hand as one contribution of ``samples`` samples, and return once it is accepted.

    With :func:`pull`, for loops of another shape than forward, backward, step: reinforcement learning, replay, rules of
    your own. Weights stay as they are until the next :func:`pull`. Raises :class:`downpour.NonFiniteContribution`.
    """
    if _session is not None:
        _session.push(samples)


def barrier() -> None:
    """Wait until every live worker has come here."""
    if _session is not None:
        _session.barrier()


def add_samples(count: int) -> None:
    """Say that the gradient of the step to come is of ``count`` more samples, for scripts without a prepared loader.

    Call it before ``optimizer.step()``. The job's throughput and progress count them, and ``sync`` weighs the workers'
    gradients by them; a step that nothing is said of weighs as one sample and counts as none. :func:`push` is told
    with its call. Raises :class:`downpour.ConfigError` for less than one sample.
    """
    if count < 1:
        raise ConfigError(f"downpour.add_samples: {count} is not a number of samples")
    if _session is not None:
        _session.add_samples(int(count))


def version() -> int:
    """How many updates the servers had made to the weights that this worker computes on; 0 without a launcher.

    Each chunk of the model counts its updates (in ``async`` and ``ssp`` one per worker's contribution, in ``sync`` one
    per round); of these counts it is the least. It changes when weights are fetched. What was made with the weights of
    version ``v``, and is learned from in a step after which the version is ``w``, was ``w - 1 - v`` updates old: the
    *policy lag* of reinforcement learning. A server that comes back from a checkpoint counts on from there.
    """
    return 0 if _session is None else _session.version


def stop(reason: str = "") -> None:
    """Say that the training is done: :func:`should_stop` is true from now on, soon in all workers.

    For scripts that end when a goal is reached and not after so many steps. Each worker leaves its loop where it asks
    :func:`should_stop`, at a step of its own, and the job ends well when all scripts have ended. ``reason`` is written
    to the run's ``metrics.jsonl``.
    """
    global _stopped
    if _session is not None:
        _session.stop(reason)
    else:
        _stopped = True


def should_stop() -> bool:
    """Whether this worker is to end (Ctrl-C, cancel, SIGTERM, :func:`stop`); a script may leave its loop and end well.

    After SIGTERM the worker leaves the job by itself at the end of the step: the script is ended by
    ``SystemExit``, with its ``finally`` blocks run.
    """
    return _stopped or (_session is not None and _session.should_stop())


def save(path: str) -> None:
    """Write the newest weights as a safetensors file with the state dict's names; only the chief does."""
    if _session is not None:
        _session.save(path)
        return
    if _local_model is None:
        raise ConfigError("downpour.save needs a model; give one to downpour.prepare")
    from downpour.files import save_state_dict

    save_state_dict(_local_model, path)
