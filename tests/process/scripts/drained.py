"""Which samples does each worker see? One line per sample in FOLDER/ids-RANK-PID.txt.

After its second batch each worker makes FOLDER/reached-RANK and waits for FOLDER/go.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

EPOCHS = 2


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(197, 5), torch.arange(197))
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    rank, steps = downpour.rank(), 0
    with (folder / f"ids-{rank}-{os.getpid()}.txt").open("w", buffering=1) as notes:
        for epoch in range(downpour.epoch(), EPOCHS):
            for inputs, ids in loader:
                notes.writelines(f"{epoch} {i}\n" for i in ids.tolist())
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                steps += 1
                if steps == 2:
                    (folder / f"reached-{rank}").touch()
                    while not (folder / "go").exists():
                        time.sleep(0.02)
                optimizer.step()
    print(f"rank {rank} took {steps} steps")


main()
