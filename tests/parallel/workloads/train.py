"""Twenty steps of a small model, however it is split: train.py KIND BATCH."""

from __future__ import annotations

import sys

from models import STEPS, make, optimizer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import downpour

model, samples, labels = make(sys.argv[1])
optimizer = optimizer_of(model)
loader = DataLoader(TensorDataset(samples, labels), batch_size=int(sys.argv[2]), shuffle=True)
model, optimizer, loader = downpour.prepare(model, optimizer, loader)
criterion = nn.CrossEntropyLoss()
while downpour.clock() < STEPS:
    for x, y in loader:
        optimizer.zero_grad()
        loss = downpour.forward_backward(model, criterion, x, y)
        optimizer.step()
        downpour.log(loss=loss)
        if downpour.clock() == STEPS:
            break
