"""What the automatic plan of tensor parallelism understands, and what it leaves whole; no ranks are needed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from downpour.parallel.branches import Branches, balanced
from downpour.parallel.plan import Plan
from downpour.parallel.tensor import describe_plan
from downpour.parallel.tensor_auto import choose
from downpour_common.errors import ModelError
from tensor_models import MODELS, Gated


def found(model: nn.Module, width: int = 2, **plan: Any) -> dict[str, str]:
    return {choice.name: choice.how for choice in choose(model, width, Plan(**plan))}


class Calls(nn.Module):
    """Two layers, called as ``forward`` says."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.seen: Any = None
        self.says = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.says(self, x)
        return out


PAIR = {"a": "columns", "b": "rows", "c": "gather"}
ALONE = dict.fromkeys("abc", "gather")


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.c(m.b(m.act(m.a(x)))), PAIR),
        (lambda m, x: m.c(m.b(torch.tanh(m.a(x)) * 2 + 1)), PAIR),
        (lambda m, x: m.c(m.b(m.drop(m.a(x)))), {**PAIR, "drop": "channels"}),
        (lambda m, x: m.b(m.a(x) * F.silu(m.c(x))), {"a": "columns", "c": "columns", "b": "rows"}),
        (lambda m, x: m.c(m.b(F.softmax(m.a(x), -1))), {"a": "gather", "b": "columns", "c": "rows"}),
        (lambda m, x: m.c(m.b(F.dropout(m.a(x), 0.5, m.training))), {"a": "gather", "b": "columns", "c": "rows"}),
        (lambda m, x: m.c(x + m.b(m.act(m.a(x)))), PAIR),
        # The sum needs all of what `a` gives, and so does `b`, whose output it takes.
        (lambda m, x: m.c((h := m.act(m.a(x))) + m.b(h)), {"a": "gather", "b": "gather", "c": "gather"}),
        (lambda m, x: m.c(m.a(m.act(m.a(x)))) + m.b(x), ALONE),
        (lambda m, x: m.b(m.act(m.a(x))) if m.training else m.a(x), ALONE),
        (lambda m, x: m.c(m.b(m.act(m.a(x)))) @ m.a.weight, {"b": "columns", "c": "rows"}),
        (lambda m, x: m.c(m.b(m.act(m.a(x)))) if x.sum() > 0 else x, ALONE),
        (lambda m, x: m.c(m.b(m.act(m.drop(m.a(m.drop(x)))))), {"a": "gather", "b": "columns", "c": "rows"}),
    ],
)
def test_layers_stay_split_where_nothing_needs_them_whole(forward: Any, expected: dict[str, str]) -> None:
    assert found(Calls(forward)) == expected


def test_looking_changes_nothing() -> None:
    def forward(m: Calls, x: torch.Tensor) -> torch.Tensor:
        m.seen = x
        torch.rand(3)
        return m.b(m.act(m.a(x)))

    model = Calls(forward).eval()
    model.a.train()
    state = torch.get_rng_state()
    assert found(model)["b"] == "rows"
    assert model.seen is None
    assert (model.training, model.a.training, model.b.training) == (False, True, False)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_not_a_module_of_torchs_stays_whole() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda m, given, out: out * 2)
    normed = parametrizations.weight_norm(nn.Linear(8, 8))
    for odd in (Scaled(8, 8), hooked, normed, nn.Bilinear(8, 8, 8), nn.LSTM(8, 8), nn.PReLU(8)):
        assert "1" not in found(nn.Sequential(nn.Linear(8, 8), odd, nn.Linear(8, 8)))
    assert found(nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8))) == {"0": "gather", "2": "gather"}
    shared = nn.Linear(8, 8)
    twice = nn.Linear(8, 8)
    twice.weight = shared.weight
    assert found(nn.Sequential(shared, nn.ReLU(), twice)) == {}
    assert found(nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8))) == {"2": "gather"}
    many = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.Sigmoid(), nn.Linear(128, 2))
    assert found(many) == {"0": "columns", "2": "rows"}, "a small layer by itself is not worth the gathering"


def test_attention_that_is_not_understood_stays_whole() -> None:
    for odd in (
        nn.MultiheadAttention(8, 1),
        nn.MultiheadAttention(8, 4, add_bias_kv=True),
        nn.MultiheadAttention(8, 4, add_zero_attn=True),
    ):
        assert found(nn.ModuleList([odd])) == {}
    layer = nn.TransformerEncoderLayer(8, 4, 16, activation=lambda x: x.softmax(-1))
    assert found(layer) == {"self_attn": "heads", "linear1": "gather", "linear2": "gather"}
    decoder = found(nn.TransformerDecoderLayer(8, 4, 16))
    assert decoder == {
        "self_attn": "heads",
        "multihead_attn": "heads",
        "linear1": "columns",
        "linear2": "rows",
        "dropout": "channels",
    }


def test_leaves_are_not_looked_into() -> None:
    model = nn.Sequential(Gated(8, 16))
    assert found(model) == {"0.w1": "columns", "0.w3": "columns", "0.w2": "rows"}
    assert found(model, leaf=["0"]) == {"0.w1": "gather", "0.w3": "gather", "0.w2": "gather"}


def test_branches_are_balanced_and_whole() -> None:
    model = nn.Sequential(Branches([nn.Linear(8, n) for n in (2, 9, 4, 3)], dim=-1), nn.Linear(18, 3))
    assert balanced(model[0], 2) == (1, 0, 1, 1)  # type: ignore[arg-type]
    assert balanced(model[0], 5) == (3, 0, 1, 2)  # type: ignore[arg-type]
    assert found(model) == {"0": "branches", "1": "gather"}
    x = torch.randn(2, 8)
    assert torch.equal(model[0](x), torch.cat([branch(x) for branch in model[0]], -1))  # type: ignore[union-attr, operator]
    with pytest.raises(ModelError, match="some modules"):
        Branches([])


def test_the_plan_in_words() -> None:
    lines = describe_plan(MODELS["encoder"][0](), 2)
    assert lines[0] == "embedding: Embedding by gather, 1,152 of 2,304 bytes a rank"
    assert lines[1] == "encoder.layers.0.self_attn: MultiheadAttention by heads, 4,848 of 9,600 bytes a rank"
    assert lines[-2:] == [
        "everything else: whole on every rank, 1,440 bytes",
        "together: 19,560 of 37,296 bytes a rank (52 %)",
    ]
    tied = describe_plan(MODELS["tied"][0](), 2)
    total = sum(p.numel() * 4 for p in MODELS["tied"][0]().parameters())
    assert re.match(rf"together: [0-9,]+ of {total:,} bytes a rank \(53 %\)", tied[-1])
    given = describe_plan(
        MODELS["perceptron"][0](), 3, Plan(tensor={"0": "columns", "[358]": "replicate", "3": "rows"})
    )
    assert given[0] == "0: Linear by columns, 320 of 960 bytes a rank"
    assert given[1] == "3: Linear by rows, 468 of 1,300 bytes a rank"
    assert len(given) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"tensor": "all"},
        {"tensor": {"a": "colums"}},
        {"tensor": {"a": 3}},
        {"branches": {"a": [-1]}},
        {"split": "a"},
        {"split": ["a", "a"]},
        {"leaf": "a"},
    ],
)
def test_a_plan_that_means_nothing(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ModelError, match=name):
        Plan(**options)
