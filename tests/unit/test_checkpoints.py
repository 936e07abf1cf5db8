"""Checkpoints: element by element the same on any number of shards, damage named, the export equal to the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_kit import assert_same, elements, empty, held, part, save, train, values
from unit_kit import ADD, ShardDriver, model, tensor

from downpour_common.errors import CheckpointError
from downpour_common.layout import ModelSpec, plan
from downpour_common.tensorfile import TensorFile
from downpour_coordinator import checkpoints
from downpour_coordinator.export import export_model
from downpour_coordinator.manifest import decode, encode
from downpour_coordinator.sources import FolderSource, examine
from downpour_server.contribution import Contribution
from downpour_server.restore import restore
from downpour_server.snapshot import Reading
from downpour_server.store import StoredChunk
from downpour_server.tensors import torch_dtype

SPEC = model(
    tensor("embed.weight", 11, 7, aliases=("head.weight",)),
    tensor("a.weight", 13, 5, dtype="float64"),
    tensor("a.bias", 13, dtype="float64", group=1),
    tensor("h.weight", 9, 3, dtype="bfloat16"),
    tensor("h.bias", 9, dtype="float16", group=1),
    tensor("scale"),
    tensor("nothing", 0, 4),
    tensor("n.mean", 17, kind="buffer"),
    tensor("n.count", dtype="int64", kind="buffer"),
    tensor("n.mask", 5, dtype="bool", kind="buffer"),
    tensor("n.phase", 3, dtype="complex64", kind="buffer"),
    tensor("table", 6, 2, dtype="uint8", kind="frozen"),
    rule="Adam",
    options=({"lr": 0.01, "amsgrad": True}, {"lr": 0.02, "betas": [0.5, 0.7]}),
)


# ---------------------------------------------------------------- restore


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, 1 << 20), (1, 1 << 20)),
        ((1, 1 << 20), (3, 40)),
        ((3, 40), (1, 1 << 20)),
        ((2, 100), (5, 24)),
        ((4, 16), (2, 17)),
    ],
)
def test_weights_and_optimizer_state_are_the_same_on_any_layout(
    tmp_path: Path, old: tuple[int, int], new: tuple[int, int]
) -> None:
    drivers = train(SPEC, *old)
    expected = held(drivers)
    assert {"weights", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} == set(expected["embed.weight"])
    folder = save(tmp_path, drivers)
    layout, chunks = empty(SPEC, *new)
    assert restore(folder, layout, chunks) == 3, "the clock"
    assert_same(elements(layout, chunks), expected)
    for stored in chunks.values():
        assert stored.initialised
        assert stored.version == (3 if stored.chunk.kind == "trainable" else 0)
        if stored.chunk.kind == "trainable":
            assert stored.capture(Reading())[1]["scalars"] == {"step": 3.0}


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("AdamW", {"lr": 0.01}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
        ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
        ("Adamax", {"lr": 0.01}),
        ("NAdam", {"lr": 0.01}),
        ("RAdam", {"lr": 0.01}),
    ],
)
def test_a_resumed_job_goes_on_as_if_it_had_not_stopped(tmp_path: Path, rule: str, options: dict[str, Any]) -> None:
    """On another number of shards, and after steps that depend on the state and on the count of steps."""
    spec = model(tensor("w", 50, dtype="float64"), tensor("v", 8, dtype="float64"), rule=rule, options=(options,))
    folder = save(tmp_path, train(spec, 2, 64))
    layout, chunks = empty(spec, 3, 100)
    restore(folder, layout, chunks)
    for d in (resumed := [ShardDriver(spec, "sync", 1, 3, 100, shard) for shard in range(3)]):
        restore(folder, d.layout, d.shard.chunks)
        d.shard.start_from(3)
        for stored in d.shard.chunks.values():
            for seq in (3, 4):
                d.push(stored.chunk.index, 0, seq, part(d.layout, stored, values(spec, seq + 1)))
    straight = held(train(spec, 2, 64, steps=5))
    for name, kept in held(resumed).items():
        for what, flat in kept.items():
            assert torch.allclose(flat, straight[name][what], rtol=1e-12, atol=0), (name, what)


def test_another_rule_takes_the_weights_and_leaves_the_state(tmp_path: Path) -> None:
    drivers = train(SPEC, 2, 100)
    folder = save(tmp_path, drivers)
    layout, chunks = empty(replace(SPEC, rule="SGD", options=({"lr": 0.1, "momentum": 0.9},) * 2), 1, 1 << 20)
    restore(folder, layout, chunks)
    assert_same(elements(layout, chunks), {name: {"weights": kept["weights"]} for name, kept in held(drivers).items()})


def test_a_model_that_lost_a_tensor_can_be_resumed(tmp_path: Path) -> None:
    drivers = train(SPEC, 2, 100)
    folder = save(tmp_path, drivers)
    layout, chunks = empty(replace(SPEC, tensors=SPEC.tensors[1:]), 1, 1 << 20)
    restore(folder, layout, chunks)
    expected = held(drivers)
    del expected["embed.weight"]
    assert_same(elements(layout, chunks), expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (tensor("embed.weight", 7, 11, aliases=("head.weight",)), r"holds embed\.weight .*\[11, 7\].*has.*\[7, 11\]"),
        (tensor("embed.weight", 11, 7, dtype="float64"), r"holds embed\.weight .*float32.*has.*float64"),
        (tensor("renamed", 11, 7), r"does not hold renamed"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_naming_the_tensor(tmp_path: Path, changed: Any, words: str) -> None:
    folder = save(tmp_path, train(SPEC, 2, 100))
    layout, chunks = empty(replace(SPEC, tensors=(changed, *SPEC.tensors[1:])), 2, 100)
    with pytest.raises(CheckpointError, match=words) as caught:
        restore(folder, layout, chunks)
    assert folder in str(caught.value)


# ---------------------------------------------------------------- damage


def _edit(path: str, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(Path(path).read_text())
    change(manifest)
    Path(path).write_text(json.dumps(manifest))


def _flip(path: str, at: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)


def _rename_in_header(path: str) -> None:
    """What was chunk 0's weights is called something else: same size, same data."""
    data = Path(path).read_bytes()
    assert data.count(b'"0.weights"') == 1
    Path(path).write_bytes(data.replace(b'"0.weights"', b'"0.weighty"'))


