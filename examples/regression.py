"""A small perceptron that regresses the progress of diabetes on ten measurements of a patient.

    python regression.py                        one ordinary process
    downpour run -w 2 -s 2 regression.py        two workers, two parameter-server shards

Shows SGD with Nesterov momentum, gradient clipping and a StepLR schedule that goes on after `--resume`.
The 442 samples come inside scikit-learn. They are noisy: an error of 0.7 of the mean's is a good one.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import downpour

SPLIT_SEED = 442
"""Seed of the split, not of the training: whatever its `--seed`, every run is tested on the same patients."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small MLP on scikit-learn's diabetes data.")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step of one worker")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the start")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--hidden", type=int, default=32, help="width of the hidden layer")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two downpour.log calls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_split(test_fraction: float = 0.25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train x, train y, test x, test y; x of shape (n, 10), y of shape (n, 1), in their own units."""
    bunch = load_diabetes(scaled=False)
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test_count = round(test_fraction * len(y))
    test, train = order[:test_count], order[test_count:]
    return x[train], y[train], x[test], y[test]


def rmse(predicted: Tensor, actual: Tensor) -> float:
    return F.mse_loss(predicted, actual).sqrt().item()


def main() -> None:
    args = parse_args()
    device = downpour.device()
    train_x, train_y, test_x, test_y = load_split()
    x_mean, x_std = train_x.mean(dim=0), train_x.std(dim=0)  # of the training part only
    y_mean, y_std = train_y.mean(), train_y.std()
    train = TensorDataset((train_x - x_mean) / x_std, (train_y - y_mean) / y_std)
    inputs = ((test_x - x_mean) / x_std).to(device)

    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(10, args.hidden), nn.Tanh(), nn.Linear(args.hidden, 1)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, nesterov=True, weight_decay=args.weight_decay
    )
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

    @torch.no_grad()
    def test_rmse() -> float:
        return rmse(downpour.unsplit(model)(inputs).cpu() * y_std + y_mean, test_y)

    scheduler = StepLR(optimizer, step_size=max(1, args.epochs // 3), gamma=0.3)
    for _ in range(downpour.epoch()):  # more than none when the run was resumed
        scheduler.step()
    for epoch in range(downpour.epoch(), args.epochs):
        losses: list[float] = []
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x.to(device)), y.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            losses.append(loss.item())
            if step % args.log_every == 0:
                downpour.log(loss=losses[-1])
        scheduler.step()

        if downpour.is_chief():
            mean_loss = sum(losses) / max(1, len(losses))
            print(f"epoch {epoch + 1}  loss {mean_loss:.3f}  test RMSE {test_rmse():.2f}")

    if downpour.is_chief():
        downpour.log(test_rmse=test_rmse())
        of_mean = rmse(y_mean.expand_as(test_y), test_y)
        print(f"final test RMSE {test_rmse():.2f}  (predicting the mean: {of_mean:.2f})")


if __name__ == "__main__":
    main()
