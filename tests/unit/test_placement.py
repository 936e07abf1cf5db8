"""Which process runs on which node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from coordinator_kit import spec_of
from hypothesis import given
from hypothesis import strategies as st

from downpour_coordinator.placement import Place, Room, place, place_gang

MIB = 1 << 20


def workers(name: str, slots: int, **fields: Any) -> Room:
    return Room(name, "worker", fields.pop("labels", {}), slots, **fields)


def servers(name: str, memory_mib: int = 4096, slots: int = -1, **fields: Any) -> Room:
    return Room(name, "server", fields.pop("labels", {}), slots, memory_mib * MIB, **fields)


def nodes(places: dict[tuple[str, int], Place] | str, role: str) -> list[str]:
    assert not isinstance(places, str), places
    return [p.node for (r, _), p in places.items() if r == role]


# ---------------------------------------------------------------- one after another


def test_shards_are_spread() -> None:
    spec = spec_of(workers=1, shards=4)
    found = place_gang(spec, [servers("a"), servers("b"), workers("w", 1)], 1, 1)
    assert nodes(found, "server") == ["a", "b", "a", "b"]


def test_shards_of_one_job_avoid_each_other_before_they_avoid_others() -> None:
    spec = spec_of(shards=2)
    rooms = [servers("a", used=5), servers("b", used=1, of_this_job=1)]
    assert nodes(place(spec, [("server", 0)], rooms), "server") == ["a"]


def test_shards_go_where_least_is_used() -> None:
    rooms = [servers("a", used=5), servers("b", used=1)]
    assert nodes(place(spec_of(), [("server", 0)], rooms), "server") == ["b"]


def test_workers_go_where_most_is_free() -> None:
    found = place_gang(spec_of(workers=5), [servers("s"), workers("a", 2), workers("b", 4)], 5, 5)
    assert Counter(nodes(found, "worker")) == {"a": 2, "b": 3}
    assert nodes(found, "worker")[:2] == ["b", "b"]


def test_memory_is_counted() -> None:
    spec = spec_of(shards=3, shard_memory="512MiB")
    rooms = [servers("a", 1024), servers("b", 600)]
    assert sorted(nodes(place(spec, [("server", i) for i in range(3)], rooms), "server")) == ["a", "a", "b"]
    found = place(spec, [("server", 3)], rooms)
    assert found == "no room for 1 of 1 shards of 512 MiB"


def test_a_server_may_hold_only_so_many_shards() -> None:
    spec = spec_of(shards=2)
    rooms = [servers("a", slots=1)]
    assert isinstance(place(spec, [("server", 0), ("server", 1)], rooms), str)


def test_a_full_server_has_no_more_room_than_an_unlimited_one() -> None:
    spec = spec_of(shards=1)
    assert isinstance(place(spec, [("server", 0)], [servers("a", slots=0)]), str)
    assert not isinstance(place(spec, [("server", 0)], [servers("a", slots=-1)]), str)


def test_roles_are_not_mixed() -> None:
    assert isinstance(place(spec_of(), [("worker", 0)], [servers("a", slots=4)]), str)
    assert isinstance(place(spec_of(), [("server", 0)], [workers("a", 4, memory_bytes=1 << 40)]), str)


def test_labels_must_all_be_there() -> None:
    spec = spec_of(worker_labels={"gpu": "a100", "rack": "2"}, server_labels={"disk": "nvme"})
    rooms = [
        servers("s1"),
        servers("s2", labels={"disk": "nvme", "more": "is-fine"}),
        workers("w1", 8),
        workers("w2", 8, labels={"gpu": "a100"}),
        workers("w3", 8, labels={"gpu": "a100", "rack": "3"}),
    ]
    found = place_gang(spec, rooms, 1, 2)
    assert found == "1 of 1 worker slots are missing on nodes with gpu=a100, rack=2"
    rooms.append(workers("w4", 2, labels={"gpu": "a100", "rack": "2"}))
    found = place_gang(spec, rooms, 1, 2)
    assert (nodes(found, "server"), nodes(found, "worker")) == (["s2"], ["w4", "w4"])


def test_each_worker_has_a_gpu_of_its_own_while_there_are_any() -> None:
    found = place_gang(spec_of(workers=3), [servers("s"), workers("w", 4, gpus=[0, 2])], 3, 3)
    assert not isinstance(found, str)
    assert [p.gpu for (role, _), p in found.items() if role == "worker"] == [0, 2, -1]


def test_who_wants_a_gpu_gets_one_or_waits() -> None:
    spec = spec_of(workers=2, device="cuda")
    rooms = [servers("s"), workers("big", 8), workers("small", 4, gpus=[1])]
    assert place_gang(spec, rooms, 2, 2) == "1 of 2 worker slots with a GPU are missing"
    assert nodes(place_gang(spec, rooms, 1, 2), "worker") == ["small"]


def test_who_wants_none_takes_none() -> None:
    found = place_gang(spec_of(workers=1, device="cpu"), [servers("s"), workers("w", 4, gpus=[0])], 1, 1)
    assert not isinstance(found, str)
    assert found["worker", 0].gpu == -1


# ---------------------------------------------------------------- together or not at all


def test_a_gang_changes_nothing_until_it_is_placed() -> None:
    rooms = [servers("s"), workers("w", 2, gpus=[0, 1])]
    for most in (2, 5):
        place_gang(spec_of(workers=5), rooms, 2, most)
    assert rooms == [servers("s"), workers("w", 2, gpus=[0, 1])]


def test_a_gang_takes_as_many_workers_as_there_is_room_for() -> None:
    rooms = [servers("s"), workers("a", 2), workers("b", 1)]
    spec = spec_of(workers=8, min_workers=2)
    assert len(nodes(place_gang(spec, rooms, 2, 8), "worker")) == 3
    assert place_gang(spec, rooms, 4, 8) == "1 of 4 worker slots are missing"


def test_without_its_shards_a_gang_is_not_placed() -> None:
    found = place_gang(spec_of(workers=1, shards=2), [workers("w", 8)], 1, 1)
    assert found == "no room for 2 of 2 shards of 256 MiB"


def test_a_huge_gang_is_looked_at_once_only() -> None:
    """It is done many times per second for a job that waits."""
    seen = 0

    class Counted(dict[str, str]):
        def items(self) -> Any:
            nonlocal seen
            seen += 1
            return super().items()

    rooms = [servers("s"), *[workers(f"w{i}", 1, labels=Counted()) for i in range(3)]]
    assert len(nodes(place_gang(spec_of(workers=4096, min_workers=1), rooms, 1, 4096), "worker")) == 3
    assert seen < 100


rooms_ = st.lists(
    st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 1024), st.integers(0, 3)), min_size=1, max_size=5
)


@given(rooms_, st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_nothing_is_used_twice(rooms: list[tuple[bool, int, int, int]], shards: int, one: int, other: int) -> None:
    fewest, most = min(one, other), max(one, other)
    spec = spec_of(workers=most, min_workers=fewest, shards=shards)
    made = [
        servers(f"n{i}", memory) if server else workers(f"n{i}", slots, gpus=list(range(gpus)))
        for i, (server, slots, memory, gpus) in enumerate(rooms)
    ]
    found = place_gang(spec, made, fewest, most)
    slots = sum(r.slots for r in made if r.role == "worker")
    room = sum(r.memory_bytes // spec.shard_memory for r in made if r.role == "server")
    if isinstance(found, str):
        assert room < shards or slots < fewest, "there was room"
        return
    assert sorted(i for r, i in found if r == "server") == list(range(shards))
    assert sorted(i for r, i in found if r == "worker") == list(range(min(most, slots)))
    by_name = {r.node: r for r in made}
    for name, count in Counter(nodes(found, "worker")).items():
        assert count <= by_name[name].slots
        gpus = [p.gpu for (role, _), p in found.items() if role == "worker" and p.node == name and p.gpu >= 0]
        assert sorted(gpus) == sorted(set(gpus)) == by_name[name].gpus[: len(gpus)]
    for name, count in Counter(nodes(found, "server")).items():
        assert count * spec.shard_memory <= by_name[name].memory_bytes


@pytest.mark.parametrize("fewest", [1, 3])
def test_what_is_missing_is_told_for_the_fewest(fewest: int) -> None:
    spec = spec_of(workers=9, min_workers=fewest)
    assert place_gang(spec, [servers("s")], fewest, 9) == f"{fewest} of {fewest} worker slots are missing"
