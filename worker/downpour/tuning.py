"""What ``downpour tune`` has a script do: take some steps with another batch size, tell what they cost, and end.

The script runs without servers. :func:`measured` stands in for what ``prepare`` does under a launcher: the first loader
gets the batch size, the optimizer's steps are timed, and after enough of them the script is ended by ``SystemExit``,
with its ``finally`` blocks run. What was found is in a file, which is whole at any time.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from downpour.context import Autocast
from downpour_common.errors import ConfigError, DownpourError
from downpour_common.process import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

VARIABLE = "DOWNPOUR_TUNE"
MOST_STEPS = 1000
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Trial:
    """One batch size. After ``warmup`` steps, ``steps`` are timed at least, for ``seconds`` at least, and told in the
    file ``report``."""

    batch_size: int
    warmup: int
    steps: int
    seconds: float
    report: str
    autocast: Autocast = "off"
    activation_checkpointing: bool = False

    def to_environment(self) -> dict[str, str]:
        """The variables to start the script with."""
        return {VARIABLE: json.dumps(asdict(self))}


@dataclass(slots=True)
class Report:
    """What is known so far. Bytes are of the process' memory, or of its GPU's, if the model is on one."""

    device: str = "cpu"
    own_batch_size: int = 0
    """what the script asks for"""
    samples: int = 0
    """in the data set; 0: it does not say"""
    capacity_bytes: int = 0
    """that there are, for this process; 0: unknown"""
    baseline_bytes: int = 0
    """when prepare was called"""
    peak_bytes: int = 0
    step_s: list[float] = field(default_factory=list)
    step_samples: list[int] = field(default_factory=list)
    steps: int = 0
    """taken, those before the timed ones included"""
    problem: str = ""
    """why there is no more; empty: enough"""


def trial_asked_for(environment: Mapping[str, str] = os.environ) -> Trial | None:
    """What ``downpour tune`` wants of this process, if it has started it. Raises :class:`ConfigError`."""
    text = environment.get(VARIABLE)
    if not text:
        return None
    try:
        return Trial(**cast(dict[str, Any], json.loads(text)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{VARIABLE} was not set by this version of downpour: {error}") from None


def read_report(path: str) -> Report | None:
    """What a trial has told; None: nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            return Report(**json.load(file))
    except FileNotFoundError:
        return None


class Meter:
    """Times one process' steps and looks at its memory."""

    def __init__(self, trial: Trial, device: torch.device) -> None:
        self.report = Report(device.type, problem="the script ended before it had taken enough steps")
        self.trial = trial
        self._device = device
        self._taken = 0
        self._last_s = 0.0
        self._closed = False
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self.report.baseline_bytes = torch.cuda.memory_allocated(device)
            self.report.capacity_bytes = torch.cuda.mem_get_info(device)[1]
        else:
            import torch._dynamo  # which an optimizer's own first step loads, and which is not the steps' memory

            _forget_peak()
            self.report.baseline_bytes = _own_memory("VmRSS")
            self.report.capacity_bytes = _available() + self.report.baseline_bytes

    def took(self, samples: int) -> None:
        """The script has been given so many samples."""
        self._taken += samples

    def stepped(self, *_: object) -> None:
        """After each step of the optimizer. Ends the script after the last one."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        now_s = time.perf_counter()
        self.report.steps += 1
        if self.report.steps > self.trial.warmup:
            self.report.step_s.append(now_s - self._last_s)
            self.report.step_samples.append(self._taken)
            if self._enough():
                self.report.problem = ""
                self.close()
                raise SystemExit(0)
        self._taken = 0
        self._last_s = time.perf_counter()

    def _enough(self) -> bool:
        timed = self.report.step_s
        return len(timed) >= self.trial.steps and (sum(timed) >= self.trial.seconds or len(timed) >= MOST_STEPS)

    def close(self, problem: str = "") -> None:
        """Write the report; later calls change nothing."""
        if self._closed:
            return
        self._closed = True
        if problem:
            self.report.problem = problem
        if self._device.type == "cuda":
            import torch

            self.report.peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self.report.peak_bytes = _own_memory("VmHWM")
        write_report(self.trial.report, self.report)


def write_report(path: str, report: Report) -> None:
    """Put it there as a whole."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(asdict(report), file)
    os.replace(path + ".new", path)


