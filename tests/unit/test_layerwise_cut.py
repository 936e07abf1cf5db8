"""``fetch=layers``: how a model is cut, who has room, and what parameters are while their weights are elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from downpour.layerwise.layers import Layers, divide, in_cells, members
from downpour.layerwise.ledger import Ledger
from downpour.layerwise.parameters import AbsentParameter, absent, pushed
from downpour.layerwise.start import Unmade
from downpour.model import describe
from downpour_common.config import job_spec, parse_settings
from downpour_common.errors import ConfigError, ModelError
from downpour_common.layout import plan


def cut(model: nn.Module, memory: int = 0) -> Layers:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    described = describe(model, optimizer, "average", meta=True)
    return divide(model, described.spec, described.tensors, memory)


def test_small_modules_that_follow_each_other_are_one_layer() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.Linear(600, 600), nn.Linear(10, 10), nn.ReLU())
    layers = cut(model, memory=8_000_000)
    assert [layer.parameters for layer in layers.all] == [
        ("0.weight", "0.bias", "1.weight", "1.bias"),
        ("2.weight", "2.bias"),
        ("3.weight", "3.bias"),
    ]
    assert layers.all[1].needs == 2 * (600 * 601) * 4 + 600 * 600 * 4
    assert layers.used_by[model[3]] == (2,)


def test_modules_that_use_their_childrens_parameters_are_one_unit() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.ModuleList([nn.Linear(2, 2)]))
    layers = cut(model)
    assert set(layers.used_by) == {model[0], model[1][0]}  # type: ignore[index]
    assert members(model[0])[-1] is model[0]
    assert len({m for m in members(model[0]) if isinstance(m, nn.Linear)}) == 3


def test_parameters_in_lists_belong_to_who_has_the_list() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.listed = nn.ParameterList([nn.Parameter(torch.ones(3))])

    model = nn.Sequential(Owner())
    assert list(cut(model).used_by) == [model[0]]


def test_tied_weights_belong_to_the_first_layer_and_are_used_by_both() -> None:
    model = nn.Sequential(nn.Embedding(600, 600), nn.Linear(600, 600, bias=True))
    model[1].weight = model[0].weight
    layers = cut(model, memory=8_000_000)
    assert layers.all[0].parameters == ("0.weight",)
    assert layers.used_by[model[1]] == (0, 1)


def test_each_layer_lies_in_a_cell_of_its_own_over_all_shards() -> None:
    model = nn.Sequential(*[nn.Linear(600, 600) for _ in range(3)])
    described = describe(model, torch.optim.SGD(model.parameters(), lr=0.1), "average")
    layers = divide(model, described.spec, described.tensors, 8_000_000)
    layout = plan(in_cells(described.spec, layers), 2, 1 << 20)
    for layer in layers.all:
        assert {c.shard for c in layout.chunks if c.cell == layer.index} == {0, 1}


def test_a_budget_is_chosen_or_checked() -> None:
    model = nn.Sequential(*[nn.Linear(600, 600) for _ in range(3)])
    needs = cut(model).all[0].needs
    assert cut(model).budget == needs + 600 * 601 * 4
    assert cut(model, needs).budget == needs
    with pytest.raises(ModelError, match=f"layer 0 alone needs .*--set memory={needs}"):
        cut(model, needs - 1)


def test_the_ledger_knows_the_most_that_was_held() -> None:
    ledger = Ledger(100)
    ledger.take(60)
    assert (ledger.lacks(40), ledger.lacks(50)) == (0, 10)
    ledger.give(50)
    ledger.take(20)
    assert (ledger.held, ledger.peak) == (30, 60)


def test_an_absent_parameter_tells_its_shape_and_nothing_else() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.data = absent(parameter)
    parameter.__class__ = AbsentParameter
    assert (parameter.shape, parameter.numel(), parameter.dtype) == ((3, 2), 6, torch.float32)
    with pytest.raises(ModelError, match=r"linear was called .* fetch=whole"):
        nn.functional.linear(torch.ones(1, 2), parameter)


def test_a_pushed_gradient_is_there_and_cannot_be_read() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = pushed(parameter)
    assert parameter.grad is not None
    with pytest.raises(ModelError, match="register_hook"):
        nn.utils.clip_grad_norm_([parameter], 1.0)


def test_a_module_that_cannot_make_its_parameters_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Bare())
    with pytest.raises(ModelError, match=r"module 1 \(Bare\) .* no reset_parameters"):
        Unmade(model)


def test_buffers_on_the_meta_device_are_brought_to_the_host_and_shared_ones_stay_so() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].running_mean = model[0].running_mean
    Unmade(model)
    assert not any(b.is_meta for b in model.buffers())
    assert model[1].running_mean is model[0].running_mean


def test_a_model_on_the_meta_device_needs_layers() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="--set fetch=layers"):
        describe(model, torch.optim.SGD(model.parameters(), lr=0.1), "average")


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (["fetch_ahead=true"], "goes without fetch_ahead"),
        (["n_push=2"], "goes without n_push and n_fetch"),
        (["autocast=bfloat16"], "goes without autocast"),
    ],
)
def test_what_holds_all_weights_does_not_go_with_layers(others: list[str], reason: str) -> None:
    settings = parse_settings(["fetch=layers", *others])
    with pytest.raises(ConfigError, match=reason):
        job_spec(name="n", script="s", workers=1, shards=1, settings=settings)


def test_memory_belongs_to_layers() -> None:
    spec = job_spec(
        name="n", script="s", workers=1, shards=1, settings=parse_settings(["fetch=layers", "memory=64MiB"])
    )
    assert spec.settings.memory == 64 << 20
    with pytest.raises(ConfigError, match="add --set fetch=layers"):
        job_spec(name="n", script="s", workers=1, shards=1, settings=parse_settings(["memory=64MiB"]))
