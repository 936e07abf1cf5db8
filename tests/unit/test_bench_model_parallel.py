"""The figures of model shards: what is counted, and the tables that show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAMP = {
    "date": "2026-11-21T12:00:00+00:00",
    "machine": {"cpu_model": "Abacus", "cores": 2, "torch": "2.13.0", "libzmq": "4.3.5"},
}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "scripts"))


def section(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**STAMP, "rows": rows}


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    from stages import Kept, _Saved

    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    x = torch.randn(8, 16)
    kept = Kept(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.unpack):
        found = model(x).sum()
        # The input and what either tanh gives: the first of them is the second layer's input as well.
        assert kept.now == 3 * x.nbytes
        found.backward()
    assert (kept.now, kept.most) == (0, 3 * x.nbytes)
    assert model[0].weight.grad is not None


def test_a_sleeping_stage_computes_what_it_would_awake() -> None:
    from stages import make_model

    model = make_model("sleep", 2, 0.0)
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    expected = nn.Sequential(*(stage.linear for stage in model))
    again = x.detach().clone().requires_grad_()
    expected(again).sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert torch.equal(x.grad, again.grad)


def test_growth_is_of_the_rank_that_keeps_most() -> None:
    from bench_lib.model_parallel import grows

    rows = [
        {"schedule": schedule, "microbatches": m, "activations": [m * 2 if schedule == "gpipe" else 8, 1]}
        for schedule in ("gpipe", "1f1b")
        for m in (4, 8, 32)
    ]
    assert (grows(rows, "gpipe"), grows(rows, "1f1b")) == (8.0, 1.0)


def test_tables() -> None:
    from bench_lib.markdown import model_parallel

    memory = [
        {"schedule": s, "microbatches": m, "activations": [m * 10**6, 1], "peak_memory": [2 * 10**8]}
        for s in ("gpipe", "1f1b")
        for m in (4, 8)
    ]
    ranks = [{"weights": 5 * 10**6, "moved": 10**7}, {"weights": 5 * 10**6, "moved": 9 * 10**6}]
    part = {"model": "mlp25m", "way": "tensor 2", "ranks": ranks, "weights_share": 0.5, "moved_share": 0.51}
    document = {
        "sections": {
            "weights": section([{"model": "mlp", "split": "a x b", "replicas": 2, "largest_difference": 1.5e-7}]),
            "utilisation": section([{"schedule": "1f1b", "microbatches": 4, "utilisation": 0.561, "theory": 4 / 7}]),
            "memory": section(memory),
            "parts": section([part]),
            "steps": section([{"model": "transformer", "way": "unsplit", "step_s": 0.5, "ratio": 1.0}]),
        }
    }
    lines = model_parallel(document)
    assert "| `1f1b` | 56.1 % of 57.1 % |" in lines
    assert "| kept for backward, `gpipe` | 4.0 | 8.0 |" in lines
    assert "| MLP of 25 million parameters, tensor 2 | 5.0, 5.0 | 10.0, 9.0 | 50.0 % | 51.0 % |" in lines
    assert "| transformer of 11 million, unsplit | 500 ms | 1.00 |" in lines
    assert "| a × b, 2 replicas | 1.5e-07 |" in lines
    assert model_parallel({"sections": {}}) == []


def test_layer_by_layer() -> None:
    from bench_lib.markdown import layerwise

    row = {"workers": 1, "batch": 64, "peak": 3 * 10**8, "held": 0, "budget": 0, "moved": 0, "step_s": 0.1}
    budgeted = {"held": 33 * 10**6, "budget": 34 * 10**6, "moved": 2 * 10**8, "step_s": 0.25}
    results = [{**row, "way": "plain"}, {**row, "way": "whole, memory"}, {**row, **budgeted, "way": "layers"}]
    lines = layerwise({**STAMP, "settings": {"model_bytes": 10**8}, "results": results})
    assert "| `fetch=layers`, 1 × 64 samples | 34.0 | 33.0 | 300.0 | 200.0 | 250 ms | 2.50 |" in lines
    assert not any("plain" in line for line in lines)
