"""A model split over tensor ranks: the same outputs, gradients and steps as the unsplit model's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.utils.checkpoint import checkpoint

from downpour.parallel.group import Group, Place
from downpour.parallel.held import Held
from downpour.parallel.plan import Plan
from downpour.parallel.tensor import split_tensor
from downpour.space import local
from downpour_common.errors import ModelError
from downpour_common.layout import Part
from ranks import run_ranks
from tensor_models import MODELS

pytestmark = pytest.mark.process

NEAR = 1e-5


def named(model: nn.Module) -> dict[int, str]:
    """The first names of a model's tensors."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return names


def of(whole: torch.Tensor, held: Held) -> torch.Tensor:
    """What a rank should hold of ``whole``."""
    if held.part is None:
        return whole
    assert held.part.shape == tuple(whole.shape)
    return torch.cat([whole.narrow(held.part.dim, a, b - a) for a, b in held.part.ranges], held.part.dim)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one.detach().double() - other.detach().double()).abs().max()) if one.numel() else 0.0


def steps(model: nn.Module, split: nn.Module, inputs: torch.Tensor, count: int) -> dict[str, float]:
    """Train both models alike; how far their outputs and random generators are apart."""
    found = {}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, split)]
    for step in range(count):
        outputs, after = [], []
        for m, optimizer in zip((model, split), optimizers, strict=True):
            torch.manual_seed(step)
            if step:
                optimizer.step()
            optimizer.zero_grad()
            out = m(inputs)
            (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).mean().backward()
            outputs.append(out)
            after.append(torch.rand(3))
        found[f"output {step}"] = far(*outputs)
        found[f"generator {step}"] = far(*after)
    return found


def gradients(model: nn.Module, held: list[Held]) -> dict[str, float]:
    """How far this rank's gradients are from the unsplit model's."""
    whole, found = dict(model.named_parameters()), {}
    for h in held:
        if isinstance(h.tensor, nn.Parameter):
            expected, got = whole[h.name].grad, h.tensor.grad
            assert expected is not None
            assert got is not None, h.name
            found[f"gradient {h.name}"] = far(of(expected, h), local(got))
    return found


def compared(group: Group, model: nn.Module, inputs: torch.Tensor, plan: Plan | None = None) -> dict[str, Any]:
    """Train ``model`` whole and split, side by side; the largest differences, and what this rank holds.

    Gradients in fp32; the steps in fp64, because AdamW makes steps of full size of the rounding errors of gradients
    that are zero, such as those of the keys' biases in attention.
    """
    split = copy.deepcopy(model)
    before = list(split.parameters())
    held = split_tensor(split, group, plan, named(split))
    apart = steps(model, split, inputs, 1) | gradients(model, held)
    sizes = {id(local(p)): local(p).untyped_storage().nbytes() for p in (*before, *split.parameters())}
    found: dict[str, Any] = {
        "held": [(h.name, h.part) for h in held],
        "far": apart,
        "share": sum(sizes.values()) / sum(p.untyped_storage().nbytes() for p in model.parameters()),
    }
    model, split = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    held = split_tensor(split, group, plan, named(split))
    count = 6 if group.place.width == 2 else 2
    exact = inputs.double() if inputs.is_floating_point() else inputs
    apart |= {f"{what}, fp64": value for what, value in steps(model, split, exact, count).items()}
    whole = dict(model.named_parameters()) | dict(model.named_buffers())
    for h in held:
        apart[f"weight {h.name}"] = far(of(whole[h.name], h), local(h.tensor))
    model.eval()
    split.eval()
    with torch.no_grad():
        apart["evaluated"] = far(model(exact), split(exact))
    return found


def every_model(group: Group) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (build, example) in MODELS.items():
        torch.manual_seed(3)
        found[name] = compared(group, build(), example())
    return found


def check_cover(ranks: list[list[tuple[str, Part | None]]], model: nn.Module) -> None:
    """What the ranks hold of each tensor is the whole, once."""
    parts: dict[str, list[Part]] = {}
    for held in ranks:
        for name, part in held:
            if part is not None:
                parts.setdefault(name, []).append(part)
    names = set(named(model).values())
    assert {name for held in ranks for name, _ in held} == names
    for name, found in parts.items():
        whole = model.state_dict()[name]
        assert {(p.shape, p.dim) for p in found} == {(tuple(whole.shape), found[0].dim)}
        ends = sorted(r for p in found for r in p.ranges)
        assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]
        assert ends[-1][1] == whole.shape[found[0].dim]


