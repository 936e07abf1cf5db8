"""A small Inception-like network on scikit-learn's handwritten digits, whose branches can be shared out among workers.

    python inception_branches.py                                    one ordinary process
    downpour run -w 2 -s 2 inception_branches.py                    two replicas
    downpour run -w 2 -s 1 --tensor 2 inception_branches.py         one replica of two workers
    downpour run -w 4 -s 2 --tensor 2 inception_branches.py         two replicas of two workers

Shows `downpour.Branches`: modules that all take the same input, each of which lives on one worker of its replica.
`--by-hand` says where, in place of what the sizes of the branches suggest.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import digits_data
import downpour


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an Inception-like CNN on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step of one replica")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--channels", type=int, default=16, help="channels of the first convolution and of each branch")
    parser.add_argument("--by-hand", action="store_true", help="under --tensor 2: the wide branches on worker 1")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two downpour.log calls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    # No bias: the normalisation that follows has its own.
    weights = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(weights, nn.BatchNorm2d(outputs), nn.ReLU())


def mixed(inputs: int, each: int) -> downpour.Branches:
    """Four views of the same input, side by side: 4 * `each` channels."""
    return downpour.Branches(
        [
            conv(inputs, each, 1),
            nn.Sequential(conv(inputs, each, 1), conv(each, each, 3)),
            nn.Sequential(conv(inputs, each, 1), conv(each, each, 5)),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(inputs, each, 1)),
        ]
    )


class Inception(nn.Module):
    """Input: images of shape (batch, 1, 8, 8). Output: logits of shape (batch, 10)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = conv(1, channels, 3)
        self.mixed1 = mixed(channels, channels)
        self.pool = nn.MaxPool2d(2)
        self.mixed2 = mixed(4 * channels, 2 * channels)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 8 * channels, 10))

    def forward(self, images: Tensor) -> Tensor:
        h = self.pool(self.mixed1(self.stem(images)))
        logits: Tensor = self.head(self.mixed2(h))
        return logits


def main() -> None:
    args = parse_args()
    device = downpour.device()
    digits = digits_data.load()

    torch.manual_seed(args.seed)
    model = Inception(args.channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(digits.train, batch_size=args.batch_size, shuffle=True)
    places = {"mixed1": [0, 1, 1, 0], "mixed2": [0, 1, 1, 0]} if args.by_hand else None
    model, optimizer, loader = downpour.prepare(model, optimizer, loader, plan=downpour.Plan(branches=places))

    for epoch in range(downpour.epoch(), args.epochs):
        losses: list[float] = []
        for step, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()

            losses.append(loss.item())
            if step % args.log_every == 0 and downpour.is_chief():
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
