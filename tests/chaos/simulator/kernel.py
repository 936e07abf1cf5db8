"""Virtual time, and processes that wait in it: greenlets, of which one runs at a time until it waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

import torch
from greenlet import GreenletExit, getcurrent, greenlet

Action = Callable[[], None]


class Hub:
    """Runs actions in the order of their time, and of their making where that is the same."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.steps = 0
        self._queue: list[tuple[float, int, Action]] = []
        self._numbers = count()
        self.greenlet = getcurrent()

    def at(self, when_s: float, action: Action) -> None:
        """Do something at a time, now at the earliest."""
        heapq.heappush(self._queue, (max(when_s, self.now_s), next(self._numbers), action))

    def after(self, delay_s: float, action: Action) -> None:
        """Do something a while from now."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), action))

    def step(self) -> bool:
        """One action; False when there is none left."""
        if not self._queue:
            return False
        self.now_s, _, action = heapq.heappop(self._queue)
        self.steps += 1
        action()
        return True


class Task:
    """One process' thread. ``grad``: whether torch records gradients in it."""

    def __init__(self, hub: Hub, name: str, run: Action, grad: bool) -> None:
        self.name = name
        self.alive = True
        self.waiting = False
        self.stopped_until_s = 0.0
        """while it is stopped (SIGSTOP) it gets no turn"""
        self._hub = hub
        self._grad = grad
        self._wait = 0
        self._run = run
        self._greenlet = greenlet(self._main, hub.greenlet)

    def start(self) -> None:
        """Run it until it waits for the first time."""
        self.waiting = True
        self._resume(self._wait)

    def sleep(self, until_s: float) -> None:
        """Called within it: wait until then, or until :meth:`wake`."""
        self.check()
        self._wait += 1
        wait = self._wait
        self._hub.at(until_s, lambda: self._resume(wait))
        self.waiting = True
        self._hub.greenlet.switch()
        self.check()

    def pause(self, until_s: float) -> None:
        """Called within it: wait until then, whatever comes."""
        while self._hub.now_s < until_s:
            self.sleep(until_s)

    def wake(self) -> None:
        """It has something to look at."""
        if self.waiting and self.alive:
            self.waiting = False
            wait = self._wait
            self._hub.at(self._hub.now_s, lambda: self._go(wait))

    def check(self) -> None:
        """End here if it has been killed."""
        if not self.alive:
            raise GreenletExit

    def kill(self) -> None:
        """SIGKILL: it gets no further."""
        if not self.alive:
            return
        self.alive = False
        if self._greenlet is getcurrent():
            raise GreenletExit
        if self._greenlet:
            self._switch(throw=True)

    def _main(self) -> None:
        self._run()

    def _resume(self, wait: int) -> None:
        if self.waiting:
            self._go(wait)

    def _go(self, wait: int) -> None:
        if wait != self._wait or not self.alive:
            return
        if self._hub.now_s < self.stopped_until_s:
            self._hub.at(self.stopped_until_s, lambda: self._go(wait))
            return
        self.waiting = False
        self._switch()

    def _switch(self, throw: bool = False) -> None:
        torch._C._set_grad_enabled(self._grad)
        try:
            if throw:
                self._greenlet.throw(GreenletExit)
            else:
                self._greenlet.switch()
        finally:
            self._grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)


class Clock:
    """Takes the place of the module ``time``."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._hub.now_s

    perf_counter = monotonic
    time = monotonic
