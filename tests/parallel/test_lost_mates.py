"""What a rank makes of it when another rank of its replica is no more, or does something else."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from downpour.parallel.group import Group, Place
from downpour_common.errors import MateLost
from ranks import run_ranks

pytestmark = [pytest.mark.process, pytest.mark.long]

CLOSED = (
    "[pair.cc:553] Connection closed by peer [127.0.0.1]:5540. This is typically caused by a remote worker crashing."
)


def _losing(group: Group) -> list[tuple[bool, str, str]]:
    """Rank 1 leaves; rank 0 waits for it."""
    if group.place.rank == 1:
        return []
    with pytest.raises(RuntimeError) as raised:
        group.reduce(torch.zeros(4))
    lost = group.lost(raised.value, 3)
    assert lost is not None, raised.value
    return [(lost.late, lost.peer, str(lost))]


@pytest.mark.process
def test_gloos_words_about_a_rank_that_has_gone_are_understood() -> None:
    [(late, peer, message)], _ = run_ranks(_losing, (2,))
    assert not late
    assert peer == "worker/7"
    assert message.startswith("worker/7 has ended, or ended its script, before the other ranks of replica 3. Look at")


def test_the_words_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    group = Group(Place(0, (1,)), HashStore(), torch.device("cpu"), 6.0)
    group.place = Place(1, (2, 1))
    try:
        late = group.lost(RuntimeError("[/gloo/buffer.cc:78] Timed out waiting 6000ms for recv operation"), 1)
        gone = group.lost(RuntimeError(f"[/p/gloo/{CLOSED[1:]}"), 1)
        assert isinstance(late, MateLost)
        assert isinstance(gone, MateLost)
        assert (late.late, gone.late, late.peer) == (True, False, "one of worker/3, worker/5")
        assert "within 6 s. All ranks of a replica run the same steps" in str(late)
        assert group.lost(dist.DistNetworkError("failed to recv, got 0 bytes"), 1) is not None
        assert group.lost(dist.DistStoreError("wait timeout after 300000ms, keys: /0"), 1) is not None
        for other in (
            RuntimeError(CLOSED),
            RuntimeError("[/gloo/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 800 vs 400"),
            dist.DistBackendError("NCCL error: invalid usage"),
            ValueError("connection reset by peer in /gloo/"),
        ):
            assert group.lost(other, 1) is None
    finally:
        group.close()
