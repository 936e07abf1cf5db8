"""The parameter space: balance, completeness, and agreement between processes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_kit import CHUNK_SIZES, model, model_specs, tensor

from downpour_common import wire
from downpour_common.dtypes import itemsize
from downpour_common.errors import ProtocolError
from downpour_common.layout import KINDS, Layout, ModelSpec, TensorSpec, plan

layouts = st.builds(plan, model_specs(), st.integers(1, 7), st.sampled_from(CHUNK_SIZES))


# ---------------------------------------------------------------- the plan


@given(layouts)
def test_shards_hold_equal_bytes_of_each_kind(layout: Layout) -> None:
    for kind in KINDS:
        held = Counter(dict.fromkeys(range(layout.shards), 0))
        for chunk in layout.by_kind[kind]:
            held[chunk.shard] += chunk.nbytes
        share = sum(held.values()) / layout.shards
        for shard, nbytes in held.items():
            assert abs(nbytes - share) <= 16, f"shard {shard} holds {nbytes} bytes of {kind}, its share is {share}"


@given(layouts)
def test_every_element_lies_in_exactly_one_chunk(layout: Layout) -> None:
    seen = {t.name: np.zeros(t.numel, dtype=np.int64) for t in layout.model.tensors}
    for chunk in layout.chunks:
        at = 0
        for spec, first, offset, count in layout.pieces_of(chunk):
            assert offset == at, "pieces lie one after another in their chunk"
            assert (spec.kind, spec.dtype, spec.group) == (chunk.kind, chunk.dtype, chunk.group)
            assert 0 <= first < first + count <= spec.numel
            seen[spec.name][first : first + count] += 1
            at += count
        assert at == chunk.numel, "pieces fill their chunk"
    assert all((times == 1).all() for times in seen.values())


@given(layouts)
def test_chunks_are_whole_slices_of_one_segment_within_the_limit(layout: Layout) -> None:
    covered = {s.index: 0 for s in layout.segments}
    for index, chunk in enumerate(layout.chunks):
        segment = layout.segments[chunk.segment]
        assert chunk.index == index
        assert (chunk.kind, chunk.dtype, chunk.group) == (segment.kind, segment.dtype, segment.group)
        assert chunk.numel == 1 or chunk.nbytes <= layout.chunk_bytes
        assert chunk.numel > 0
        assert chunk.start == covered[segment.index], "chunks of a segment follow one another without gap or overlap"
        covered[segment.index] = chunk.stop
    assert covered == {s.index: s.numel for s in layout.segments}


@given(layouts)
def test_a_segment_is_its_tensors_in_reverse_order(layout: Layout) -> None:
    """What backward finishes first comes first; and ``pieces_of`` finds exactly those elements in a chunk."""
    ids: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    at = 0
    for spec in layout.model.tensors:
        ids[spec.name] = np.arange(at, at + spec.numel)
        at += spec.numel
    for segment in layout.segments:
        key = (segment.kind, segment.dtype, segment.group)
        members = [t for t in reversed(layout.model.tensors) if (t.kind, t.dtype, t.group) == key]
        vector = np.concatenate([ids[t.name] for t in members])
        for chunk in (c for c in layout.chunks if c.segment == segment.index):
            parts = [ids[t.name][first : first + count] for t, first, _, count in layout.pieces_of(chunk)]
            assert np.concatenate(parts).tolist() == vector[chunk.start : chunk.stop].tolist()


@given(layouts)
def test_shards_hold_contiguous_ranges_in_order(layout: Layout) -> None:
    for kind in KINDS:
        shards = [chunk.shard for chunk in layout.by_kind[kind]]
        assert shards == sorted(shards)
    assert Counter(c.index for s in range(layout.shards) for c in layout.of_shard(s)) == Counter(
        range(len(layout.chunks))
    )


def test_chunks_of_one_range_are_of_nearly_equal_size() -> None:
    layout = plan(model(tensor("w", 1001)), 1, 400)
    assert [c.numel for c in layout.chunks] == [91] * 11 or max(c.numel for c in layout.chunks) - min(
        c.numel for c in layout.chunks
    ) <= 1
    assert len(layout.chunks) == 11, "the fewest chunks of at most 100 floats"


def test_a_big_tensor_is_split_over_all_shards() -> None:
    layout = plan(model(tensor("small", 10), tensor("big", 990)), 4, 1 << 20)
    assert [sum(c.numel for c in layout.of_shard(s)) for s in range(4)] == [250, 250, 250, 250]


def test_more_shards_than_elements_leave_shards_empty() -> None:
    layout = plan(model(tensor("w", 2, dtype="float64")), 5, 1 << 20)
    assert sorted(len(layout.of_shard(s)) for s in range(5)) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("shards", "chunk_bytes"), [(0, 1), (-1, 1), (1, 0), (1, -5)])
def test_plan_refuses_counts_that_make_no_sense(shards: int, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        plan(model(tensor("w", 2)), shards, chunk_bytes)


# ---------------------------------------------------------------- the specification on the wire


@given(model_specs())
def test_specification_survives_msgpack_and_json(spec: ModelSpec) -> None:
    for document in (wire.unpack(wire.pack(spec.to_wire())), json.loads(json.dumps(spec.to_wire()))):
        again = ModelSpec.from_wire(document)
        assert again == spec
        assert again.digest == spec.digest
        assert spec.first_difference(again) is None


@given(model_specs(), st.integers(1, 7), st.sampled_from(CHUNK_SIZES))
def test_every_process_computes_the_same_layout(spec: ModelSpec, shards: int, chunk_bytes: int) -> None:
    theirs = plan(ModelSpec.from_wire(wire.unpack(wire.pack(spec.to_wire()))), shards, chunk_bytes)
    ours = plan(spec, shards, chunk_bytes)
    assert (ours.chunks, ours.segments, ours.digest) == (theirs.chunks, theirs.segments, theirs.digest)


BASE = model(
    tensor("a.weight", 3, 4, aliases=("tied.weight",)),
    tensor("a.bias", 3),
    tensor("n.mean", 3, kind="buffer"),
    options=({"lr": 0.1}, {"lr": 0.2}),
)


def test_digest_is_stable() -> None:
    """Old checkpoints and other hosts must come to the same digest; a change here is a change of the protocol."""
    assert BASE.digest == "dbc83a2e0fdb51dfaf1b451907e867ba"


def _changed(index: int, **fields: Any) -> ModelSpec:
    tensors = list(BASE.tensors)
    tensors[index] = replace(tensors[index], **fields)
    return replace(BASE, tensors=tuple(tensors))


DIFFERENT = {
    "name": _changed(1, name="a.offset"),
    "alias": _changed(0, aliases=()),
    "shape": _changed(0, shape=(4, 3)),
    "dtype": _changed(1, dtype="float64"),
    "kind": _changed(2, kind="frozen"),
    "group": _changed(1, group=1),
    "order": replace(BASE, tensors=(BASE.tensors[1], BASE.tensors[0], BASE.tensors[2])),
    "missing": replace(BASE, tensors=BASE.tensors[:2]),
    "rule": replace(BASE, rule="Adam"),
    "buffers": replace(BASE, buffers="chief"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_whatever_changes_the_layout_or_the_rule_changes_the_digest(what: str) -> None:
    assert DIFFERENT[what].digest != BASE.digest
    assert BASE.first_difference(DIFFERENT[what]) is not None


def test_learning_rates_do_not_change_the_digest() -> None:
    assert replace(BASE, options=({"lr": 9.0}, {"lr": 8.0})).digest == BASE.digest


@given(model_specs(), st.data())
def test_first_difference_names_the_first_tensor_that_differs(spec: ModelSpec, data: st.DataObject) -> None:
    if not spec.tensors:
        return
    tensors = list(spec.tensors)
    changed = data.draw(st.sets(st.integers(0, len(tensors) - 1), min_size=1))
    for index in changed:
        tensors[index] = replace(tensors[index], shape=(*tensors[index].shape, 2))
    other = replace(spec, tensors=tuple(tensors))
    first = min(changed)
    assert spec.first_difference(other) == (
        f"expected {spec.tensors[first].describe()}, found {tensors[first].describe()}"
    )
    assert spec.tensors[first].name in str(spec.first_difference(other))


def test_first_difference_tells_missing_from_foreign_tensors() -> None:
    fewer = replace(BASE, tensors=BASE.tensors[:2])
    assert BASE.first_difference(fewer) == "n.mean (buffer float32[3]) is missing"
    assert fewer.first_difference(BASE) == "n.mean (buffer float32[3]) is not part of the job"


def test_first_difference_of_what_is_not_a_tensor() -> None:
    assert BASE.first_difference(replace(BASE, rule="Adam")) == "expected optimizer SGD, found Adam"
    assert BASE.first_difference(replace(BASE, buffers="chief")) == "expected buffers='average', found 'chief'"
    groups = BASE.first_difference(replace(BASE, options=({"lr": 0.1},)))
    assert groups == "expected 2 parameter groups, found 1"


# ---------------------------------------------------------------- malformed documents


def _row(**fields: Any) -> dict[str, Any]:
    """A valid document with one tensor, of which ``fields`` are replaced."""
    row: dict[str, Any] = {
        "name": "w",
        "aliases": ["v"],
        "shape": [2, 3],
        "dtype": "float32",
        "kind": "trainable",
        "group": 0,
    }
    return {"tensors": [list({**row, **fields}.values())], "rule": "SGD", "options": [{"lr": 0.1}], "buffers": "local"}


def test_the_document_that_the_malformed_ones_are_made_from_is_sound() -> None:
    assert ModelSpec.from_wire(_row()).tensors == (TensorSpec("w", ("v",), (2, 3), "float32", "trainable", 0),)


MALFORMED: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "no tensors": {k: v for k, v in _row().items() if k != "tensors"},
    "no rule": {k: v for k, v in _row().items() if k != "rule"},
    "tensors not a list": {**_row(), "tensors": 5},
    "row too short": {**_row(), "tensors": [["w", [], [2]]]},
    "row too long": {**_row(), "tensors": [["w", [], [2], "float32", "buffer", -1, 0, [[2], 0, [[0, 2]]], 0]]},
    "rule not a string": {**_row(), "rule": 3},
    "buffers not a string": {**_row(), "buffers": None},
    "options not maps": {**_row(), "options": [5]},
    "name not a string": _row(name=7),
    "aliases not a list": _row(aliases=3),
    "alias not a string": _row(aliases=[3]),
    "aliases a string": _row(aliases="vw"),
    "shape not a list": _row(shape=6),
    "size negative": _row(shape=[-2, 3]),
    "sizes negative": _row(shape=[-2, -3]),
    "size not a number": _row(shape=["2"]),
    "size fractional": _row(shape=[2.0]),
    "size a boolean": _row(shape=[True]),
    "dtype unknown": _row(dtype="float8"),
    "dtype not a string": _row(dtype=["float32"]),
    "dtype not trainable": _row(dtype="int64"),
    "kind unknown": _row(kind="learnable"),
    "kind not a string": _row(kind=["trainable"]),
    "group not there": _row(group=1),
    "group missing": _row(group=-1),
    "group below -1": _row(kind="buffer", group=-2),
    "group a boolean": _row(group=False),
    "two tensors of one name": {**_row(), "tensors": [["w", [], [2], "float32", "buffer", -1]] * 2},
    "a name that is another's alias": {
        **_row(),
        "tensors": [["w", ["v"], [2], "float32", "buffer", -1], ["v", [], [2], "float32", "buffer", -1]],
    },
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_document_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        ModelSpec.from_wire(MALFORMED[what])


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 63) | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(plain, st.data())
def test_arbitrary_documents_raise_nothing_but_protocol_errors(value: Any, data: st.DataObject) -> None:
    document: Any = _row()
    match data.draw(st.sampled_from(["whole", "entry", "row", "field"])):
        case "whole":
            document = value
        case "entry":
            document[data.draw(st.sampled_from(sorted(document)))] = value
        case "row":
            document["tensors"][0] = value
        case "field":
            document["tensors"][0][data.draw(st.integers(0, 5))] = value
    try:
        spec = ModelSpec.from_wire(document)
    except ProtocolError:
        return
    assert all(itemsize(t.dtype) * t.numel == t.nbytes >= 0 for t in spec.tensors)
