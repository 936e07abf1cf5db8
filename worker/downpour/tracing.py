"""A traced worker's telling: what :mod:`downpour.spans` has recorded goes to the coordinator, a batch at a time.

Nothing here waits while the script trains. One batch is under way at a time; while the coordinator is away, spans
pile up in their buffer, and once that is full they are dropped and counted. docs/tracing.md describes what is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from downpour import spans
from downpour.client.core import Ticket
from downpour.space import local
from downpour_common.messages import Ack, Request

if TYPE_CHECKING:
    from downpour.context import WorkerContext
    from downpour.control import Control

VERSION = 1
BATCH_ROWS = 4096
"""Most spans in a batch."""
ENOUGH_ROWS = 1024
"""As many are sent at once …"""
EVERY_S = 0.5
"""… and fewer after so long."""
LAST_S = 10.0
"""How long the end of the script waits for its last spans to be noted."""
_BOOT = "/proc/sys/kernel/random/boot_id"


class Tracer:
    """Records from now on. For the training thread, but for what answers do."""

    def __init__(self, control: Control, context: WorkerContext) -> None:
        self.recorder = spans.start()
        self._control = control
        self._context = context
        self._born_ns = time.monotonic_ns()
        self._sent_ns = 0
        self._number = 0
        self._under_way: Ticket | None = None
        self._clock: tuple[int, int] | None = None
        """what to add to this host's clock to have the coordinator's, and the round trip it was measured with"""
        self._sizes: dict[str, int] = {}
        self._host = host_name()
        self._place = place_of(context)
        self._threads = {threading.get_ident(): 0}
        self._send({})

    def watch(self, model: nn.Module, holds: bool, computes: bool) -> None:
        """``holds``: the parameters stay here all the time, and their bytes are told. ``computes``: the script calls
        the model, and forward and backward are found by hooks."""
        if holds:
            held = [p for p in model.parameters() if p.device.type != "meta"]
            self._sizes["weights"] = sum(local(p).nbytes for p in held)
            self._sizes["gradients"] = sum(local(p).nbytes for p in held if p.requires_grad)
        if not computes:
            return
        _Watch(model.children() if isinstance(model, (nn.ModuleDict, nn.ModuleList)) else [model])

    def stepped(self, steps: int, moved: Mapping[str, int]) -> None:
        """So many steps are done; ``moved``: bytes ``pushed`` and ``pulled`` since the start. Sends what is due."""
        spans.stepped(steps)
        due = time.monotonic_ns() - self._sent_ns > EVERY_S * 1e9
        if (due or len(self.recorder) >= ENOUGH_ROWS) and self._may_send():
            self._send(moved)

    def finish(self, moved: Mapping[str, int]) -> None:
        """Record no more; wait for what there is to be noted, but not for long."""
        spans.stop()
        until_ns = time.monotonic_ns() + int(LAST_S * 1e9)
        last = False
        while not last:
            left_s = (until_ns - time.monotonic_ns()) / 1e9
            if self._under_way is not None and not self._under_way.settled(max(0.0, left_s)):
                return
            if not self._may_send():
                return
            last = len(self.recorder) <= BATCH_ROWS
            self._send(moved)
        if self._under_way is not None:
            self._under_way.settled(max(0.0, (until_ns - time.monotonic_ns()) / 1e9))

    def fail(self) -> None:
        """The script has raised: send what is at hand, and do not wait for anything."""
        spans.stop()
        if self._may_send():
            self._send({})

    def _may_send(self) -> bool:
        if self._under_way is None or not self._under_way.settled():
            return self._under_way is None
        if self._under_way.error is not None:  # refused: the coordinator has enough, or cannot write
            spans.stop()
            return False
        return True

    def _send(self, moved: Mapping[str, int]) -> None:
        said_ns = self._sent_ns = time.monotonic_ns()

        def noted(answer: Request) -> None:
            heard_ns = time.monotonic_ns()
            if isinstance(answer, Ack):
                self._compare(answer.version - (said_ns + heard_ns) // 2, heard_ns - said_ns)

        self._under_way = Ticket(1, noted)
        self._control.spans(json.dumps(self._batch(moved), separators=(",", ":")).encode(), self._under_way)
        self._number += 1

    def _compare(self, offset_ns: int, round_trip_ns: int) -> None:
        if self._clock is None or round_trip_ns < self._clock[1]:
            self._clock = offset_ns, round_trip_ns

    def _batch(self, moved: Mapping[str, int]) -> dict[str, Any]:
        c, recorder = self._context, self.recorder
        sizes = self._sizes | recorder.peaks
        sizes["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_initialized():
            sizes["peak_cuda"] = torch.cuda.max_memory_allocated()
        return {
            "version": VERSION,
            "job": c.job,
            "worker": c.slot,
            "epoch": c.worker_epoch,
            "host": self._host,
            "born_ns": self._born_ns,
            "number": self._number,
            "clock": self._clock,
            "place": self._place,
            "dropped": recorder.dropped,
            "sizes": sizes,
            "moved": dict(moved),
            "spans": [self._row(row) for row in recorder.take(BATCH_ROWS)],
        }

    def _row(self, row: spans.Row) -> list[Any]:
        name, begin_ns, end_ns, thread, step, facts = row
        number = self._threads.setdefault(thread, len(self._threads))
        return [name, begin_ns, end_ns - begin_ns, number, step, *([facts] if facts else [])]


class _Watch:
    """Forward and backward of modules that the script calls, one after the other.

    Backward begins when the gradient of an output is known and ends with the engine's work, the last gradient of a
    parameter. While torch compiles a module nothing is put into it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._begun_ns = 0
        self._backward_ns = 0
        self._thread = 0
        for module in modules:
            module.register_forward_pre_hook(self._begins)
            module.register_forward_hook(self._ends)

    def _begins(self, _module: nn.Module, _inputs: object) -> None:
        if not torch.compiler.is_compiling():
            self._begun_ns = time.monotonic_ns()

    def _ends(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or not spans.recording():
            return
        learns = torch.is_grad_enabled()
        spans.record("forward" if learns else "evaluate", self._begun_ns, time.monotonic_ns())
        if learns:
            self._thread = threading.get_ident()
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward_begins)

    def _backward_begins(self, _gradient: torch.Tensor) -> None:
        if not self._backward_ns:
            self._backward_ns = time.monotonic_ns()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        begun_ns, self._backward_ns = self._backward_ns, 0
        spans.record("backward", begun_ns, time.monotonic_ns(), self._thread)


def host_name() -> str:
    """The same for all processes that share a monotonic clock, and for no others."""
    try:
        with open(_BOOT, encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = f"{os.uname().nodename} {os.getpid()}"
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def place_of(context: WorkerContext) -> dict[str, Any]:
    """Where a worker stands in its replica, and what that is."""
    place: dict[str, Any] = {"replica": context.replica, "rank": context.rank, "ranks": context.ranks}
    if context.ranks > 1:
        place |= {"stage": context.place.stage, "tensor_rank": context.place.tensor_rank}
    if len(context.widths) > 1:
        place |= {
            "stages": len(context.widths),
            "microbatches": context.parts,
            "schedule": context.schedule,
            "interleave": context.interleave,
        }
    return place


def _tensors(value: object) -> list[torch.Tensor]:
    match value:
        case torch.Tensor():
            return [value]
        case Mapping():
            return [tensor for item in value.values() for tensor in _tensors(item)]
        case list() | tuple():
            return [tensor for item in value for tensor in _tensors(item)]
        case _:
            return []
