"""Puts virtual time, threads and files in the place of real ones, in production modules, while a world lasts."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

from greenlet import GreenletExit

from downpour_common import failpoints
from downpour_common.quick_start import defer_compiler
from simulator.disk import Disk
from simulator.kernel import Clock, Hub

WITH_TIME = ("downpour.client.thread", "downpour.control", "downpour.session", "downpour.engine")
WITH_FILES = ("downpour_common.", "downpour_server.", "downpour_coordinator.")
PLAIN = ("environ", "cpu_count", "sched_getaffinity", "fspath", "strerror", "PathLike")
NEEDED = (
    *WITH_TIME,
    "downpour_server.service",
    "downpour_server.restore",
    "downpour_coordinator.service",
    "downpour_coordinator.export",
)


class FakeThread:
    """A thread that does nothing until it is joined, when it does what is left of its work."""

    def __init__(self, target: Callable[[], None], **_: Any) -> None:
        self._target = target
        self._done = False

    def start(self) -> None:
        """Whoever attends does its work."""

    def join(self, timeout: float | None = None) -> None:
        """Its last words."""
        if not self._done:
            self._done = True
            self._target()


class FakeShield:
    """Nobody presses Ctrl-C here."""

    struck = False

    def __enter__(self) -> FakeShield:
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        pass


class FakeFuture:
    """Work that has been done."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._error: Exception | None = None
        self._result: Any = None
        try:
            self._result = work(*arguments)
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        """See the interface."""
        return True

    def result(self) -> Any:
        """See the interface."""
        if self._error is not None:
            raise self._error
        return self._result


class FakeExecutor:
    """Does what it is given at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> FakeFuture:
        """See the interface."""
        return FakeFuture(work, arguments)

    def shutdown(self, **_: Any) -> None:
        """See the interface."""

    def __enter__(self) -> FakeExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Files:
    """``os``, as far as it is about files of the simulated disk. Anything else is a gap in the simulator."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk.os

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._disk, name):
            return getattr(self._disk, name)
        if name in PLAIN or name.startswith("O_"):
            return getattr(os, name)
        raise AttributeError(f"the simulated disk has no os.{name}")


class Patches:
    """What was there before, to be put back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Replace an attribute, or add one."""
        self._before.append((target, name, target.__dict__.get(name, self)))
        setattr(target, name, value)

    def undo(self) -> None:
        """As it was."""
        for target, name, value in reversed(self._before):
            if value is self:
                delattr(target, name)
            else:
                setattr(target, name, value)
        self._before.clear()


def _unraisable(problem: Any) -> None:
    """A generator of a process that was killed ends by what kills it again."""
    if not isinstance(problem.exc_value, GreenletExit):
        sys.__unraisablehook__(problem)


@cache
def _places() -> list[tuple[ModuleType, str]]:
    """Where production modules know of files."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith(WITH_FILES):
            here = [a for a in ("os", "shutil", "mmap") if isinstance(getattr(module, a, None), ModuleType)]
            if isinstance(getattr(module, "ThreadPoolExecutor", None), type):
                here.append("ThreadPoolExecutor")
            found += [(module, attribute) for attribute in (*here, *(("open",) if here else ()))]
    return found


@contextmanager
def simulated(hub: Hub, disk: Disk, hit: Callable[[str], None]) -> Iterator[None]:
    """See the module. ``hit`` is told of failpoints."""
    defer_compiler()
    for name in NEEDED:
        importlib.import_module(name)
    patches, files, clock = Patches(), _Files(disk), Clock(hub)
    for name in WITH_TIME:
        module = importlib.import_module(name)
        if hasattr(module, "time"):
            patches.set(module, "time", clock)
    values = {
        "os": files,
        "shutil": disk.shutil,
        "mmap": disk.mmap,
        "open": disk.open,
        "ThreadPoolExecutor": FakeExecutor,
    }
    for module, attribute in _places():
        patches.set(module, attribute, values[attribute])
    thread = importlib.import_module("downpour.client.thread")
    real = thread.threading
    patches.set(thread, "threading", SimpleNamespace(Thread=FakeThread, Lock=real.Lock, Event=real.Event))
    patches.set(thread, "Shield", FakeShield)
    patches.set(importlib.import_module("downpour_server.service"), "IDLE_S", 0.25)
    patches.set(sys, "unraisablehook", _unraisable)
    patches.set(failpoints, "hit", hit)
    patches.set(failpoints, "on", True)
    try:
        yield
    finally:
        patches.undo()
