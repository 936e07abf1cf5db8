"""Tries what cannot be distributed, one after the other; the last refusal is left to end the script."""

import torch
from torch import nn

import downpour


def attempt(label: str, *objects: object) -> None:
    try:
        downpour.prepare(*objects)
    except downpour.DownpourError as error:
        print(f"{label}: {type(error).__name__}: {error}")
    else:
        print(f"{label}: accepted")


def main() -> None:
    frozen = nn.Linear(3, 2)
    frozen_optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    frozen.requires_grad_(False)
    model = nn.Linear(3, 2)
    attempt("frozen", frozen, frozen_optimizer)
    attempt("lbfgs", model, torch.optim.LBFGS(model.parameters()))
    attempt("adafactor", model, torch.optim.Adafactor(model.parameters()))
    attempt("stranger", model, torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1))
    attempt("two models", model, frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = downpour.prepare(model, optimizer)
    attempt("twice", model, optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return float(loss)

    optimizer.step(closure)


main()
