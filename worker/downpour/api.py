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

    from downpour.parallel.microbatch import Criterion
    from downpour.parallel.plan import Plan
    from downpour.session import Session

_context: WorkerContext | None = from_environment()
_trial: Trial | None = trial_asked_for() if _context is None else None
if _context is not None or _trial is not None:
    defer_compiler()
_session: Session | None = None
_local_model: Any = None


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
    global _local_model
    from torch import nn
    from torch.optim import Optimizer
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


def should_stop() -> bool:
    """Whether this worker is to end (Ctrl-C, cancel, SIGTERM); a script may then leave its loop and end well.

    After SIGTERM the worker leaves the job by itself at the end of the step: the script is ended by
    ``SystemExit``, with its ``finally`` blocks run.
    """
    return _session is not None and _session.should_stop()


def save(path: str) -> None:
    """Write the newest weights as a safetensors file with the state dict's names; only the chief does."""
    if _session is not None:
        _session.save(path)
        return
    if _local_model is None:
        raise ConfigError("downpour.save needs a model; give one to downpour.prepare")
    from downpour.files import save_state_dict

    save_state_dict(_local_model, path)
