"""Steps of a worker that trains on weights of its own: what all such modes have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from downpour.client.parameters import ParameterClient, PushHeader
from downpour.engine import Engine
from downpour.space import FlatSpace
from downpour.staging import Staging
from downpour_common.errors import ConfigError, NonFiniteContribution
from downpour_common.modes import Mode


@dataclass(frozen=True, slots=True)
class LocalJob:
    """What the mode's engine is to know of the job.

    ``workers``: replicas at the moment. ``agreed``: of a number that every rank of the replica has, the greatest.
    ``leave_point``: see :meth:`downpour.client.thread.ClientThread.wait`. ``skips``: steps whose gradient holds NaN or
    Inf are left out.
    """

    mode: Mode
    workers: Callable[[], int]
    agreed: Callable[[int], int]
    leave_point: Callable[[], None]
    skips: bool


class LocalEngine(Engine, ABC):
    """As :class:`Engine`, with the script's optimizer taking every step here, and an exchange every ``h`` steps.

    After an exchange the gradients at hand are zero: what was pushed has been in their memory.
    """

    def __init__(
        self,
        job: LocalJob,
        space: FlatSpace,
        staging: Staging,
        client: ParameterClient,
        optimizer: torch.optim.Optimizer,
        clock: int,
        first_seq: int,
        position: Callable[[], tuple[int, ...]],
    ) -> None:
        super().__init__(space, staging, client, optimizer, (1, 1), clock, first_seq, position)
        self._job = job
        self._every = job.mode.every

    # ------------------------------------------------------------ of the mode

    @abstractmethod
    def stepped(self, samples: int) -> None:
        """A local step is complete, which saw so many samples, none if it was skipped: exchange if it is time."""

    def advance(self, local_step: Callable[[], None]) -> None:
        """Take a local step."""
        local_step()

    def resume(self) -> None:
        """The model is going to be trained on: it must hold this worker's own weights."""

    def watch(self, model: nn.Module) -> None:
        """``model`` is what is trained."""

    # ------------------------------------------------------------ see Engine

    def step(self, local_step: Callable[[], None], skipped: bool = False) -> None:
        """See :class:`Engine`."""
        self.resume()
        samples, self._new_samples = max(1, self._new_samples), 0
        self._space.gather_gradients()
        if skipped or (self._job.skips and self._not_finite()):
            samples = 0
        else:
            self.advance(local_step)
        self.stepped(samples)
        self.counters.clock += 1

    def zero_gradients(self) -> None:
        """See :class:`Engine`."""
        self.resume()
        super().zero_gradients()

    def overlap(self) -> None:
        """See :class:`Engine`; gradients do not travel."""

    def round_is(self, number: int) -> None:
        """See :class:`Engine`; numbers are not those of steps."""

    def push(self, samples: int) -> None:  # noqa: ARG002
        """There is nothing that it could mean. Raises :class:`ConfigError`."""
        raise ConfigError(
            f"downpour.push sends gradients, and in mode {self._job.mode} workers exchange weights after local steps: "
            "call optimizer.step(), or choose mode async"
        )

    # ------------------------------------------------------------ for the modes

    def _header_with(self, seq: int, samples: int) -> PushHeader:
        """The servers' options are those that they began with."""
        return PushHeader(seq, samples, self._position(), [b""] * len(self._optimizer.param_groups))

    def _not_finite(self) -> bool:
        """Whether the gradients at hand hold NaN or Inf; warns once."""
        if all(torch.isfinite(flat.sum()) for flat in self._space.gradients.values()):
            return False
        name = self._space.name_non_finite()
        if name is not None and not self._watches:
            self._watches = True
            warnings.warn(
                f"step {self.counters.clock}: the gradient of {name} holds NaN or Inf. This worker leaves such steps "
                "out (on_nan); later ones are not told here",
                stacklevel=5,
            )
        return name is not None

    def _named(self, error: NonFiniteContribution) -> NonFiniteContribution:
        name = self._space.name_non_finite() or "a parameter"
        return NonFiniteContribution(
            f"step {self.counters.clock}: what has become of {name} since the last exchange holds NaN or Inf, and the "
            "servers refused it. Lower the learning rate, clip gradients (--set clip=1), exchange more often, or check "
            f"the input data. [{error}]"
        )
