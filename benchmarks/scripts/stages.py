"""A job in pipeline stages of equal cost, for its trace: stages that sleep (``sleep``), or that compute (``dense``).

Sleeping stages do not contend for the cores, so their utilisation is the schedule's. Of ``dense`` ones each rank counts
the bytes that autograd keeps for backward, and leaves the most there were in the trace, as ``activations``. A
micro-batch has the same number of samples however many there are.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour
from downpour.spans import peak

NARROW, WIDE, DEPTH = 8, 512, 4
SAMPLES = {"sleep": 4, "dense": 256}
"""of a micro-batch"""


class Sleep(torch.autograd.Function):
    """Gives what it is given, after some time; twice of that going back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class Sleeper(nn.Module):
    """A stage that sleeps. What it computes is nothing to speak of."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(NARROW, NARROW)
        self._seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Sleep.apply(self.linear(x), self._seconds)  # type: ignore[no-untyped-call]
        return found


class Kept:
    """What autograd keeps, other than ``weights``: bytes now, and the most so far. What is kept twice counts once."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.now = self.most = 0
        self._weights = {t.data_ptr() for t in weights}
        self._uses: Counter[int] = Counter()

    def pack(self, tensor: torch.Tensor) -> _Saved:
        """A hook for what is saved."""
        return _Saved(self, tensor.detach())

    def more(self, tensor: torch.Tensor) -> None:
        """It is kept once more."""
        at = tensor.data_ptr()
        if not self._uses[at] and at not in self._weights:
            self.now += tensor.nbytes
            self.most = max(self.most, self.now)
        self._uses[at] += 1

    def less(self, tensor: torch.Tensor) -> None:
        """… and once less."""
        at = tensor.data_ptr()
        self._uses[at] -= 1
        if not self._uses[at] and at not in self._weights:
            self.now -= tensor.nbytes


class _Saved:
    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self._kept, self._tensor = kept, tensor
        kept.more(tensor)

    def __del__(self) -> None:
        self._kept.less(self._tensor)

    def unpack(self) -> torch.Tensor:
        return self._tensor


def make_model(kind: str, stages: int, seconds: float) -> nn.Sequential:
    """A stage is a child of it."""
    if kind == "sleep":
        return nn.Sequential(*(Sleeper(seconds) for _ in range(stages)))
    return nn.Sequential(
        *(nn.Sequential(*(m for _ in range(DEPTH) for m in (nn.Linear(WIDE, WIDE), nn.Tanh()))) for _ in range(stages))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SAMPLES, required=True)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--forward-ms", type=float, default=20.0, help="of a sleeping stage; backward takes twice that")
    args = parser.parse_args()
    model: nn.Module = make_model(args.kind, args.stages, args.forward_ms / 1e3)
    width, batch = NARROW if args.kind == "sleep" else WIDE, SAMPLES[args.kind] * args.microbatches
    data = TensorDataset(torch.randn(batch, width), torch.randn(batch, width))
    loader = DataLoader(data, batch_size=batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = [str(stage) for stage in range(args.stages)]
    plan = downpour.Plan(split=names[1:], leaf=names)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader, plan=plan)
    kept = Kept(p for group in optimizer.param_groups for p in group["params"])
    while downpour.clock() < args.steps:
        for x, y in loader:
            optimizer.zero_grad()
            if args.kind == "sleep":
                downpour.forward_backward(model, nn.functional.mse_loss, x, y)
            else:
                with torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.unpack):
                    downpour.forward_backward(model, nn.functional.mse_loss, x, y)
                peak("activations", kept.most)
            optimizer.step()


if __name__ == "__main__":
    main()
