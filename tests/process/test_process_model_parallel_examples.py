"""The examples of replicas of several workers, each split in the way that it is there to show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

if TYPE_CHECKING:
    from conftest import Box, Ended

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(120)]

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE = ("-s", "1", "--mode", "sync", "--threads", "1", "--json")
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inception_branches": (("-w", "2", "--tensor", "2"), ("--epochs", "1", "--batch-size", "72", "--log-every", "1")),
    "unet_pipeline": (("-w", "3", "--pipeline", "3"), ("--epochs", "1", "--batch-size", "144", "--log-every", "1")),
    "char_transformer": (
        ("-w", "2", "--pipeline", "2"),
        ("--steps", "11", "--max-chars", "20000", "--width", "32", "--layers", "2", "--batch-size", "8"),
    ),
}
"""By example: how its replica is made, and how it is kept short."""


def losses(ended: Ended) -> list[float]:
    """What the chief has logged, in order."""
    rows = [json.loads(line) for line in (ended.out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def shapes(ended: Ended) -> dict[str, list[int]]:
    """Of the weights that the job has left."""
    with safe_open(ended.out / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_each_example_learns_and_leaves_the_whole_model(box: Box) -> None:
    started = {
        name: box.start(*ONE, *options, str(EXAMPLES / f"{name}.py"), *arguments, out=name)
        for name, (options, arguments) in RUNS.items()
    }
    ended = {name: running.end(100.0) for name, running in started.items()}
    for name, each in ended.items():
        assert each.code == 0, each.text
        assert (each.document["replicas"], each.document["warnings"]) == (1, []), name
        found = losses(each)
        assert found[-1] < 0.9 * found[0], name
    inception, unet, transformer = (ended[name] for name in RUNS)

    assert inception.document["ranks"] == 2
    assert losses(inception)[-1] < 1.0
    assert 0 < inception.document["metrics"]["test_accuracy"] <= 1
    assert shapes(inception)["mixed2.2.1.0.weight"] == [32, 32, 5, 5]
    assert shapes(inception)["head.2.weight"] == [10, 512]

    assert unet.document["ranks"] == 3
    assert unet.document["metrics"]["test_error"] < 0.4
    assert shapes(unet)["leave.weight"] == [1, 16, 1, 1]
    assert unet.document["steps"] == 10

    assert transformer.document["ranks"] == 2
    assert 0 < transformer.document["metrics"]["validation_loss"] < math.log(100)
    found = shapes(transformer)
    assert found["layers.1.self_attn.in_proj_weight"] == [96, 32]
    assert "mask" not in found
