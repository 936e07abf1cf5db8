"""Stages on several ranks compute what the unsplit model does, under every schedule and with tensor ranks in them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from downpour.parallel.group import Group, Place
from downpour.parallel.held import Held
from downpour.parallel.pipeline import Pipeline
from downpour.parallel.plan import Plan
from downpour.parallel.split import Cut, cut, held_of, stage_of
from downpour.parallel.tensor import split_tensor
from downpour.space import local
from pipeline_models import MODELS, Built, memory_of
from ranks import run_ranks

pytestmark = pytest.mark.process

INTERLEAVE = 2


def _split(group: Group, model: nn.Module, built: Built, schedule: Any, count: int) -> tuple[Pipeline, list[Held]]:
    """What a session does: the lead cuts, all follow."""
    place = group.place
    stages = len(place.widths) * (INTERLEAVE if schedule == "interleaved" else 1)
    text = cut(model, built.inputs, stages, built.plan).to_json().encode() if place.rank == 0 else b""
    found = Cut.from_json(group.broadcast_bytes(text).decode())
    mine = [s for s in range(found.count) if s % len(place.widths) == place.stage]
    names = {id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))}
    made = {s: stage_of(model, found, s) for s in mine}
    held = {h.name: h for h in held_of(model, found, mine, names)}
    if max(place.widths) > 1:
        for stage in made.values():
            held |= {h.name: h for h in split_tensor(stage, group, built.plan, names)}
    return Pipeline(group, made, found, schedule, count), list(held.values())


def _part(whole: torch.Tensor, held: Held) -> torch.Tensor:
    if held.part is None:
        return whole
    dim = held.part.dim
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in held.part.ranges], dim)


def _check(group: Group, name: str, schedule: Any, count: int, samples: int | None = None) -> set[str]:
    """One batch, or the first ``samples`` of it, on all ranks and unsplit; the names that this rank holds."""
    torch.manual_seed(1)
    built = MODELS[name]()
    for module in built.model.modules() if max(group.place.widths) > 1 else ():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # tensor ranks get their activations from DTensors, which forbid it
    unsplit, model = copy.deepcopy(built.model), built.model
    pipeline, held = _split(group, model, built, schedule, count)
    inputs, targets = built.inputs[:samples], built.targets[:samples]
    expected = built.criterion(unsplit(inputs), targets)
    expected.backward()
    for _ in range(2):  # the second time every form is known already
        for each in held:
            each.tensor.grad = None
        loss = pipeline.forward_backward(built.criterion, inputs, targets)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.forward(inputs), unsplit(inputs), rtol=1e-5, atol=1e-5)
    tied = sorted(n for n in built.tied)
    whole = dict(unsplit.named_parameters())
    by_name = {h.name: h for h in held}
    for parameter in tied:
        mine = by_name.get(parameter)
        assert mine is None or mine.sharing == "sum"
        share = torch.zeros_like(whole[parameter])
        if mine is not None and mine.tensor.grad is not None and group.place.tensor_rank == 0:
            share += local(mine.tensor.grad)
        dist.all_reduce(share)
        torch.testing.assert_close(share, whole[parameter].grad, rtol=1e-5, atol=1e-5)
    for each in held:
        if each.name in whole and each.name not in tied:
            gradient, right = each.tensor.grad, whole[each.name].grad
            if gradient is None or right is None:
                assert gradient is None, each.name
                assert right is None, each.name
                continue
            part = _part(right, each)
            difference = (local(gradient) - part).abs().max()
            assert difference < 1e-5, (name, schedule, each.name, difference)
    return {h.name for h in held}


@dataclass(slots=True)
class _Seen:
    """What a rank of two has to tell."""

    held: dict[str, set[str]]
    peaks: dict[str, list[int]]
    said: list[str]


def _two(group: Group) -> _Seen:
    held = {name: _check(group, name, "1f1b", 4) for name in MODELS}
    for name in ("mlp", "unet", "tied"):
        _check(group, name, "gpipe", 3)
        _check(group, name, "interleaved", 4)
    _check(group, "unet", "1f1b", 4, samples=7)
    _check(group, "mlp", "1f1b", 8, samples=1)
    _check(group, "mlp", "interleaved", 8, samples=5)
    peaks = {schedule: [memory_of(group, schedule, count) for count in (4, 8, 16)] for schedule in ("gpipe", "1f1b")}
    return _Seen(held, peaks, _refusals(group))


def _refusals(group: Group) -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    found = cut(model, torch.zeros(2, 4), 2, Plan(split=["1"]))
    stages = {group.place.stage: stage_of(model, found, group.place.stage)}
    pipeline = Pipeline(group, stages, found, "1f1b", 2)
    said = []
    for inputs in ((torch.zeros(2, 4), torch.zeros(2, 4)), torch.zeros(0, 4)):
        try:
            pipeline.forward(inputs)
        except Exception as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def two() -> list[_Seen]:
    """Two ranks that have computed with every model and schedule what the unsplit model does."""
    return run_ranks(_two, (1, 1))


def test_two_stages_hold_the_model_between_them(two: list[_Seen]) -> None:
    first, second = (seen.held for seen in two)
    for name, make in MODELS.items():
        built = make()
        every = set(dict(built.model.named_parameters()))
        assert first[name] | second[name] >= every
        assert (first[name] & second[name]) & every == built.tied
        assert not first[name] >= every, f"{name} is on one rank"


def test_stored_activations_grow_with_micro_batches_under_gpipe_only(two: list[_Seen]) -> None:
    """Micro-batches of one size: peak bytes that autograd has saved, on each rank."""
    for seen in two:
        few, more, most = seen.peaks["gpipe"]
        assert most - more == 2 * (more - few), seen.peaks
        assert more > 1.5 * few, seen.peaks
        assert len(set(seen.peaks["1f1b"])) == 1, seen.peaks


def test_wrong_inputs_are_named_on_every_rank(two: list[_Seen]) -> None:
    for seen in two:
        assert "cut into stages for 1 argument, and is called with 2" in seen.said[0]
        assert "without samples" in seen.said[1]


def _wide(group: Group) -> None:
    for name in ("mlp", "transformer"):
        _check(group, name, "1f1b", 4)
    _check(group, "unet", "interleaved", 4)


def _three(group: Group) -> None:
    _wide(group)
    # The same processes again, as three stages of one rank each.
    narrow = copy.copy(group)
    narrow.place, narrow.tensor, narrow.heads = Place(group.place.rank, (1, 1, 1)), group.all, group.all
    for schedule in ("gpipe", "1f1b", "interleaved"):
        _check(narrow, "unet", schedule, 6)
    _check(narrow, "transformer", "1f1b", 4)
    _check(narrow, "mlp", "1f1b", 2)


@pytest.mark.long
def test_two_stages_of_two_tensor_ranks() -> None:
    run_ranks(_wide, (2, 2))


@pytest.mark.long
def test_stages_of_unequal_width_and_three_stages_with_long_skips() -> None:
    run_ranks(_three, (1, 2))
