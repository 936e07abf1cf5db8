"""Multinomial logistic regression by downpour.minimize, on data that follow from a seed."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import downpour

generator = torch.Generator().manual_seed(3)
inputs = torch.randn(400, 8, generator=generator)
targets = (inputs @ torch.randn(8, 4, generator=generator) + inputs[:, :4] ** 2).argmax(1)
torch.manual_seed(0)
model = nn.Linear(8, 4)
model, loader = downpour.prepare(model, DataLoader(TensorDataset(inputs, targets), batch_size=16))
found = downpour.minimize(model, cross_entropy, loader, tolerance_grad=1e-4, weight_decay=1e-2)
print(f"minimum {found.loss:.9f} {found.reason}")
