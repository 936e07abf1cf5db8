"""The examples of reinforcement learning, with four actor-learners, until the pole stays up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(200)]

EXAMPLES = Path(__file__).parents[2] / "examples"
SOLVED = 475.0
MOST_S = 150.0


@pytest.mark.parametrize("name", ["cartpole_a3c", "cartpole_impala"])
def test_four_actor_learners_reach_a_mean_return_of_475(box: Box, name: str) -> None:
    pytest.importorskip("gymnasium", reason="of the examples extra")
    options = ("-w", "4", "-s", "1", "--mode", "async", "--threads", "1", "--json")
    ended = box.start(*options, str(EXAMPLES / f"{name}.py")).end(MOST_S)
    assert ended.code == 0, ended.text
    document = ended.document
    assert (document["state"], document["warnings"]) == ("SUCCEEDED", [])
    rows = [json.loads(line) for line in (ended.out / "metrics.jsonl").read_text().splitlines()]
    [end] = [row["ends"] for row in rows if "ends" in row]
    assert end.startswith("mean return "), "it was not the number of updates that ended it"
    assert float(end.split()[2]) >= SOLVED
    assert {row["worker"] for row in rows if "policy_lag" in row} == {0, 1, 2, 3}
    assert max(row.get("policy_lag", 0) for row in rows) > 0