SHARD, MANIFEST = "shard-0.safetensors", "manifest.json"
DAMAGE: dict[str, tuple[str, Callable[[str], object]]] = {
    "a file is missing": (SHARD, os.unlink),
    "a file is empty": (SHARD, lambda p: os.truncate(p, 0)),
    "a file is cut short": (SHARD, lambda p: os.truncate(p, os.path.getsize(p) - 1)),
    "a file is longer": (SHARD, lambda p: os.truncate(p, os.path.getsize(p) + 8)),
    "a bit of the data is flipped": (SHARD, lambda p: _flip(p, -1)),
    "a bit of the header's length is flipped": (SHARD, lambda p: _flip(p, 1)),
    "a name in the header is another": (SHARD, _rename_in_header),
    "the manifest is empty": (MANIFEST, lambda p: os.truncate(p, 0)),
    "the manifest is cut short": (MANIFEST, lambda p: os.truncate(p, os.path.getsize(p) // 2)),
    "the manifest is not utf-8": (MANIFEST, lambda p: Path(p).write_bytes(b"\xff\xfe")),
    "the manifest is a list": (MANIFEST, lambda p: Path(p).write_text("[]")),
    "the manifest lacks its files": (MANIFEST, lambda p: _edit(p, lambda d: d.pop("files"))),
    "the manifest lacks one of its files": (MANIFEST, lambda p: _edit(p, lambda d: d["files"].pop())),
    "the manifest lacks a chunk": (MANIFEST, lambda p: _edit(p, lambda d: d["files"][0]["chunks"].popitem())),
    "the manifest lacks its model": (MANIFEST, lambda p: _edit(p, lambda d: d.pop("model"))),
    "the manifest is of another format": (MANIFEST, lambda p: _edit(p, lambda d: d.update(format=2))),
    "the manifest's clock is another": (MANIFEST, lambda p: _edit(p, lambda d: d.update(clock=2))),
    "the manifest has no digest": (MANIFEST, lambda p: _edit(p, lambda d: d.pop("sha256"))),
    "the manifest is a manifest of something else": (MANIFEST, lambda p: Path(p).write_text('{"name": "app"}')),
    "a file is another shard's": (SHARD, lambda p: shutil.copyfile(p.replace("shard-0", "shard-1"), p)),
    "a file is a folder": (SHARD, lambda p: (os.unlink(p), os.mkdir(p))),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; not to be changed."""
    run = tmp_path_factory.mktemp("run")
    drivers = train(SPEC, 2, 100)
    for number in (1, 2):
        save(run, drivers, number)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_sound_checkpoint_is_found(run: Path) -> None:
    found, skipped = checkpoints.newest(str(run))
    assert (found.folder, skipped) == (checkpoints.folder_of(str(run), 2), [])
    assert ModelSpec.from_wire(found.manifest["model"]) == SPEC


def test_a_checkpoints_own_folder_may_be_given(run: Path) -> None:
    folder = checkpoints.folder_of(str(run), 1)
    found, skipped = checkpoints.newest(folder)
    assert (found.folder, skipped) == (folder, [])


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(run: Path, what: str) -> None:
    file, damage = DAMAGE[what]
    path = os.path.join(checkpoints.folder_of(str(run), 2), file)
    damage(path)
    found, skipped = checkpoints.newest(str(run))
    assert found.folder == checkpoints.folder_of(str(run), 1)
    assert len(skipped) == 1
    assert checkpoints.folder_of(str(run), 2) in skipped[0]
    assert file == MANIFEST or SHARD in skipped[0], "the damaged file has a name"


@pytest.mark.parametrize("what", DAMAGE)
def test_nobody_starts_from_a_damaged_checkpoint_unnoticed(run: Path, what: str) -> None:
    """Restored nonetheless, it is an error that names it, or its values are the right ones."""
    folder = checkpoints.folder_of(str(run), 2)
    layout, chunks = empty(SPEC, 1, 1 << 20)
    restore(folder, layout, chunks)
    expected = elements(layout, chunks)
    file, damage = DAMAGE[what]
    damage(os.path.join(folder, file))
    layout, chunks = empty(SPEC, 1, 1 << 20)
    try:
        restore(folder, layout, chunks)
    except CheckpointError as error:
        named = folder in str(error)
    else:
        named = True
        if "bit of the data" not in what:  # load() looks at digests, restore() does not
            assert_same(elements(layout, chunks), expected)
    assert named


def _signed(path: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and have its digest be right: it is sound, but not of this checkpoint."""
    fields = decode(Path(path).read_bytes(), path).fields
    change(fields)
    Path(path).write_bytes(encode(fields))


def _named(entry: dict[str, Any], name: str) -> None:
    entry["file"] = name


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file of another job": lambda d: _named(d["files"][0], "../../../other/checkpoints/000001/shard-0.safetensors"),
    "an absolute path": lambda d: _named(d["files"][0], "/etc/passwd"),
    "the folder itself": lambda d: _named(d["files"][0], ".."),
    "no name": lambda d: _named(d["files"][0], ""),
    "the manifest": lambda d: _named(d["files"][0], "manifest.json"),
    "a name with a line end": lambda d: _named(d["files"][0], "shard-0.safetensors\n"),
    "no text": lambda d: _named(d["files"][0], 7),  # type: ignore[arg-type]
    "one file twice": lambda d: _named(d["files"][1], d["files"][0]["file"]),
    "a chunk twice": lambda d: d["files"][1]["chunks"].update({"0": {}}),
    "a chunk too many": lambda d: d["files"][1]["chunks"].update({"9999": {}}),
    "a negative size": lambda d: d["files"][0].update(bytes=-1),
    "no digest": lambda d: d["files"][0].update(sha256="0"),
    "other shards": lambda d: d.update(shards=3),
    "more shards than there may be": lambda d: d.update(shards=1 << 40),
    "another model": lambda d: d.update(model=replace(SPEC, tensors=SPEC.tensors[:2]).to_wire()),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_manifest_is_skipped_and_named_and_leads_nowhere(run: Path, what: str) -> None:
    path = os.path.join(checkpoints.folder_of(str(run), 2), MANIFEST)
    _signed(path, FOREIGN[what])
    found, skipped = checkpoints.newest(str(run))
    assert found.folder == checkpoints.folder_of(str(run), 1)
    assert len(skipped) == 1
    assert checkpoints.folder_of(str(run), 2) in skipped[0]


def test_the_files_of_another_model_are_named_though_their_digests_are_right(run: Path, tmp_path: Path) -> None:
    """As whoever edits a manifest by hand might leave it."""
    small = model(tensor("w", 900), rule="SGD", options=({"lr": 0.1},))
    other = save(tmp_path / "other", train(small, 1, 1 << 20))
    folder = checkpoints.folder_of(str(run), 2)
    shutil.copyfile(os.path.join(other, SHARD), os.path.join(folder, SHARD))
    theirs = checkpoints.load(other).manifest["files"][0]

    def adopt(fields: dict[str, Any]) -> None:
        fields["files"][0].update(bytes=theirs["bytes"], sha256=theirs["sha256"])

    _signed(os.path.join(folder, MANIFEST), adopt)
    with pytest.raises(CheckpointError, match=r"shard-0\.safetensors: (holds other|does not hold)"):
        checkpoints.load(folder)


@pytest.mark.parametrize("file", [MANIFEST, SHARD, "shard-1.safetensors"])
def test_no_flipped_bit_in_any_file_goes_unnoticed(run: Path, file: str) -> None:
    folder = checkpoints.folder_of(str(run), 2)
    path = Path(folder, file)
    sound = path.read_bytes()
    before = checkpoints.load(folder).manifest
    for at in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            found = checkpoints.load(folder).manifest
        except CheckpointError:
            continue
        assert file == MANIFEST, at
        assert found == before, f"byte {at}: it may say the same in another way, and nothing else"


@pytest.mark.parametrize("file", [MANIFEST, SHARD, "shard-1.safetensors"])
def test_no_cut_in_any_file_goes_unnoticed(run: Path, file: str) -> None:
    folder = checkpoints.folder_of(str(run), 2)
    path = Path(folder, file)
    sound = path.read_bytes()
    for size in range(0, len(sound), 13):
        path.write_bytes(sound[:size])
        with pytest.raises(CheckpointError, match=folder):
            checkpoints.load(folder)


def test_every_damaged_file_is_named(run: Path) -> None:
    folder = checkpoints.folder_of(str(run), 2)
    for shard in (0, 1):
        os.truncate(os.path.join(folder, f"shard-{shard}.safetensors"), 20)
    found = examine(FolderSource(str(run)), 2)
    assert [problem.partition(": ")[0] for problem in found.problems] == [
        os.path.join(folder, f"shard-{shard}.safetensors") for shard in (0, 1)
    ]
    assert examine(FolderSource(str(run)), 1).problems == ()


def test_nothing_is_committed_that_is_not_there(run: Path) -> None:
    folder = checkpoints.folder_of(str(run), 2)
    fields = checkpoints.load(folder).manifest
    os.unlink(os.path.join(folder, MANIFEST))
    os.truncate(os.path.join(folder, SHARD), 20)
    with pytest.raises(CheckpointError, match=r"shard-0.* has 20 bytes"):
        checkpoints.commit(folder, fields)
    os.unlink(os.path.join(folder, SHARD))
    with pytest.raises(CheckpointError, match=r"shard-0.* cannot be committed: No such file"):
        checkpoints.commit(folder, fields)
    assert checkpoints.committed(str(run)) == [1]


def test_everything_is_on_disk_before_the_manifest_has_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.folder_of(str(run), 2)
    fields = checkpoints.load(folder).manifest
    os.unlink(os.path.join(folder, MANIFEST))
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source: str, target: str) -> None:
        done.append(f"rename {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoints.commit(folder, fields)
    at = done.index(f"rename {os.path.join(folder, MANIFEST)}")
    before, after = done[:at], done[at + 1 :]
    for shard in (0, 1):
        assert os.path.join(folder, f"shard-{shard}.safetensors") in before
    assert {folder, os.path.dirname(folder), str(run)} <= set(before)
    assert any(path.startswith(os.path.join(folder, MANIFEST)) for path in before), "the manifest's own bytes"
    assert folder in after, "its name"


def test_folders_are_no_checkpoints_by_any_other_name(run: Path) -> None:
    for name in ("7", "0000002", "١٢٣٤٥٦", "incoming-1", "000003.part"):
        shutil.copytree(checkpoints.folder_of(str(run), 2), run / "checkpoints" / name)
    assert checkpoints.numbers(str(run)) == [1, 2]


def test_what_is_deleted_does_not_look_damaged_on_the_way(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed in between
    checkpoints.remove(str(run), 2)
    found, skipped = checkpoints.newest(str(run))
    assert (found.folder, skipped) == (checkpoints.folder_of(str(run), 1), [])


def test_a_checkpoint_that_was_never_committed_does_not_count(run: Path) -> None:
    os.unlink(os.path.join(checkpoints.folder_of(str(run), 2), MANIFEST))
    found, skipped = checkpoints.newest(str(run))
    assert (found.folder, skipped) == (checkpoints.folder_of(str(run), 1), [])


def test_no_usable_checkpoint_is_an_error_that_tells_why(run: Path) -> None:
    for number in (1, 2):
        os.unlink(os.path.join(checkpoints.folder_of(str(run), number), SHARD))
    with pytest.raises(CheckpointError, match=r"000002.*shard-0.*000001.*shard-0"):
        checkpoints.newest(str(run))


@pytest.mark.parametrize("make", [lambda p: None, os.mkdir, lambda p: Path(p).write_text("a file")])
def test_what_is_no_run_directory_is_an_error(tmp_path: Path, make: Callable[[str], object]) -> None:
    path = str(tmp_path / "run")
    make(path)
    with pytest.raises(CheckpointError, match="there is no usable checkpoint"):
        checkpoints.newest(path)


def test_a_checkpoint_cannot_be_committed_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(CheckpointError):
        checkpoints.commit(str(tmp_path / "f"), {})


# ---------------------------------------------------------------- the model as a file


def test_the_export_is_the_model_under_all_its_names(run: Path, tmp_path: Path) -> None:
    found, _ = checkpoints.newest(str(run))
    path = tmp_path / "model.safetensors"
    export_model(found, str(path))
    exported = safetensors.torch.load_file(path)
    assert set(exported) == {name for t in SPEC.tensors for name in (t.name, *t.aliases)}
    expected = held(train(SPEC, 2, 100))
    for t in SPEC.tensors:
        for name in (t.name, *t.aliases):
            assert (exported[name].shape, exported[name].dtype) == (t.shape, torch_dtype(t.dtype))
            if t.numel:
                assert torch.equal(exported[name].reshape(-1), expected[t.name]["weights"]), name
    with TensorFile(str(path)) as file:
        assert file.metadata == {"format": "pt"}


def test_an_untrained_model_is_exported_as_it_came(tmp_path: Path) -> None:
    folder = save(tmp_path, train(SPEC, 3, 24, steps=0))
    export_model(checkpoints.load(folder), str(tmp_path / "model"))
    exported = safetensors.torch.load_file(tmp_path / "model")
    for name, flat in values(SPEC, 0).items():
        assert torch.equal(exported[name].reshape(-1), flat)


@pytest.mark.parametrize("what", ["a file is missing", "a name in the header is another", "the manifest lacks a chunk"])
def test_an_export_that_fails_is_a_checkpoint_error_and_leaves_no_file(run: Path, tmp_path: Path, what: str) -> None:
    file, damage = DAMAGE[what]
    folder = checkpoints.folder_of(str(run), 2)
    damage(os.path.join(folder, file))
    manifest = json.loads(Path(folder, MANIFEST).read_text())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError):
        export_model(checkpoints.Checkpoint(folder, manifest), str(tmp_path / "out" / "model"))
    assert os.listdir(tmp_path / "out") == []


# ---------------------------------------------------------------- pruning


def _folders(run: Path, **kinds: str) -> None:
    """Checkpoints by number: ``c`` committed, ``o`` open."""
    for number, kind in kinds.items():
        folder = Path(checkpoints.folder_of(str(run), int(number[1:])))
        folder.mkdir(parents=True)
        (folder / SHARD).write_text("data")
        if kind == "c":
            (folder / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, [6, 7]), (2, [4, 5, 6, 7]), (3, [3, 4, 5, 6, 7]), (9, [2, 3, 4, 5, 6, 7])],
)
def test_pruning_keeps_the_newest_committed_and_what_is_being_written(
    tmp_path: Path, keep: int, kept: list[int]
) -> None:
    _folders(tmp_path, n1="o", n2="c", n3="c", n4="c", n5="o", n6="c", n7="o")
    checkpoints.prune(str(tmp_path), keep)
    assert checkpoints.numbers(str(tmp_path)) == kept


def test_pruning_touches_nothing_before_the_first_commit_and_nothing_else(tmp_path: Path) -> None:
    _folders(tmp_path, n1="o", n2="o")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    checkpoints.prune(str(tmp_path), 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000001", "000002", "notes.txt"]
    checkpoints.prune(str(tmp_path / "missing"), 1)


def test_a_run_of_plain_sgd_has_no_state_to_keep(tmp_path: Path) -> None:
    spec = model(tensor("w", 10), options=ADD)
    drivers = train(spec, 2, 8)
    layout, chunks = empty(spec, 1, 1 << 20)
    restore(save(tmp_path, drivers), layout, chunks)
    assert_same(elements(layout, chunks), held(drivers))
    assert set(held(drivers)["w"]) == {"weights"}


@pytest.mark.parametrize("rule", ["SGD", "Adam", "NAdam"])
def test_what_is_being_written_stays_as_it_was_and_costs_a_copy_only_if_an_update_comes(rule: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if rule == "SGD" else {"lr": 0.1}
    (chunk,) = plan(model(tensor("w", 8), rule=rule, options=[options]), 1, 1 << 20).chunks
    stored, plain = StoredChunk(chunk, rule, options), StoredChunk(chunk, rule, options)

    def update(step: int) -> None:
        for one in (stored, plain):
            gradient = torch.linspace(-1.0, step, 8)
            one.apply([Contribution(0, step, 1, step, b"", gradient, ())])

    update(0)
    reading = Reading()
    tensors, _ = stored.capture(reading)
    before = {name: value.clone() for name, value in tensors.items()}
    assert len(tensors) > 1
    assert tensors["weights"].data_ptr() == stored.weights.data_ptr(), "no copy before it is needed"
    update(1)
    update(2)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    for name, value in plain.capture(Reading())[0].items():
        assert torch.equal(stored.capture(Reading(done=True))[0][name], value), "and the training is as without it"
    place = stored.weights.data_ptr()
    update(3)
    assert stored.weights.data_ptr() == place


def test_a_later_snapshot_that_fails_does_not_end_the_care_for_one_that_is_still_written() -> None:
    (chunk,) = plan(model(tensor("w", 8), rule="Adam", options=[{"lr": 0.1}]), 1, 1 << 20).chunks
    stored = StoredChunk(chunk, "Adam", {"lr": 0.1})

    def update(step: int) -> None:
        stored.apply([Contribution(0, step, 1, step, b"", torch.linspace(-1.0, 1.0, 8), ())])

    update(0)
    written, failed = Reading(), Reading()
    tensors, _ = stored.capture(written)
    before = {name: value.clone() for name, value in tensors.items()}
    stored.capture(failed)
    failed.done = True
    update(1)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
