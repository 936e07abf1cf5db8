"""Norms and scalers over the ranks of a replica: each tensor counts once, and all ranks do the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as torchs

from downpour import scaler as scaling
from downpour.clipping import OverRanks, across, clip, clip_grad_norm_
from downpour.parallel.group import Group
from downpour_common.errors import ConfigError, ModelError
from ranks import run_ranks

pytestmark = pytest.mark.process

WIDE = torch.linspace(-2, 1, 24).view(6, 4)
COMMON = torch.linspace(0, 3, 5)
OWN = [torch.linspace(-1, 1, 3), torch.linspace(1, 4, 7)]
"""by rank, what only it holds"""
NORMS = [2.0, 1.0, 3.0, math.inf]


def whole() -> list[nn.Parameter]:
    """The unsplit model's."""
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in (WIDE, COMMON, *OWN)]
    for parameter, gradient in zip(parameters, (WIDE, COMMON, *OWN), strict=True):
        parameter.grad = gradient.clone()
    return parameters


def held(group: Group) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """This rank's parameters, and those of them that count here: a DTensor, one that both have, and its own."""
    mesh = group.tensor_mesh()
    wide = nn.Parameter(distribute_tensor(torch.zeros_like(WIDE), mesh, [Shard(0)]))
    wide.grad = distribute_tensor(WIDE.clone(), mesh, [Shard(0)])
    common, own = (nn.Parameter(torch.zeros_like(g)) for g in (COMMON, OWN[group.place.rank]))
    common.grad, own.grad = COMMON.clone(), OWN[group.place.rank].clone()
    return [wide, common, own], [wide, own] + ([common] if group.place.rank == 0 else [])


def grads(parameters: list[nn.Parameter]) -> list[Any]:
    return [p.grad for p in parameters]


def plain(parameters: list[nn.Parameter]) -> list[np.ndarray[Any, Any]]:
    found = [getattr(g, "_local_tensor", g) for g in grads(parameters)]
    return [g.numpy().copy() for g in found]


def on_a_rank(group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in NORMS:
        every, owned = held(group)
        norm = clip(grads(owned), grads(every), group, 1.5, kind)
        found[f"pure {kind}"] = (float(norm), plain(every))
        every, owned = held(group)
        with across(OverRanks(group, every, owned)):
            function = torchs if kind == 2.0 else clip_grad_norm_
            found[f"patched {kind}"] = (float(function(every, 1.5, kind)), plain(every))
    every, owned = held(group)
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.tensor([3.0, 4.0])
    settled: list[int] = []
    with across(OverRanks(group, every, owned, lambda: settled.append(1))):
        # One rank has nothing of a subset; other models are none of the replica's business.
        found["subset"] = float(torchs(every[2:] if group.place.rank == 1 else [], 1e9))
        found["other"] = float(torchs([other], 1.0)), other.grad.tolist()
        found["norm"] = float(nn.utils.get_total_norm(grads(every)))
        with pytest.raises(ModelError, match="1 of 4"):
            torchs([*every, other], 1.0)
        with pytest.raises(ConfigError, match="norm_type 0"):
            torchs(every, 1.0, 0.0)
        assert every[2].grad is not None
        every[2].grad[0] = math.nan if group.place.rank else 1.0
        with pytest.raises(RuntimeError, match="not finite"):
            torchs(every, 1.0, error_if_nonfinite=True)
    assert len(settled) >= 3
    found["after"] = float(torchs([other], 1e9))
    found["scaler"] = _scaled(group)
    return found


def _scaled(group: Group) -> list[Any]:
    """One rank overflows in one step: all skip it, and lower their scale."""
    every, _ = held(group)
    optimizer = torch.optim.SGD(every, lr=1.0)
    steps: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: steps.append("step"))
    with scaling.agreeing(group):
        mine = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            for parameter in every:
                assert parameter.grad is not None
                getattr(parameter.grad, "_local_tensor", parameter.grad).fill_(4.0)
            if group.place.rank == 0:
                mine.scale(torch.ones(1))  # where the loss is
            if step == 1 and group.place.rank == 1:
                assert every[2].grad is not None
                every[2].grad[0] = math.inf
            if step == 2:  # as an adopted optimizer does
                optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
                optimizer.step = lambda: steps.append(scaling.take(optimizer))  # type: ignore[assignment,method-assign]
            mine.step(optimizer)
            mine.update()
            steps.append(mine.get_scale())
    assert every[1].grad is not None
    return [*steps, float(every[1].grad[0])]


@pytest.mark.long
def test_two_ranks_clip_as_one_process_does() -> None:
    results = run_ranks(on_a_rank, (2,))
    for kind in NORMS:
        parameters = whole()
        norm = float(torchs(parameters, 1.5, kind))
        wide, common, first, second = plain(parameters)
        for way in ("pure", "patched"):
            for rank, own in ((0, first), (1, second)):
                found, local = results[rank][f"{way} {kind}"]
                assert found == pytest.approx(norm, rel=1e-6)
                for one, other in zip(local, [wide[3 * rank : 3 * rank + 3], common, own], strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-6)
    for result in results:
        assert result["subset"] == pytest.approx(float(OWN[1].norm()), rel=1e-6)
        assert result["other"][0] == 5.0
        assert result["other"][1] == pytest.approx([0.6, 0.8], rel=1e-4)
        assert result["norm"] == pytest.approx(float(torchs(whole(), 1e9)), rel=1e-6)
        assert result["after"] == pytest.approx(1.0, rel=1e-4)
        assert result["scaler"] == ["step", 8.0, 4.0, False, 4.0, 1.0]


def test_in_one_process_it_is_torchs() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one(torch.ones(4, 3)).square().sum().backward()
    assert torch.equal(clip_grad_norm_(model, 0.5), torchs(other.parameters(), 0.5))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
