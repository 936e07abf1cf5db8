"""``easgd:h``: elastic averaging SGD (Zhang, Choromanska, LeCun 2015, algorithm 1), and EAMSGD (algorithm 2).

Each worker i has weights x_i of its own, tied to the servers' *centre* by a spring. Every h steps, without waiting for
any other worker::

    d = alpha (x_i - A)        x_i = x_i - d        A = A + d

``momentum`` mu: Nesterov momentum on the local steps. The paper's u is the change by plain SGD at x + mu v; here it is
whatever the script's optimizer makes of its gradient, and the model's parameters hold y = x + mu v, where gradients are
wanted. In y, as in torch's SGD with ``nesterov=True``::

    v = mu v + u        y = y + u + mu v

The spring pulls at x = y - mu v.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from downpour.local.engine import LocalEngine
from downpour.spans import span
from downpour_common import failpoints
from downpour_common.errors import NonFiniteContribution
from downpour_common.modes import Mode

BETA = 0.9
"""alpha times the number of workers, where alpha is not given: as in the paper's experiments."""


def outer(_mode: Mode) -> dict[str, Any]:
    """Options of the servers' SGD: the centre goes where it is pulled."""
    return {"lr": 1.0, "momentum": 0.0, "nesterov": False}


class EasgdEngine(LocalEngine):
    """See the module.

    :meth:`pull` shows the centre, which is what is evaluated and saved; the worker's own weights are kept beside, and
    are back as soon as the model is trained on: at the next forward in training mode with gradients on, at
    ``zero_grad`` or at ``step``.
    """

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._momentum = self._job.mode.option("momentum")
        self._own = {i: torch.empty_like(flat) for i, flat in self._space.weights.items()}
        """room for this worker's weights while the model holds the centre"""
        self._shows_centre = False
        self._velocity = {i: torch.zeros_like(flat) for i, flat in self._own.items()} if self._momentum else {}
        self._since = 0
        """samples since the last exchange"""
        self._done = 0

    def watch(self, model: nn.Module) -> None:
        """See :class:`LocalEngine`."""

        def before_forward(module: nn.Module, _inputs: object) -> None:
            if module.training and torch.is_grad_enabled():
                self.resume()

        model.register_forward_pre_hook(before_forward)

    def advance(self, local_step: Callable[[], None]) -> None:
        """See :class:`LocalEngine`."""
        for i, velocity in self._velocity.items():
            velocity.mul_(self._momentum).sub_(self._space.weights[i])
        local_step()
        for i, velocity in self._velocity.items():
            velocity.add_(self._space.weights[i])
            self._space.weights[i].add_(velocity, alpha=self._momentum)

    def stepped(self, samples: int) -> None:
        """See :class:`LocalEngine`."""
        self._done += 1
        self._since += samples
        if self._done % self._every == 0:
            self._exchange()

    def flush(self) -> None:
        """Exchange once more, unless nothing has been done since."""
        self.resume()
        if self._since:
            self._exchange()

    def pull(self) -> None:
        """Have the model show the centre, as it is now. Before its first step a worker begins there."""
        if self._done and not self._shows_centre:
            self._put_aside()
        super().pull()

    def resume(self) -> None:
        """See :class:`LocalEngine`."""
        if self._shows_centre:
            self._shows_centre = False
            for i, flat in self._space.weights.items():
                flat.copy_(self._own[i])

    def _put_aside(self) -> None:
        self._shows_centre = True
        for i, flat in self._space.weights.items():
            self._own[i].copy_(flat)

    @property
    def _alpha(self) -> float:
        return self._job.mode.option("alpha") or BETA / self._job.workers()

    def _exchange(self) -> None:
        if failpoints.on:
            failpoints.hit("worker.push.before")
        self._put_aside()
        super().pull()
        started_s = time.perf_counter()
        for i, centre in self._space.weights.items():
            change = torch.sub(centre, self._own[i], out=self._space.gradients[i])
            if i in self._velocity:
                change.add_(self._velocity[i], alpha=self._momentum)
            change.mul_(self._alpha)
            self._own[i].add_(change)
        self.resume()
        try:
            with span("push"):
                out = self._staging.outgoing(self._chunks, self._space.gradients)
                header = self._header_with(self._seq, max(1, self._since))
                self._client.push([chunk for ready in out for chunk in ready], header)
        except NonFiniteContribution as error:
            raise self._named(error) from None
        self._seq += 1
        self._since = 0
        self._space.zero_gradients()
        self.counters.pushes += 1
        self.counters.wait_s += time.perf_counter() - started_s
        if failpoints.on:
            failpoints.hit("worker.push.after")
