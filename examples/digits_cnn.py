"""A small convolutional network with batch normalisation on scikit-learn's handwritten digits.

    python digits_cnn.py                        one ordinary process
    downpour run -w 2 -s 2 digits_cnn.py        two workers, two parameter-server shards

Shows param groups (AdamW decays the weights of the convolutions and the linear layer, but neither biases nor
normalisation), buffers (BatchNorm's running statistics) and a schedule that goes on after `--resume`.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import digits_data
import downpour


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small CNN with BatchNorm on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step of one worker")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate at the start")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--channels", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two downpour.log calls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def block(inputs: int, outputs: int) -> nn.Module:
    # No bias: the normalisation that follows has its own.
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def make_model(channels: int) -> nn.Module:
    return nn.Sequential(
        block(1, channels),
        block(channels, channels),
        nn.MaxPool2d(2),
        block(channels, 2 * channels),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 2 * channels, 10),
    )


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def lr_factor(progress: float) -> float:
    """Half a cosine, from 1 at the start to 0.02 at the end."""
    return 0.51 + 0.49 * math.cos(math.pi * progress)


def main() -> None:
    args = parse_args()
    device = downpour.device()
    digits = digits_data.load()

    torch.manual_seed(args.seed)
    model = make_model(args.channels).to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    loader = DataLoader(digits.train, batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

    first_epoch = downpour.epoch()  # above 0 when the run was resumed: the schedule goes on from there
    scheduler = LambdaLR(optimizer, lambda i: lr_factor((first_epoch + i) / args.epochs))
    for epoch in range(first_epoch, args.epochs):
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
        scheduler.step()

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
