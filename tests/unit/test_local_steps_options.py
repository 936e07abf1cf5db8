"""What goes together with modes of local steps, and what the servers' rule is then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from downpour.local import LOCAL
from downpour.model import describe
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError, ModelError
from downpour_common.modes import parse_mode
from downpour_common.optimizers import OUTER_RULE

JOB: dict[str, Any] = {"name": "job", "script": "train.py", "workers": 4, "shards": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "average:5", "settings": {"fetch": "layers"}}, "layers keeps no weights between steps"),
        ({"mode": "diloco:5", "settings": {"n_push": 2}}, "mode diloco:5 exchanges when it says itself"),
        ({"mode": "easgd:5", "settings": {"inject_staleness": 2}}, "does not go with mode easgd:5"),
        ({"mode": "easgd:5", "tensor": [2]}, "easgd:5 is for replicas of one worker each"),
        ({"mode": "diloco:5,fragments=6"}, "at most 5"),
        ({"mode": "average:5", "rule": "mine:Rule"}, "the servers run the mode's own"),
    ],
)
def test_what_does_not_go_together_is_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_spec(**JOB, **fields)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("mode", ["average:5", "easgd:5,momentum=0.9", "diloco:8,fragments=8"])
def test_what_goes_together(mode: str) -> None:
    assert job_spec(**JOB, mode=mode, settings={"push_dtype": "bfloat16", "clip": 1}).parsed_mode.local
    assert mode.startswith("easgd") or job_spec(**JOB, mode=mode, tensor=[2]).ranks == 2


class OfTheirOwn(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"odd": object()})


def test_the_servers_rule_is_of_the_mode_and_any_optimizer_will_do() -> None:
    model = nn.Linear(2, 2)
    mode = parse_mode("diloco:5,momentum=0.5")
    outer = LOCAL["diloco"].outer(mode)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    spec = describe(model, OfTheirOwn(groups), "local", outer=outer).spec
    assert spec.rule == OUTER_RULE
    assert spec.options == ({"lr": 0.7, "momentum": 0.5, "nesterov": True},) * 2
    assert not LOCAL["diloco"].outer(parse_mode("diloco:5,momentum=0"))["nesterov"]
    with pytest.raises(ModelError, match="no update rule"):
        describe(model, OfTheirOwn(groups), "local")
