"""One training run of ``modes.py``: the example's digits CNN or character transformer, so many passes, one schedule.

Every worker takes batches of ``--batch``; the schedule goes by the worker's own share of the passes.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import downpour

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
CONTEXT, MAX_CHARS = 32, 80_000


def digits() -> tuple[nn.Module, TensorDataset, Tensor, Tensor]:
    """Model, training data, and what it is tested on."""
    import digits_cnn
    import digits_data

    data = digits_data.load()
    return digits_cnn.make_model(16), data.train, data.test_images, data.test_labels


def chars() -> tuple[nn.Module, TensorDataset, Tensor, Tensor]:
    """Model, training data, and what it is tested on: symbols and their successors."""
    import char_transformer

    symbols, alphabet = char_transformer.load_text(None, MAX_CHARS)
    windows = symbols.unfold(0, CONTEXT + 1, CONTEXT)
    held_out = len(windows) // 10
    train, test = windows[:-held_out], windows[-held_out:]
    model = char_transformer.CharTransformer(alphabet, CONTEXT, 32, 2)
    return model, TensorDataset(train[:, :-1], train[:, 1:]), test[:, :-1], test[:, 1:]


WORKLOADS = {"digits": digits, "chars": chars}
SMOOTHING = {"digits": 0.1, "chars": 0.0}
"""Of the loss, in training and testing: without it, that of the digits ends near zero, where ratios mean nothing."""


def loss_of(workload: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy in nats; of each symbol, where there are several in a row."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return nn.functional.cross_entropy(flat, wanted, label_smoothing=SMOOTHING[workload])


@torch.no_grad()
def judged(workload: str, model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy on what the model has not seen."""
    model.eval()
    logits = torch.cat([model(part) for part in inputs.split(256)])
    hits = (logits.argmax(-1) == labels).float().mean()
    return float(loss_of(workload, logits, labels)), float(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--save", default="", help="where to write the weights, without a launcher")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model, train, _, _ = WORKLOADS[args.workload]()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=args.lr)
    loader = DataLoader(train, batch_size=args.batch, shuffle=True)
    steps = args.passes * len(loader) / downpour.world_size()
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    scheduler = LambdaLR(
        optimizer, lambda i: min(1.0, 20 * (i + 1) / steps) * (0.51 + 0.49 * math.cos(math.pi * min(1.0, i / steps)))
    )
    step = 0
    for _ in range(args.passes):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = loss_of(args.workload, model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step % 20 == 0:
                downpour.log(loss=loss.item())
    if args.save:
        downpour.save(args.save)


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLES))
    main()
