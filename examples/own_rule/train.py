"""A perceptron on scikit-learn's digits, with an update rule of its own.

python train.py                                               one ordinary process
downpour run -w 2 -s 2 --rule sign_rules:SignSGD train.py     the shards run the class
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sign_rules import SignSGD
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an MLP with SignSGD.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument("--lr", type=float, default=1e-3, help="size of every step")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SignSGD(model.parameters(), lr=args.lr)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

    for _ in range(downpour.epoch(), args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            downpour.log(loss=loss.item())

    if downpour.is_chief():
        right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
        print(f"test accuracy {right:.4f}")


if __name__ == "__main__":
    main()
