"""Parameters that torch has split among ranks, as views of a rank's own flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from downpour.parallel.group import Group
from downpour.space import FlatSpace, local
from downpour_common.layout import ModelSpec, Part, TensorSpec, plan
from ranks import run_ranks

pytestmark = [pytest.mark.process, pytest.mark.long]

STEPS = 3


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def inputs(step: int) -> torch.Tensor:
    return torch.linspace(-1, 1 + step, 24).view(6, 4)


def train(net: nn.Module, zero: Callable[[int], None], step: Callable[[], None]) -> None:
    """Two backwards for each step."""
    for number in range(STEPS):
        zero(number)
        for micro in range(2):
            net(inputs(number + micro)).square().mean().backward()
        step()


def one_process() -> dict[str, torch.Tensor]:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, lambda _: optimizer.zero_grad(), optimizer.step)
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def body(group: Group) -> dict[str, Any]:
    net, rank = model(), group.place.rank
    styles = {"1": ColwiseParallel(), "3": RowwiseParallel()}  # "0" stays plain: the ranks hold it alike
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    parallelize_module(net, group.tensor_mesh(), styles)
    cuts = {"1.weight": 0, "1.bias": 0, "3.weight": 1}
    edges = ((0, 3), (3, 6))
    specs = []
    for name, shape in shapes.items():
        for each in range(2) if name in cuts else [0]:
            part = Part(shape, cuts[name], (edges[each],)) if name in cuts else None
            shape_here = part.local_shape if part else shape
            specs.append(TensorSpec(name, (), shape_here, "float32", "trainable", 0, each, part))
    layout = plan(ModelSpec(tuple(specs), "SGD", ({"lr": 0.1},), "average", 2), 1, 32)
    mine = {n: p for n, p in net.named_parameters() if n in cuts or rank == 0}
    guests = [p for n, p in net.named_parameters() if n not in mine]
    space = FlatSpace(layout, mine, torch.device("cpu"), column=rank)
    assert sum(len(flat) for flat in space.weights.values()) == sum(local(p).numel() for p in mine.values())
    for (parameter, gradient, chunks), (name, given) in zip(space.watched, reversed(mine.items()), strict=True):
        assert parameter is given, name
        assert parameter.grad is gradient
        assert {layout.column_of(chunk) for chunk in chunks} == {rank}
    optimizer = torch.optim.SGD([*mine.values(), *guests], lr=0.1, momentum=0.9)

    def zero(number: int) -> None:
        if number == 1:  # as a script may do it: torch then takes whatever it finds as the gradient
            net.zero_grad()
        elif number == 2:
            for parameter in mine.values():
                assert parameter.grad is not None
                parameter.grad.zero_()
            for parameter in guests:
                parameter.grad = None
        else:
            space.zero_gradients()

    def step() -> None:
        space.gather_gradients()
        flat = space.gradients[space.column.segments[0].index]
        for piece in space.column.segments[0].pieces:
            gradient = local(mine[layout.model.tensors[piece.tensor].name].grad)  # type: ignore[arg-type]
            assert torch.equal(flat[piece.start : piece.stop], gradient.reshape(-1))
            assert gradient.data_ptr() == flat[piece.start :].data_ptr()
        optimizer.step()

    train(net, zero, step)
    space.gather_gradients()
    return {
        "flat": {i: flat.numpy() for i, flat in space.weights.items()},
        "replicate": _replicated(group, layout),
    }


def _replicated(group: Group, layout: Any) -> bool:
    """A gradient of another placement than its parameter is brought to that: here the sum of what the ranks have."""
    mesh = group.tensor_mesh()
    parameter = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    spec = ModelSpec((TensorSpec("w", (), (3,), "float32", "trainable", 0),), "SGD", ({"lr": 0.1},), "average")
    space = FlatSpace(plan(spec, 1, 64), {"w": parameter}, torch.device("cpu"))
    parameter.grad = None
    found = DTensor.from_local(torch.full((3,), 1.0 + group.place.rank), mesh, [Partial()])
    parameter.grad = found
    space.gather_gradients()
    [flat] = space.gradients.values()
    return flat.tolist() == [3.0] * 3


def test_split_parameters_are_views_and_train_as_the_whole_does() -> None:
    found = run_ranks(body, (2,))
    wanted = one_process()
    assert all(rank["replicate"] for rank in found)
    [first] = found[0]["flat"].values()
    [second] = found[1]["flat"].values()
    # the last tensor comes first
    whole = [wanted[n] for n in ("3.bias", "3.weight", "1.bias", "1.weight", "0.bias", "0.weight")]
    ours = [whole[0], whole[1][:, :3], whole[2][:3], whole[3][:3], whole[4], whole[5]]
    theirs = [whole[1][:, 3:], whole[2][3:], whole[3][3:]]
    assert torch.allclose(torch.from_numpy(first), torch.cat([t.reshape(-1) for t in ours]), atol=1e-6)
    assert torch.allclose(torch.from_numpy(second), torch.cat([t.reshape(-1) for t in theirs]), atol=1e-6)
