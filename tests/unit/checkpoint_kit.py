"""What tests of checkpoints need: shards that have trained, whatever parts their model is cut in, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from unit_kit import JOB, ShardDriver

from downpour_common.layout import Layout, ModelSpec, TensorSpec, plan
from downpour_coordinator import checkpoints
from downpour_coordinator.snapshots import CommitSnapshot, Round
from downpour_server.snapshot import Reading, write
from downpour_server.store import StoredChunk
from downpour_server.tensors import torch_dtype

Elements = dict[str, dict[str, torch.Tensor]]
"""Tensor → what is kept of it (weights, exp_avg, …) → its elements, flat."""


def values(spec: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Some values for every unsplit tensor, flat."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for t in (parts[0] for parts in spec.parts.values()):
        dtype = torch_dtype(t.dtype)
        some = torch.randn(prod(t.whole_shape), generator=generator, dtype=torch.float64)
        found[t.name] = some.to(dtype) if dtype.is_floating_point or dtype.is_complex else (some * 9).abs().to(dtype)
    return found


def cut(t: TensorSpec, whole: torch.Tensor) -> torch.Tensor:
    """The part that ``t`` is of an unsplit tensor, which is flat; flat."""
    if t.part is None:
        return whole
    shaped = whole.view(t.whole_shape)
    ranges = t.part.ranges or ((0, 0),)
    return torch.cat([shaped.narrow(t.part.dim, a, b - a) for a, b in ranges], t.part.dim).reshape(-1)


def part(layout: Layout, chunk: StoredChunk, of: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The chunk's part of values by tensor."""
    return torch.cat([cut(t, of[t.name])[first : first + n] for t, first, _, n in layout.pieces_of(chunk.chunk)])


def elements(layout: Layout, chunks: Mapping[int, StoredChunk]) -> Elements:
    """What the chunks hold, by unsplit tensor."""
    found: Elements = {}
    numels = {name: prod(parts[0].whole_shape) for name, parts in layout.model.parts.items()}
    places = {t: cut(t, torch.arange(numels[t.name])) for t in layout.model.tensors}
    for stored in chunks.values():
        tensors, _ = stored.capture(Reading())
        for name, flat in tensors.items():
            for t, first, at, count in layout.pieces_of(stored.chunk):
                whole = found.setdefault(t.name, {}).setdefault(name, torch.zeros(numels[t.name], dtype=flat.dtype))
                whole[places[t][first : first + count]] = flat[at : at + count]
    return found


def train(spec: ModelSpec, shards: int, chunk_bytes: int, steps: int = 3) -> list[ShardDriver]:
    """Shards that have taken some steps with one replica; tensors have the same values in whatever parts."""
    drivers = []
    some = [values(spec, seed) for seed in range(steps + 1)]
    for shard in range(shards):
        d = ShardDriver(spec, "sync", spec.ranks, shards, chunk_bytes, shard)
        for stored in d.shard.chunks.values():
            slot = d.layout.column_of(stored.chunk)
            d.init(stored.chunk.index, part(d.layout, stored, some[0]), slot)
            for seq in range(steps if stored.chunk.kind == "trainable" else 0):
                d.push(stored.chunk.index, slot, seq, part(d.layout, stored, some[seq + 1]))
        drivers.append(d)
    return drivers


def held(drivers: list[ShardDriver]) -> Elements:
    """What all shards hold together."""
    chunks = {index: stored for d in drivers for index, stored in d.shard.chunks.items()}
    return elements(drivers[0].layout, chunks)


def save(run: Path, drivers: list[ShardDriver], number: int = 1) -> str:
    """Write a checkpoint of these shards as a job does; its folder."""
    layout = drivers[0].layout
    folder = checkpoints.folder_of(str(run), number)
    manifest = {
        "format": 1,
        "clock": 3,
        "seed": 0,
        "shards": layout.shards,
        "chunk_bytes": layout.chunk_bytes,
        "model": layout.model.to_wire(),
        "data": {"epoch": 0, "done": []},
        "synchronous": True,
    }
    round_ = Round(number, folder, len(drivers), manifest, -1)
    outcome = None
    for d in drivers:
        d.carry_out(d.shard.snapshot(number, folder, -1))
        outcome = round_.taken(_taken(d, number))
    assert isinstance(outcome, CommitSnapshot), outcome
    checkpoints.commit(outcome.folder, outcome.manifest)
    return folder


def _taken(d: ShardDriver, number: int) -> Any:
    from downpour_common import messages as m

    return m.SnapshotTaken(JOB, d.shard.identity.shard, 0, number, "", write(d.written.pop()))


def empty(spec: ModelSpec, shards: int, chunk_bytes: int) -> tuple[Layout, dict[int, StoredChunk]]:
    """All chunks of a layout that hold nothing yet."""
    layout = plan(spec, shards, chunk_bytes)
    return layout, {
        c.index: StoredChunk(c, spec.rule, spec.options[c.group] if c.group >= 0 else {}) for c in layout.chunks
    }


def assert_same(found: Elements, expected: Elements) -> None:
    """Bit for bit."""
    assert set(found) == set(expected)
    for name, kept in expected.items():
        assert set(found[name]) == set(kept), name
        for what, flat in kept.items():
            assert found[name][what].dtype == flat.dtype, (name, what)
            assert torch.equal(found[name][what], flat), (name, what)
