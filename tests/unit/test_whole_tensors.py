"""Where a rule looks at whole tensors, no trainable one is cut, wherever shards, checkpoints and exports are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import assert_same, elements, empty, held, part, save, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_kit import ShardDriver, model, model_specs, tensor

from downpour.update_rule import check_parts
from downpour_common.errors import ModelError, ProtocolError
from downpour_common.layout import LARGEST_CHUNK_BYTES, ModelSpec, plan
from downpour_common.parts import Part
from downpour_server.restore import restore

SPEC = model(
    tensor("embed", 11, 7, dtype="float64"),
    tensor("a.weight", 13, 5, dtype="float64"),
    tensor("a.bias", 13, dtype="float64", group=1),
    tensor("scale", dtype="float64"),
    tensor("nothing", 0, 4),
    tensor("mean", 17, kind="buffer"),
    rule="LAMB",
    options=({"lr": 0.01}, {"lr": 0.02, "weight_decay": 0.0}),
)
WHOLE = replace(SPEC, whole=True)


@settings(max_examples=50, deadline=None)
@given(model_specs(), st.integers(1, 5), st.sampled_from((1, 16, 1 << 20)))
def test_each_trainable_tensor_is_one_chunk_in_its_shape(spec: ModelSpec, shards: int, chunk_bytes: int) -> None:
    whole = replace(spec, whole=True)
    layout = plan(whole, shards, chunk_bytes)
    assert layout.segments == plan(spec, shards, chunk_bytes).segments, "space, views and shared memory are as ever"
    found = [list(layout.pieces_of(c)) for c in layout.chunks if c.kind == "trainable"]
    assert all(len(pieces) == 1 and pieces[0][1] == pieces[0][2] == 0 for pieces in found)
    chunks = [c for c in layout.chunks if c.kind == "trainable"]
    assert [c.shape for c in chunks] == [pieces[0][0].shape for pieces in found]
    assert {pieces[0][0].name for pieces in found} == {
        t.name for t in spec.tensors if t.kind == "trainable" and t.numel
    }
    assert [c.index for c in layout.chunks] == list(range(len(layout.chunks)))
    assert [(c.segment, c.start) for c in layout.chunks] == sorted((c.segment, c.start) for c in layout.chunks)
    again = plan(ModelSpec.from_wire(whole.to_wire()), shards, chunk_bytes)
    assert again == layout


def test_shards_get_about_as_many_bytes_each_the_largest_tensors_first() -> None:
    spec = model(*(tensor(f"t{i}", size) for i, size in enumerate((10, 70, 20, 60, 30, 50, 40))))
    layout = plan(replace(spec, whole=True), 3, 1)
    held_by = [[c.numel for c in layout.of_shard(shard)] for shard in range(3)]
    assert sorted(map(sum, held_by)) == [90, 90, 100]
    few = plan(replace(model(tensor("w", 5)), whole=True), 3, 1)
    assert [len(few.of_shard(shard)) for shard in range(3)] == [1, 0, 0]


def test_each_cell_has_all_shards() -> None:
    layers = [
        replace(tensor(f"t{cell}.{i}", size), cell=cell) for cell in range(3) for i, size in enumerate((64, 8, 8))
    ]
    layout = plan(replace(model(*layers), whole=True), 2, 1)
    assert {(c.cell, c.shard) for c in layout.chunks} == {(cell, shard) for cell in range(3) for shard in range(2)}
    sums = [sum(c.numel for c in layout.of_shard(shard)) for shard in range(2)]
    assert max(sums) - min(sums) <= 64


def test_the_specification_says_so_and_others_are_as_before() -> None:
    assert "whole" not in SPEC.to_wire()
    assert WHOLE.digest != SPEC.digest
    assert ModelSpec.from_wire(WHOLE.to_wire()) == WHOLE
    assert "whole_tensors" in (SPEC.first_difference(WHOLE) or "")
    with pytest.raises(ProtocolError, match="whole is 1"):
        ModelSpec.from_wire({**WHOLE.to_wire(), "whole": 1})


def test_a_tensor_that_no_message_can_carry_is_named() -> None:
    big = replace(model(tensor("table", 1 + LARGEST_CHUNK_BYTES // 4), rule="LARS"), whole=True)
    with pytest.raises(ModelError, match=r"table has \d+ bytes, and the update rule LARS"):
        plan(big, 4, 1 << 20)
    plan(replace(big, whole=False), 4, 1 << 20)


def test_parts_of_tensors_are_refused_where_they_must_be_whole() -> None:
    half = replace(tensor("w", 4, 3), part=Part((8, 3), 0, ((0, 4),)))
    check_parts(model(half))
    check_parts(WHOLE)
    with pytest.raises(ModelError, match="--tensor leaves each rank a part of some, such as w"):
        check_parts(replace(model(half, rule="LAMB"), whole=True))


RULES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LAMB": (True, {"lr": 0.01}),
    "LARS": (True, {"lr": 1.0, "weight_decay": 0.1}),
    "MuonAdamW": (True, {"lr": 0.01}),
    "FTRL": (False, {"lr": 0.3, "l1": 0.01}),
    "Lion": (False, {"lr": 0.01}),
    "Adadelta": (False, {"lr": 0.5}),
    "ASGD": (False, {"lr": 0.05, "t0": 2.0}),
    "Rprop": (False, {"lr": 0.01}),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_job_goes_on_on_other_shards_as_if_it_had_not_stopped(tmp_path: Path, rule: str) -> None:
    whole, options = RULES[rule]
    spec = replace(SPEC, rule=rule, options=(options, options), whole=whole)
    folder = save(tmp_path, train(spec, 2, 64))
    resumed = [ShardDriver(spec, "sync", 1, 3, 100, shard) for shard in range(3)]
    for d in resumed:
        restore(folder, d.layout, d.shard.chunks)
        d.shard.start_from(3)
        for stored in d.shard.chunks.values():
            for seq in (3, 4) if stored.trainable else ():
                d.push(stored.chunk.index, 0, seq, part(d.layout, stored, values(spec, seq + 1)))
    straight = held(train(spec, 2, 64, steps=5))
    for name, kept in held(resumed).items():
        assert set(kept) == set(straight[name])
        for what, flat in kept.items():
            assert torch.allclose(flat, straight[name][what], rtol=1e-12, atol=0), (name, what)


def test_state_of_whole_tensors_and_of_cut_ones_find_each_other(tmp_path: Path) -> None:
    """Which is what a rule of the job's own comes to that is changed to need whole ones."""
    cut, whole = replace(SPEC, rule="Adam"), replace(WHOLE, rule="Adam")
    for number, (old, new) in enumerate(((cut, whole), (whole, cut))):
        drivers = train(old, 3, 40)
        layout, chunks = empty(new, 2, 64)
        restore(save(tmp_path / str(number), drivers), layout, chunks)
        assert_same(elements(layout, chunks), held(drivers))