@pytest.mark.parametrize("width", [2, pytest.param(3, marks=pytest.mark.long)])
def test_every_model_is_trained_as_if_unsplit(width: int) -> None:
    ranks = run_ranks(every_model, (width,))
    for name, (build, _) in MODELS.items():
        for found in ranks:
            assert not {what: value for what, value in found[name]["far"].items() if not value < NEAR}, name
            assert found[name]["share"] < {2: 0.57, 3: 0.56 if name == "branches" else 0.43}[width]
        check_cover([found[name]["held"] for found in ranks], build())


class Sequence(nn.Module):
    """Blocks for a plan in torch's terms, in which the norm works on a part of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6), "norm": nn.LayerNorm(6)}) for _ in range(2)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["norm"](layer["down"](torch.relu(layer["up"](x))))
        out: torch.Tensor = self.head(x)
        return out


def plans(group: Group) -> list[Any]:
    torch.manual_seed(5)
    torchs = Plan(
        tensor={
            "layers.0.up": ColwiseParallel(),
            "layers.1.up": ColwiseParallel(input_layouts=Shard(1)),
            "layers.*.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "layers.*.norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    )
    ours = Plan(tensor={"0": "gather", "3": "columns", "5": "rows", "7.*": "replicate", "8": "gather"})
    placed = Plan(branches={"mixed": [1, 0, 0], "summed": [1, 1]})
    found: list[Any] = [
        compared(group, Sequence(), torch.randn(3, 4, 6), torchs),
        compared(group, MODELS["perceptron"][0](), MODELS["perceptron"][1](), ours),
        compared(group, MODELS["branches"][0](), MODELS["branches"][1](), placed),
    ]
    for plan in (
        Plan(tensor={"nowhere.*": "rows"}),
        Plan(tensor={"1": "columns"}),
        Plan(tensor={"0": "heads"}),
        Plan(branches={"0": [0]}),
    ):
        with pytest.raises(ModelError) as error:
            split_tensor(model := MODELS["perceptron"][0](), group, plan, named(model))
        found.append(str(error.value))
    model = MODELS["tied"][0]()
    with pytest.raises(ModelError, match="one parameter"):
        split_tensor(model, group, Plan(tensor={"embedding": "columns"}), named(model))
    model = MODELS["tied"][0]()
    held = split_tensor(model, group, None, named(model), whole={"embedding.weight"})
    found.append({h.name: h.part for h in held}["embedding.weight"])
    return [*found, *under_autocast(group)]


def under_autocast(group: Group) -> tuple[float, float]:
    """How far a split encoder's gradients are off in bf16, relatively; and in fp32 with activation checkpointing."""
    model, tokens = MODELS["encoder"][0](), MODELS["encoder"][1]()
    split = copy.deepcopy(model)
    held = split_tensor(split, group, None, named(split))
    for m in (model, split):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            m(tokens).float().pow(2).mean().backward()
    size = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    first = max(gradients(model, held).values()) / size
    for m in (model, split):
        torch.manual_seed(0)
        m.zero_grad()
        checkpoint(m, tokens, use_reentrant=False).pow(2).mean().backward()
    return first, max(gradients(model, held).values())


@pytest.mark.long
def test_plans_of_the_user() -> None:
    ranks = run_ranks(plans, (2,))
    for rank, found in enumerate(ranks):
        for each in found[:3]:
            assert not {what: value for what, value in each["far"].items() if not value < NEAR}
        assert {"7.w1.weight", "3.bias"} & {name for name, part in found[1]["held"] if part is None} == {"7.w1.weight"}
        assert (("summed.0.weight", None) in found[2]["held"]) == (rank == 1)
        assert [text.split(":")[0][:40] for text in found[3:7]] == [
            "Plan(tensor=...) names 'nowhere.*', but ",
            "1 is a ReLU, which cannot be split by co",
            "Linear cannot be split by heads over 2 r",
            "Plan(branches=...) names 0, a Linear",
        ]
        assert found[7] is None
        assert found[8] < 0.05
        assert found[9] < NEAR


def test_one_rank_changes_nothing() -> None:
    model = MODELS["encoder"][0]()
    before = dict(model.named_parameters())
    alone = cast(Group, SimpleNamespace(place=Place(0, (1,))))
    held = split_tensor(model, alone, None, named(model))
    assert [(h.name, h.part) for h in held] == [(name, None) for name in before]
    assert all(h.tensor is before[h.name] for h in held)
