"""Tensors in parts: what is a sound specification of them, and that no element is lost from one plan to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_kit import assert_same, cut, elements, empty, held, save, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_kit import CHUNK_SIZES, model, model_specs, tensor

from downpour.client.whole import whole_tensors
from downpour_common.dtypes import itemsize
from downpour_common.errors import CheckpointError, ProtocolError
from downpour_common.layout import KINDS, Layout, ModelSpec, Part, SharedLayout, TensorSpec, plan
from downpour_common.parts import overlaps, whole_of
from downpour_coordinator import checkpoints
from downpour_coordinator.export import export_model
from downpour_server.restore import restore
from downpour_server.tensors import torch_dtype

ADAM = {"lr": 0.01, "betas": [0.9, 0.99], "amsgrad": True}
SPEC = model(
    tensor("embed.weight", 12, 6, aliases=("head.weight",)),
    tensor("qkv.weight", 12, 5, dtype="float64"),
    tensor("qkv.bias", 12, dtype="float64"),
    tensor("conv.weight", 4, 6, 2, 3),
    tensor("half", 6, 3, dtype="bfloat16"),
    tensor("scale"),
    tensor("nothing", 0, 4),
    tensor("norm.mean", 6, kind="buffer"),
    tensor("norm.count", dtype="int64", kind="buffer"),
    tensor("table", 6, 2, dtype="uint8", kind="frozen"),
    rule="Adam",
    options=(ADAM,),
)
"""A model with all sorts of tensors, unsplit."""

Ranges = tuple[tuple[int, int], ...]


def parts_of(spec: TensorSpec, dim: int, *ranges: Ranges, cells: tuple[int, ...] = ()) -> list[TensorSpec]:
    """``spec`` in as many parts along ``dim`` as there are ``ranges``, in cells 0, 1, … unless given."""
    made = []
    for index, some in enumerate(ranges):
        part = Part(spec.shape, dim, some)
        made.append(replace(spec, shape=part.local_shape, part=part, cell=cells[index] if cells else index))
    return made


def _whole(spec: TensorSpec) -> list[TensorSpec]:
    return [spec]


def split(ranks: int, **others: Callable[[TensorSpec], list[TensorSpec]]) -> ModelSpec:
    """``SPEC`` for replicas of ``ranks`` ranks; tensors that are not named (dots as _) are whole on the first."""
    tensors = [p for t in SPEC.tensors for p in others.get(t.name.replace(".", "_"), _whole)(t)]
    return replace(SPEC, tensors=tuple(tensors), ranks=ranks)


TENSOR_2 = split(
    2,
    embed_weight=lambda t: parts_of(t, 1, ((0, 3),), ((3, 6),)),
    qkv_weight=lambda t: parts_of(t, 0, ((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12))),
    qkv_bias=lambda t: parts_of(t, 0, ((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12))),
    conv_weight=lambda t: parts_of(t, 0, ((0, 2),), ((2, 4),)),
    half=lambda t: parts_of(t, 1, ((0, 2),), ((2, 3),)),
    norm_mean=lambda t: parts_of(t, 0, ((0, 3),), ((3, 6),)),
    table=lambda t: [replace(t, cell=1)],
)
TENSOR_3 = split(
    3,
    embed_weight=lambda t: parts_of(t, 0, ((0, 5),), ((5, 6), (11, 12)), ((6, 11),)),
    qkv_weight=lambda t: parts_of(t, 0, ((0, 4),), ((4, 8),), ((8, 12),)),
    conv_weight=lambda t: parts_of(t, 1, ((0, 2),), ((2, 3), (5, 6)), ((3, 5),)),
    half=lambda t: parts_of(t, 0, ((0, 6),), (), ()),
    scale=lambda t: [replace(t, cell=2)],
    norm_mean=lambda t: parts_of(t, 0, ((4, 6), (0, 1)), ((1, 2),), ((2, 4),)),
    norm_count=lambda t: [replace(t, cell=1)],
    table=lambda t: parts_of(t, 1, ((0, 1),), ((1, 2),), cells=(1, 2)),
)
LAYERS = split(1, embed_weight=lambda t: [replace(t, cell=3)], scale=lambda t: [replace(t, cell=1)])
PLANS = {"none": SPEC, "tensor 2": TENSOR_2, "tensor 3": TENSOR_3, "by layers": LAYERS}


@st.composite
def split_specs(draw: st.DrawFn) -> ModelSpec:
    """Any model whose tensors lie in parts, or whole, on the ranks of a replica, in any cells of theirs."""
    spec, ranks = draw(model_specs()), draw(st.integers(1, 4))
    tensors: list[TensorSpec] = []
    for t in spec.tensors:
        among = draw(st.permutations(range(ranks)))[: draw(st.integers(1, ranks))]
        cells = tuple(rank + ranks * draw(st.integers(0, 2)) for rank in among)
        if not t.shape or draw(st.booleans()):
            tensors.append(replace(t, cell=cells[0]))
            continue
        dim = draw(st.integers(0, len(t.shape) - 1))
        edges = sorted({0, t.shape[dim], *draw(st.lists(st.integers(0, t.shape[dim]), max_size=6))})
        ranges: list[list[tuple[int, int]]] = [[] for _ in cells]
        for piece in draw(st.permutations(list(pairwise(edges)))):
            ranges[draw(st.integers(0, len(cells) - 1))].append(piece)
        tensors += parts_of(t, dim, *map(tuple, ranges), cells=cells)
    return replace(spec, tensors=tuple(tensors), ranks=ranks)


layouts = st.builds(plan, split_specs(), st.integers(1, 4), st.sampled_from(CHUNK_SIZES))


# ---------------------------------------------------------------- the specification


@given(split_specs())
def test_the_document_is_the_specification(spec: ModelSpec) -> None:
    found = ModelSpec.from_wire(spec.to_wire())
    assert found == spec
    assert found.digest == spec.digest


def test_an_unsplit_model_is_described_as_ever() -> None:
    document = SPEC.to_wire()
    assert "ranks" not in document
    assert all(len(row) == 6 for row in document["tensors"])
    assert replace(SPEC, ranks=2).digest != SPEC.digest


HALVES = [["w", [], [2, 3], "float32", "buffer", -1, 0, [[4, 3], 0, [[0, 2]]]]]
WRONG: dict[str, tuple[list[list[Any]], str]] = {
    "one half is missing": (HALVES, "elements 2 to 4 of w have no part"),
    "the first is missing": (
        [["w", [], [2, 3], "float32", "buffer", -1, 1, [[4, 3], 0, [[2, 4]]]]],
        "elements 0 to 2 of w along dimension 0 have no part",
    ),
    "they overlap": (
        [*HALVES, ["w", [], [3, 3], "float32", "buffer", -1, 1, [[4, 3], 0, [[1, 4]]]]],
        "elements 1 to 2 of w along dimension 0 are in two parts",
    ),
    "a part and the whole": (
        [*HALVES, ["w", [], [4, 3], "float32", "buffer", -1, 1]],
        "w is there as a whole and once more",
    ),
    "other dimensions": (
        [*HALVES, ["w", [], [4, 1], "float32", "buffer", -1, 1, [[4, 3], 1, [[0, 1]]]]],
        "cut along different dimensions",
    ),
    "other wholes": (
        [*HALVES, ["w", [], [2, 3], "float32", "buffer", -1, 1, [[5, 3], 0, [[2, 4]]]]],
        "of different tensors",
    ),
    "one rank": (
        [*HALVES, ["w", [], [2, 3], "float32", "buffer", -1, 2, [[4, 3], 0, [[2, 4]]]]],
        "two parts of w belong to one rank",
    ),
    "another dtype": (
        [*HALVES, ["w", [], [2, 3], "float64", "buffer", -1, 1, [[4, 3], 0, [[2, 4]]]]],
        "differ in more than their place",
    ),
    "a shape that is not the part's": (
        [["w", [], [3, 3], "float32", "buffer", -1, 0, [[4, 3], 0, [[0, 4]]]]],
        r"its part of the whole has \[4, 3\]",
    ),
    "beyond the end": ([["w", [], [5, 3], "float32", "buffer", -1, 0, [[4, 3], 0, [[0, 5]]]]], "a part 0 to 5"),
    "no such dimension": ([["w", [], [4, 3], "float32", "buffer", -1, 0, [[4, 3], 2, [[0, 3]]]]], "along dimension 2"),
    "a negative cell": ([["w", [], [4, 3], "float32", "buffer", -1, -1]], r"w lies in \[-1\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_are_not_the_tensor_once_are_refused(what: str) -> None:
    rows, words = WRONG[what]
    with pytest.raises(ProtocolError, match=words):
        ModelSpec.from_wire({"tensors": rows, "rule": "SGD", "options": [], "buffers": "average", "ranks": 2})


@pytest.mark.parametrize("ranks", [0, -1, "2", 2.0, True])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(ranks: object) -> None:
    with pytest.raises(ProtocolError, match="ranks"):
        ModelSpec.from_wire({**SPEC.to_wire(), "ranks": ranks})


def test_another_cut_is_another_model_and_the_difference_says_so() -> None:
    other = replace(TENSOR_2, tensors=(replace(TENSOR_2.tensors[0], cell=2), *TENSOR_2.tensors[1:]))
    assert other.digest != TENSOR_2.digest
    text = TENSOR_2.first_difference(other)
    assert text is not None
    assert "embed.weight (trainable float32[12, 3], parameter group 0, 0:3 along dimension 1 of [12, 6])" in text
    assert "cell 2" in text
    assert replace(TENSOR_2, ranks=3).first_difference(TENSOR_2) == "expected replicas of 3 ranks, found 2"


# ---------------------------------------------------------------- the layout


@given(layouts)
def test_columns_are_all_there_is_and_chunks_span_no_two_cells(layout: Layout) -> None:
    columns = [layout.of_column(rank) for rank in range(layout.model.ranks)]
    assert sorted(c.index for column in columns for c in column.chunks) == list(range(len(layout.chunks)))
    for rank, column in enumerate(columns):
        assert sum(column.by_kind.values(), ()) == column.chunks
        assert {t.cell % layout.model.ranks for t in column.tensors.values()} <= {rank}
        for chunk in column.chunks:
            segment = layout.segments[chunk.segment]
            assert segment in column.segments
            assert segment.cell == chunk.cell
            assert {t.cell for t, *_ in layout.pieces_of(chunk)} == {chunk.cell}


@given(layouts)
def test_every_cell_is_cut_over_all_shards(layout: Layout) -> None:
    for kind in KINDS:
        for cell in {c.cell for c in layout.by_kind[kind]}:
            held = Counter(dict.fromkeys(range(layout.shards), 0))
            for chunk in layout.by_kind[kind]:
                held[chunk.shard] += chunk.nbytes if chunk.cell == cell else 0
            share = sum(held.values()) / layout.shards
            assert all(abs(nbytes - share) <= 16 for nbytes in held.values())


@given(layouts)
def test_shared_memory_has_room_for_one_column(layout: Layout) -> None:
    for rank in range(layout.model.ranks):
        shared = SharedLayout(layout, rank)
        areas = []
        for chunk in layout.of_column(rank).by_kind["trainable"]:
            areas += [shared.weights(chunk), shared.gradient(chunk)]
        areas.sort(key=lambda area: area.start)
        assert all(a.stop <= b.start for a, b in pairwise(areas))
        assert all(area.stop <= shared.nonce_at for area in areas)
        nbytes = sum(2 * t.nbytes for t in layout.of_column(rank).tensors.values() if t.kind == "trainable")
        assert shared.nonce_at < nbytes + 64 * 2 * max(1, len(layout.segments)) + 1


@given(layouts)
def test_the_whole_comes_back_from_its_parts(layout: Layout) -> None:
    numels = {name: whole_of(p[0].whole_shape) for name, p in layout.model.parts.items()}
    some = values(layout.model, 1)
    flats = {
        s.index: torch.cat([cut(t, some[t.name]) for t in (layout.model.tensors[p.tensor] for p in s.pieces)])
        for s in layout.segments
    }
    whole = whole_tensors(layout, flats)
    assert set(whole) == set(numels)
    for name, found in whole.items():
        assert tuple(found.shape) == layout.model.parts[name][0].whole_shape
        assert torch.equal(found.reshape(-1), some[name])


@given(st.data())
def test_parts_of_two_plans_meet_in_every_element_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    made: list[tuple[Part, torch.Tensor]] = []
    for _ in range(2):
        dim = data.draw(st.integers(0, len(shape) - 1))
        pieces = data.draw(st.permutations([(i, i + 1) for i in range(shape[dim])]))
        part = Part(shape, dim, tuple(pieces[: data.draw(st.integers(0, len(pieces)))]))
        made.append((part, torch.cat([whole.narrow(dim, a, 1) for a, _ in part.ranges] or [whole[:0]], dim)))
    (one, first), (other, second) = made
    if not (one.ranges and other.ranges):
        assert not any(True for _ in overlaps(one, other))
        return
    met: list[int] = []
    for here, there in overlaps(one, other):
        assert torch.equal(first[here], second[there])
        met += first[here].reshape(-1).tolist()
    both = set(first.reshape(-1).tolist()) & set(second.reshape(-1).tolist())
    assert sorted(met) == sorted(both)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("old", PLANS)
@pytest.mark.parametrize("new", PLANS)
def test_a_checkpoint_of_one_plan_is_gone_on_from_in_another(tmp_path: Path, old: str, new: str) -> None:
    """Weights and the optimizer's state, bit for bit."""
    drivers = train(PLANS[old], 2, 100)
    folder = save(tmp_path, drivers)
    expected = held(drivers)
    assert {"weights", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} == set(expected["embed.weight"])
    for shards, chunk_bytes in ((1, 1 << 20), (3, 40)):
        layout, chunks = empty(PLANS[new], shards, chunk_bytes)
        assert restore(folder, layout, chunks) == 3
        assert_same(elements(layout, chunks), expected)
        for stored in chunks.values():
            assert stored.version == (3 if stored.trainable else 0)


