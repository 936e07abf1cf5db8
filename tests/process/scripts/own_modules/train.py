"""An ordinary training script; arguments: number of epochs, and a note that is only carried along."""

import sys

import common
import torch
import torch.nn.functional as F
import worker
from torch.utils.data import DataLoader

import downpour


def main() -> None:
    epochs = int(sys.argv[1])
    model = common.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(common.make_data(), batch_size=16, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)
    loss = torch.tensor(0.0)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        downpour.log(loss=loss)
        print(f"epoch over in rank {downpour.rank()} of {downpour.world_size()}")
    if downpour.is_chief():
        downpour.pull()
        model.eval()
        inputs, labels = common.make_data().tensors
        with torch.no_grad():
            loss = F.cross_entropy(model(inputs), labels)
        print(f"final loss {loss:.4f} {worker.LABEL}")


main()
