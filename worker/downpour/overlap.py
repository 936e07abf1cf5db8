"""Chunks leave while backward still computes the others, and no result ever changes.

A chunk is complete when each of its parameters has got its gradient as often in this step as in the step before (more
than once with gradient accumulation, not at all where a branch is not used). Its payload then goes to its shard, which
keeps it (:class:`downpour_common.messages.Stage`). That is a guess and nothing more: ``step`` compares what was sent
with the gradient that is to be pushed, and pushes what differs as if nothing had been sent. Where most of it differs,
because the script clips or scales, and where steps do not become shorter, because no core or link is idle meanwhile, it
is left alone for a while, and for longer each time.
"""

from __future__ import annotations

import threading
from collections.abc import Set
from functools import partial

import torch

from downpour.client.parameters import ParameterClient
from downpour.space import FlatSpace
from downpour.staging import Staging
from downpour.trial import Trial


class Overlap:
    """Watches the gradients of one worker; hooks run wherever backward runs them."""

    def __init__(self, space: FlatSpace, staging: Staging, client: ParameterClient) -> None:
        self._staging = staging
        self._client = client
        self._lock = threading.Lock()
        parameters = space.watched
        self._gradients = [gradient for _, gradient, _ in parameters]
        self._chunks = {c.index: c for _, _, chunks in parameters for c in chunks if client.sends(c)}
        self._within = [[c.index for c in chunks if c.index in self._chunks] for _, _, chunks in parameters]
        self._expected = [0] * len(parameters)
        """gradients that each parameter got in the last step"""
        self._awaited: dict[int, int] = {}
        """by chunk: parameters of it that get any"""
        self._fired = [0] * len(parameters)
        self._missing: dict[int, int] = {}
        self._trial = Trial()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, index))
            for index, (parameter, _, _) in enumerate(parameters)
            if self._within[index]
        ]

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def settle(self) -> Set[int]:
        """Backward is over: the chunks whose host memory is what the gradient is now. What else was sent is forgotten.

        What the parameters got is what they are expected to get in the next step.
        """
        current = self._staging.confirm()
        self._client.ahead.keep(current)
        with self._lock:
            if self._fired != self._expected:
                self._expected = self._fired
                self._awaited = dict.fromkeys(self._chunks, 0)
                for fires, within in zip(self._expected, self._within, strict=True):
                    for chunk in within if fires else ():
                        self._awaited[chunk] += 1
            self._begin()
        return current

    def judge(self, now_s: float) -> None:
        """The step is over, at ``now_s``: whether that was of use."""
        outcome = self._client.ahead.new_outcome()
        futile = 2 * outcome.wasted > outcome.settled
        self._trial.ended(now_s, "futile" if futile else "done" if outcome.settled else "none")

    def forget(self) -> None:
        """The gradients begin anew, or are used in another way: nothing of what was sent counts."""
        self._staging.forget()
        self._client.ahead.keep(frozenset())
        with self._lock:
            self._begin()

    def _begin(self) -> None:
        self._fired = [0] * len(self._expected)
        self._missing = dict(self._awaited)

    def _on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """One more gradient has been added to a parameter's."""
        with self._lock:
            self._fired[index] += 1
            if not self._trial.on or self._fired[index] != self._expected[index]:
                return
            if parameter.grad is not self._gradients[index]:
                return  # a tensor of the script's own: it is copied in step
            for chunk in self._within[index]:
                self._missing[chunk] -= 1
                if self._missing[chunk] == 0:
                    self._staging.bring(self._chunks[chunk])
            self._client.stage(self._staging.brought())