@settings(max_examples=25)
@given(split_specs(), st.data())
def test_any_plan_can_be_gone_on_from_in_any_other(tmp_path_factory: Any, spec: ModelSpec, data: st.DataObject) -> None:
    tensors = tuple(replace(p[0], shape=p[0].whole_shape, part=None, cell=0) for p in spec.parts.values())
    other = replace(spec, tensors=tensors, ranks=1)
    drivers = train(spec, data.draw(st.integers(1, 3)), data.draw(st.sampled_from(CHUNK_SIZES)), steps=1)
    folder = save(tmp_path_factory.mktemp("run"), drivers)
    layout, chunks = empty(other, data.draw(st.integers(1, 3)), data.draw(st.sampled_from(CHUNK_SIZES)))
    restore(folder, layout, chunks)
    assert_same(elements(layout, chunks), held(drivers))


def test_a_whole_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, train(TENSOR_2, 2, 100))
    layout, chunks = empty(replace(SPEC, tensors=(tensor("embed.weight", 6, 12),)), 1, 100)
    with pytest.raises(CheckpointError, match=r"of \[12, 6\]\), the script has .*\[6, 12\]"):
        restore(folder, layout, chunks)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("band", [1, 20, 4 << 20])
def test_the_export_is_the_unsplit_model(tmp_path: Path, name: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downpour_coordinator.export.BAND_BYTES", band)
    drivers = train(PLANS[name], 3, 64)
    folder = save(tmp_path, drivers)
    path = tmp_path / "model.safetensors"
    export_model(checkpoints.load(folder), str(path))
    exported = safetensors.torch.load_file(path)
    expected, plain = held(drivers), held(train(SPEC, 1, 1 << 20))
    assert set(exported) == {n for t in SPEC.tensors for n in (t.name, *t.aliases)}
    for t in SPEC.tensors:
        for each in (t.name, *t.aliases):
            assert (exported[each].shape, exported[each].dtype) == (t.shape, torch_dtype(t.dtype))
            if t.numel:
                found = exported[each].reshape(-1)
                assert torch.equal(found, expected[t.name]["weights"])
                assert torch.allclose(found, plain[t.name]["weights"])  # kernels round by how slices are aligned


def test_parts_weigh_what_the_tensor_does() -> None:
    for spec in (TENSOR_2, TENSOR_3):
        for parts, t in zip(spec.parts.values(), SPEC.tensors, strict=True):
            assert sum(p.nbytes for p in parts) == t.numel * itemsize(t.dtype)
