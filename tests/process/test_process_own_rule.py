"""A job that brings its own update rule: the shards run it, and say what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

RULES = """
import os
import torch

class Patient(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
    def step(self, closure=None):
        assert "DOWNPOUR_SHARD" in os.environ, "only shards run it"
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["steps"] = state.get("steps", 0) + 1
            if state["steps"] > 3:
                raise ZeroDivisionError("patience is over")
            p.add_(p.grad, alpha=-0.1)
"""
SCRIPT = """
import torch
import downpour
from patience import Patient

model = torch.nn.Linear(3, 2)
model, optimizer = downpour.prepare(model, Patient(model.parameters(), lr=0.1))
for step in range(10):
    optimizer.zero_grad()
    before = model.bias.detach().clone()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert torch.allclose(model.bias, before - 0.4)
    print("stepped", step, flush=True)
"""


@pytest.mark.long
def test_the_shards_run_the_jobs_rule_until_it_fails_and_tell_its_name(box: Box) -> None:
    (box.folder / "patience.py").write_text(RULES)
    (box.folder / "train.py").write_text(SCRIPT)
    ended = box.run("--json", "-w", "1", "-s", "1", "--rule", "patience:Patient", str(box.folder / "train.py"))
    assert "stepped 2" in ended.text
    assert "stepped 3" not in ended.text
    ended.expect_failure(
        "server/0", 1, "update rule patience:Patient: its step failed: ZeroDivisionError: patience is over"
    )
    assert 'raise ZeroDivisionError("patience is over")' in (ended.out / "logs" / "server-0.log").read_text()
