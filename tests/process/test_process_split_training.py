"""A model that is split over the ranks of a replica ends with the weights of one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from split_runs import DEADLINE_S, LIMIT, command, difference, one_process


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "tensor", "pipeline", "replicas"),
    [
        pytest.param("cnn", 2, 1, 2, marks=pytest.mark.long),
        pytest.param("mlp", 1, 3, 1, marks=pytest.mark.long),
        ("tied", 2, 2, 1),
    ],
    ids=["tensor", "pipeline", "both"],
)
def test_split_training_equals_one_process(
    tmp_path: Path, kind: str, tensor: int, pipeline: int, replicas: int
) -> None:
    out = tmp_path / "out"
    ended = subprocess.run(
        command(kind, tensor, pipeline, replicas, out), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert difference(one_process(kind), out) < LIMIT
