"""Mode lbfgs with real processes: a worker and a shard are killed on the way to the minimum that torch finds alone."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(150)]
KILLS = "worker.push.before[worker/1#0]=kill@9; shard.reply.before[server/1#0]=kill@150"


def test_the_minimum_is_that_of_one_process_whoever_is_killed(box: Box) -> None:
    ended = box.command([sys.executable, "full_batch.py"], box.folder).end()
    assert ended.code == 0, ended.text
    options = ("-w", "2", "-s", "2", "--json", "--restarts", "3", "--mode", "lbfgs", "--set", "checkpoint_s=0.5")
    job = box.run(*options, "full_batch.py", DOWNPOUR_FAILPOINTS=KILLS)
    assert job.code == 0, job.text
    alone = re.search(r"minimum (\S+) gradient", ended.stdout)
    found = set(re.findall(r"worker/\d minimum (\S+) gradient", job.text))
    assert alone is not None
    assert len(found) == 1, job.text
    assert abs(float(found.pop()) - float(alone[1])) <= 1e-4 * float(alone[1])
    assert job.document["restarts"] >= 1
    assert job.document["metrics"]["loss"] == pytest.approx(float(alone[1]), rel=1e-4)
