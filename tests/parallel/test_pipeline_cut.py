"""Where models are cut, what is refused, and in which order micro-batches are computed: in one process."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from downpour.parallel.balance import Costs, best
from downpour.parallel.microbatch import joined, microbatched, part_sizes, parts
from downpour.parallel.plan import Plan
from downpour.parallel.schedule import Action, fitting, forwards, orders
from downpour.parallel.split import Cut, cut, held_of, stage_of
from downpour_common.errors import ModelError
from downpour_common.replicas import Schedule
from pipeline_models import MODELS, UNet


def _through(model: nn.Module, found: Cut, *given: torch.Tensor) -> Any:
    values: dict[str, Any] = {}
    output: Any = None
    for s in range(found.count):
        received = [values[value.name] for value in found.received(s)]
        output = stage_of(model, found, s)(*(given[i] for i in found.arguments[s]), *received)
        if s < found.count - 1:
            values |= {value.name: each for value, each in zip(found.sent(s), output, strict=True)}
    return output


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stages_one_after_another_are_the_model(name: str, count: int) -> None:
    built = MODELS[name]()
    before = copy.deepcopy(built.model.state_dict())
    found = cut(built.model, built.inputs, count, built.plan)
    assert Cut.from_json(found.to_json()) == found
    torch.testing.assert_close(_through(built.model, found, built.inputs), built.model(built.inputs))
    for key, tensor in built.model.state_dict().items():
        assert torch.equal(tensor, before[key]), "measuring has changed the model"
        assert tensor.grad is None
    names = {id(t): key for key, t in built.model.state_dict(keep_vars=True).items()}
    held = [h.name for s in range(count) for h in held_of(built.model, found, [s], names)]
    assert set(held) == set(names.values())
    modules = dict(built.model.named_modules())
    for s in range(count):
        for key, parameter in stage_of(built.model, found, s).named_parameters():
            owner, _, last = key.rpartition(".")
            assert getattr(modules[owner], last) is parameter


def test_given_split_points_and_skips_straight_to_their_users() -> None:
    found = cut(UNet(), torch.randn(2, 1, 8, 8), 3, Plan(split=["down", "join"]))
    skip = next(value for value in found.values if value.users == (2,) and value.source == 0)
    assert skip.name not in [value.name for value in found.sent(1)]
    assert found.arguments == ((0,), (), (0,)), "every rank has the inputs; they are not sent"


def test_arguments_that_are_given_and_those_that_are_not() -> None:
    model, image, mask = UNet(), torch.randn(2, 1, 8, 8), torch.rand(2, 2, 8, 8)
    found = cut(model, (image, mask), 2)
    torch.testing.assert_close(_through(model, found, image, mask), model(image, mask))
    with pytest.raises(ModelError, match="called with 3 arguments"):
        cut(model, (image, mask, mask), 2)


class _Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found if found.sum() > 0 else nn.functional.dropout(-found, 0.5, self.training)


class _Drops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.9, self.training)


def test_blocks_that_cannot_be_followed_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Looks(), nn.Linear(4, 4), _Drops())
    found = cut(model, torch.randn(2, 4), 3)
    assert set(found.leaves) == {"1", "3"}
    model.eval()
    inputs = torch.randn(2, 4)
    torch.testing.assert_close(_through(model, found, inputs), model(inputs))
    with pytest.raises(ModelError, match=r"'1.inner' is not called by itself"):
        cut(model, inputs, 2, Plan(split=["1.inner"]))


class _Root(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "looks" and x.sum() > 0:
            return x
        return nn.functional.dropout(torch.relu(self.inner(x)), 0.5, self.training)


@pytest.mark.parametrize(
    ("make", "count", "plan", "says"),
    [
        (lambda: _Root("looks"), 2, None, r"cannot be followed.*Plan\(leaf="),
        (lambda: _Root("drops"), 2, None, r"nn\.Dropout in place of F\.dropout"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), 2, None, "makes 1 calls"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 2, Plan(split=["7"]), "no module '7'"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 2, Plan(leaf=["7"]), "no module 7"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 3, Plan(split=["1"]), "makes 2 stages, and the job has 3"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 2, Plan(split=["0"]), "leave the one before it empty"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), 2, Plan(split=["1"]), "changes in place"),
    ],
)
def test_what_cannot_be_cut_says_what_to_do(make: Any, count: int, plan: Plan | None, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        cut(make(), torch.randn(2, 4), count, plan)


def test_another_model_than_the_one_that_was_cut_is_noticed() -> None:
    found = cut(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4), 2, Plan(split=["1"]))
    with pytest.raises(ModelError, match="built another model"):
        stage_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), found, 0)


def _costs(*seconds: float, size: int = 0) -> Costs:
    count = len(seconds)
    weights = tuple(((index, 100),) for index in range(count))
    return Costs(seconds, (size,) * count, weights, (0,) * count)


def test_the_slowest_stage_is_as_fast_as_it_can_be() -> None:
    costs = _costs(4, 1, 1, 1, 1, 3, 1)
    starts, seconds = best(costs, [False] * 7, 3)
    assert (starts, seconds) == ((0, 1, 5), (4.0, 4.0, 4.0))
    assert best(costs, [False, True, True, True, False, False, False], 2)[0] == (0, 4), "a call that must not begin one"
    assert best(_costs(*[1] * 6), [False] * 6, 2, widths=(1, 2))[0] == (0, 2), "two ranks take twice as much"


def test_a_budget_of_memory_moves_the_cut() -> None:
    costs = _costs(8, 1, 1, 1)
    assert best(costs, [False] * 4, 2)[0] == (0, 1)
    assert best(costs, [False] * 4, 2, budget=200)[0] == (0, 2)
    with pytest.raises(ModelError, match="no cut into 2 stages keeps each rank within 199 bytes"):
        best(costs, [False] * 4, 2, budget=199)


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_micro_batches_add_up_to_the_batch(count: int) -> None:
    built = MODELS["mlp"]()
    other = copy.deepcopy(built.model)
    expected = built.criterion(other(built.inputs), built.targets)
    expected.backward()
    loss = microbatched(built.model, built.criterion, built.inputs, built.targets, count)
    torch.testing.assert_close(loss, expected.detach())
    for mine, whole in zip(built.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-5, atol=1e-6)


def test_parts_of_tuples_and_what_has_no_samples() -> None:
    mask = torch.ones(3, 3)
    value: tuple[torch.Tensor, dict[str, Any]] = (
        torch.arange(5),
        {"rest": torch.arange(10).reshape(5, 2), "mask": mask, "name": "x"},
    )
    sizes = part_sizes(5, 2)
    assert sizes == [3, 2]
    first, second = parts(value, 5, sizes)
    assert first[0].tolist() == [0, 1, 2]
    assert second[1]["rest"].shape == (2, 2)
    assert second[1]["mask"] is mask
    assert second[1]["name"] == "x"
    outputs = [(first[0], first[1]["rest"]), (second[0], second[1]["rest"])]
    assert torch.equal(joined(outputs, sizes)[1], value[1]["rest"])
    with pytest.raises(ModelError, match="let it give the samples along the first dimension"):
        joined([torch.zeros(()), torch.zeros(())], sizes)


SHAPES = [
    (schedule, positions, stages, microbatches)
    for schedule in ("gpipe", "1f1b", "interleaved")
    for positions in (2, 3, 4)
    for stages in ((positions * 2, positions * 3) if schedule == "interleaved" else (positions,))
    for microbatches in (1, 2, 5, 8, 24, 60)
]


@pytest.mark.parametrize(("schedule", "positions", "stages", "microbatches"), SHAPES)
def test_no_order_gets_stuck(schedule: Any, positions: int, stages: int, microbatches: int) -> None:
    """With a value from every stage to every later one, and transfers that end only when they are awaited."""
    count = fitting(schedule, positions, microbatches)
    assert 1 <= count <= microbatches
    window = 2 * stages + positions
    made = orders(schedule, positions, stages, count)
    expected = {Action(s, kind, m) for s in range(stages) for kind in _KINDS for m in range(count)}
    assert sorted(a for order in made for a in order) == sorted(expected)
    _carry_out(made, stages, window)
    _carry_out(forwards(positions, stages, count), stages, window)


_KINDS: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")


def _carry_out(made: list[list[Action]], stages: int, window: int) -> None:
    at = [0] * len(made)
    done: set[Action] = set()
    trains = any(action.kind == "backward" for order in made for action in order)

    def ready(action: Action) -> bool:
        stage, kind, m = action
        needs = [Action(s, "forward", m) for s in range(stage)]
        if kind == "backward":
            needs = [Action(s, "backward", m) for s in range(stage + 1, stages)]
            needs += [Action(s, "backward", m - window) for s in range(stage) if m >= window]
        elif not trains:
            needs += [Action(s, "forward", m - window) for s in range(stage + 1, stages) if m >= window]
        return done.issuperset(needs)

    while any(position < len(order) for position, order in zip(at, made, strict=True)):
        moved = False
        for rank, order in enumerate(made):
            while at[rank] < len(order) and ready(order[at[rank]]):
                done.add(order[at[rank]])
                at[rank] += 1
                moved = True
        assert moved, "all ranks wait"


def test_1f1b_has_no_more_on_its_way_than_stages_left() -> None:
    for stage, order in enumerate(orders("1f1b", 4, 4, 16)):
        under_way, most = 0, 0
        for action in order:
            under_way += 1 if action.kind == "forward" else -1
            most = max(most, under_way)
        assert most == 4 - stage


def test_orders_are_as_short_as_theory_says() -> None:
    """Forward and backward of one length: m / (m + stages - 1) of the time is used."""
    schedules: tuple[Schedule, ...] = ("gpipe", "1f1b")
    for schedule in schedules:
        for count in (4, 8):
            ends: dict[Action, int] = {}
            made = orders(schedule, 4, 4, count)
            at, free = [0] * 4, [0] * 4
            while any(position < 2 * count for position in at):
                for rank in range(4):
                    if at[rank] == 2 * count:
                        continue
                    stage, kind, m = action = made[rank][at[rank]]
                    before = Action(stage - 1, "forward", m) if kind == "forward" else Action(stage + 1, "backward", m)
                    edge = stage == (0 if kind == "forward" else 3)
                    if edge or before in ends:
                        free[rank] = ends[action] = max(free[rank], 0 if edge else ends[before]) + 1
                        at[rank] += 1
            assert math.isclose(2 * count / max(free), count / (count + 3)), (schedule, count)
