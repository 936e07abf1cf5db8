"""What the simulated workers run: a training script in small, over the production :class:`downpour.session.Session`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from simulator.scenario import PER_CHUNK, Scenario

if TYPE_CHECKING:
    from downpour.session import Session
    from simulator.ledger import Ledger


class Toy(nn.Module):
    """Tensors of exactly one chunk each."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        first = (
            torch.arange(PER_CHUNK, dtype=torch.float64) / 7
            if scenario.synchronous
            else torch.zeros(PER_CHUNK, dtype=torch.float64)
        )
        self.parts = nn.ParameterList([nn.Parameter(first.clone()) for _ in range(scenario.tensors)])
        if scenario.buffers:
            self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))


def run(
    session: Session, scenario: Scenario, ledger: Ledger, process: tuple[int, int], rest: Callable[[float], None]
) -> None:
    """One worker's whole script. ``process``: slot and epoch; ``rest`` lets virtual time pass."""
    model = Toy(scenario)
    parts = list(model.parts)
    optimizer: torch.optim.Optimizer
    if scenario.synchronous:
        optimizer = torch.optim.Adam(parts, lr=0.05)
    else:
        optimizer = torch.optim.SGD(parts, lr=1.0, maximize=True)
    loader: DataLoader[Any] = DataLoader(list(range(scenario.samples)), batch_size=scenario.batch, collate_fn=list)  # type: ignore[arg-type]
    [prepared] = session.prepare(model, optimizer, [loader])
    ledger.joined(process, session.clock)
    while session.epoch < scenario.passes and not session.should_stop():
        epoch = session.epoch
        for samples in prepared:
            rest(scenario.step_s)
            clock = session.clock
            ledger.begins(process, clock, epoch, samples)
            if scenario.synchronous:
                _pull_towards(parts, samples, epoch)
                number = -1
            else:
                number = _one_hot(parts, ledger, process)
            if scenario.buffers:
                model.seen.add_(1.0)
            optimizer.step()
            ledger.completed(process, clock, number)
            if session.should_stop():
                break


def _pull_towards(parts: list[nn.Parameter], samples: list[int], epoch: int) -> None:
    """A gradient that every weight and every sample has a part in."""
    at = sum((s + 1) * 0.37 for s in samples) / len(samples) + epoch * 0.11
    at += 0.05 * sum(float(part.data[1]) for part in parts)  # each chunk's gradient follows from all chunks' weights
    for index, part in enumerate(parts):
        assert part.grad is not None
        part.grad.copy_(part.data).mul_(0.3).sub_(at * (index + 1))


def _one_hot(parts: list[nn.Parameter], ledger: Ledger, process: tuple[int, int]) -> int:
    number, element, amount = ledger.next(process)
    for part in parts:
        assert part.grad is not None
        part.grad.zero_()
        part.grad[element] = amount
    return number
