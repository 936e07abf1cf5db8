"""Everything goes well until the end, where the remainder of an accrued gradient turns out to be NaN."""

import torch

import downpour

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model, optimizer = downpour.prepare(model, optimizer)
for step in range(3):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    if step == 2:
        model.weight.grad.fill_(float("nan"))
    optimizer.step()