def measured(
    trial: Trial, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, loaders: list[DataLoader[Any]]
) -> list[DataLoader[Any]]:
    """Have the script measured from here on; the loaders that it is to use. Raises :class:`ConfigError`."""
    keep_freed_memory()  # as in a job
    try:
        if optimizer is None or not loaders:
            what = "optimizer" if optimizer is None else "DataLoader"
            raise ConfigError(f"downpour tune: give downpour.prepare the {what}, which it watches")
        meter = Meter(trial, _device_of(model, optimizer))
        resized = _resized(loaders[0], meter)
    except ConfigError as error:
        write_report(trial.report, Report(problem=str(error)))
        raise
    if meter.report.samples and meter.report.samples < trial.batch_size:
        meter.close(f"the data set has {meter.report.samples} samples")
        raise SystemExit(0)
    _watch_the_end(meter)
    if model is not None:
        from downpour.lighter import Lighter

        Lighter(model, trial.autocast, trial.activation_checkpointing).apply([model], _device_of(model, optimizer))
    optimizer.register_step_post_hook(meter.stepped)
    return [resized, *loaders[1:]]


def _watch_the_end(meter: Meter) -> None:
    previous = sys.excepthook

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = str(error) if isinstance(error, DownpourError) else f"{kind.__name__}: {error}"
        meter.close(OUT_OF_MEMORY if _is_out_of_memory(error) else said)
        previous(kind, error, trace)

    sys.excepthook = on_exception
    atexit.register(meter.close)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    said = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in said or "not enough memory" in said


def _device_of(model: nn.Module | None, optimizer: torch.optim.Optimizer) -> torch.device:
    import torch

    parameters = list(model.parameters()) if model is not None else []
    parameters += [p for group in optimizer.param_groups for p in group["params"]]
    return next((p.device for p in parameters), torch.device("cpu"))


def _resized(loader: DataLoader[Any], meter: Meter) -> DataLoader[Any]:
    """``loader`` with the trial's batch size. It begins anew by itself while the script trains, so that a small data
    set does not end the measurement, and has full batches only."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    size = meter.trial.batch_size
    if loader.batch_size is None:
        raise ConfigError(
            "downpour tune: the training loader has a batch_sampler of its own, or no batches; give it a batch_size"
        )

    class Resized(DataLoader[Any]):
        """See :func:`_resized`."""

        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            while True:
                steps = meter.report.steps
                for batch in super().__iter__():
                    meter.took(size)
                    yield batch
                if meter.report.steps == steps or not torch.is_grad_enabled():
                    return  # nobody trains

        def __len__(self) -> int:
            return max(super().__len__(), meter.trial.warmup + meter.trial.steps)

    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    if not isinstance(loader.dataset, IterableDataset):
        workers["sampler"] = loader.sampler
        if isinstance(loader.sampler, Sized):
            meter.report.samples = len(loader.sampler)
    meter.report.own_batch_size = loader.batch_size
    return Resized(
        loader.dataset,
        batch_size=size,
        drop_last=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **workers,
    )


# ---------------------------------------------------------------- this process' memory


def _own_memory(kind: str) -> int:
    """``VmRSS``: bytes in memory now; ``VmHWM``: at most so far. 0 where nobody knows."""
    return _kibibytes("/proc/self/status", kind)


def _available() -> int:
    return _kibibytes("/proc/meminfo", "MemAvailable")


def _kibibytes(path: str, name: str) -> int:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(name + ":")), 0)
    except OSError:
        return 0


def _forget_peak() -> None:
    """What reading the data took before is not of the steps. Where this is not allowed, it counts."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass
