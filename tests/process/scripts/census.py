"""Notes which samples each worker was given: one line ``loader epoch id`` per sample in FOLDER/ids-RANK.txt.

No loader's samples divide evenly: in the last round of a pass, some of three workers have nothing to do.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import downpour

EPOCHS = 2


def sample(number: int) -> tuple[torch.Tensor, int]:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(number)), number


class Numbered(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return sample(number)


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return map(sample, range(self.count))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loaders: dict[str, Any] = {
        "uneven": DataLoader(Numbered(97), batch_size=8, shuffle=True),
        "few": DataLoader(Numbered(2), batch_size=1, shuffle=True),
        "stream": DataLoader(Stream(11), batch_size=2),
    }
    model, optimizer, *prepared = downpour.prepare(model, optimizer, *loaders.values())
    if downpour.is_chief():
        print("address", json.loads(os.environ["DOWNPOUR_WORKER"])["coordinator"])
    with (folder / f"ids-{downpour.rank()}.txt").open("w") as notes:
        for name, loader in zip(loaders, prepared, strict=True):
            for epoch in range(EPOCHS):
                for inputs, ids in loader:
                    notes.writelines(f"{name} {epoch} {i}\n" for i in ids.tolist())
                    optimizer.zero_grad()
                    model(inputs).square().mean().backward()
                    optimizer.step()
    print(f"census taken, {downpour.epoch()} epochs")


main()
