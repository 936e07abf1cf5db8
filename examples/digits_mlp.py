"""A multi-layer perceptron on scikit-learn's handwritten digits.

    python digits_mlp.py                        one ordinary process
    downpour run -w 2 -s 2 digits_mlp.py        two workers, two parameter-server shards

Shows how little a script changes, and `--optimizer`, whose choice becomes the servers' update rule.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import digits_data
import downpour


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an MLP on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step of one worker")
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--lr", type=float, help="learning rate (default: 0.002 for adam, 0.05 for sgd)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the two hidden layers")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two downpour.log calls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_model(hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def make_optimizer(name: str, lr: float | None, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05 if lr is None else lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=0.002 if lr is None else lr)


def main() -> None:
    args = parse_args()
    device = downpour.device()
    digits = digits_data.load()

    torch.manual_seed(args.seed)
    model = make_model(args.hidden).to(device)
    optimizer = make_optimizer(args.optimizer, args.lr, model)
    loader = DataLoader(digits.train, batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

    for epoch in range(downpour.epoch(), args.epochs):
        losses: list[float] = []
        for step, batch in enumerate(loader):
            images, labels = (tensor.to(device) for tensor in batch)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

            losses.append(loss.item())
            if step % args.log_every == 0:
                downpour.log(loss=losses[-1])

        if downpour.is_chief():
            accuracy = digits_data.accuracy(downpour.unsplit(model), digits.test_images, digits.test_labels, device)
            mean_loss = sum(losses) / max(1, len(losses))
            print(f"epoch {epoch + 1}  loss {mean_loss:.3f}  test accuracy {accuracy:.4f}")

    if downpour.is_chief():
        accuracy = digits_data.accuracy(downpour.unsplit(model), digits.test_images, digits.test_labels, device)
        downpour.log(test_accuracy=accuracy)
        print(f"final test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
