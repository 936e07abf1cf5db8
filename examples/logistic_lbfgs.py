"""Multinomial logistic regression on handwritten digits by L-BFGS over the whole data set (Sandblaster).

    python logistic_lbfgs.py                                      one process: torch.optim.LBFGS
    downpour run -w 4 -s 2 --mode lbfgs logistic_lbfgs.py         four workers compute, two shards keep the vectors

There is no training loop: `downpour.minimize` evaluates the loss of all samples and its gradient again and again, in
small portions, until the gradient is as good as zero. All runs come to the same loss: a convex one has but one minimum.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import downpour
from digits_data import accuracy, load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit a logistic regression to scikit-learn's digits by L-BFGS.")
    parser.add_argument("--max-iterations", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest element of the gradient at the end")
    parser.add_argument("--weight-decay", type=float, default=1e-3, help="w: adds w/2 times the squared weights")
    parser.add_argument("--batch-size", type=int, default=64, help="samples computed at a time")
    parser.add_argument("--hidden", type=int, default=0, help="width of a tanh layer before; 0: none")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = downpour.device()
    digits = load()
    torch.manual_seed(downpour.seed())
    layers: list[nn.Module] = [nn.Flatten()]
    if args.hidden:
        layers += [nn.Linear(64, args.hidden), nn.Tanh()]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(args.hidden or 64, 10)).to(device)
    loader = DataLoader(digits.train, batch_size=args.batch_size)

    model, loader = downpour.prepare(model, loader)
    found = downpour.minimize(
        model,
        cross_entropy,
        loader,
        max_iterations=args.max_iterations,
        tolerance_grad=args.tolerance,
        weight_decay=args.weight_decay,
    )

    if downpour.is_chief():
        share = accuracy(model, digits.test_images, digits.test_labels, device)
        print(f"{found.reason} after {found.iterations} iterations, {found.evaluations} evaluations of all data")
        print(f"final loss {found.loss:.6f}  largest element of the gradient {found.gradient:.1e}")
        print(f"final test accuracy {share:.2%}")


if __name__ == "__main__":
    main()
