"""safetensors files: others can read ours, damage is told from data, and a failed write leaves nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from downpour_common.dtypes import FROM_SAFETENSORS, ITEMSIZE, SAFETENSORS
from downpour_common.errors import CheckpointError
from downpour_common.tensorfile import TensorFile, TensorHead, write_atomically, write_tensors


def example(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor with different values in different places."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 3 % 251).to(getattr(torch, dtype)).reshape(shape)


def raw(value: torch.Tensor) -> bytes:
    """The tensor's bytes."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors with our own writer."""
    heads = [TensorHead(k, str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in tensors.items()]
    write_tensors(str(path), heads, [raw(v) for v in tensors.values()], metadata)


def test_every_dtype_has_a_size_and_a_name_in_files() -> None:
    assert set(SAFETENSORS) == set(ITEMSIZE)
    assert len(FROM_SAFETENSORS) == len(SAFETENSORS)
    for name, size in ITEMSIZE.items():
        assert torch.empty(1, dtype=getattr(torch, name)).element_size() == size


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_safetensors_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "b": example(dtype, 2, 3),
        "a.weight": example(dtype, 5),
        "scalar": example(dtype),
        "none": example(dtype, 0, 4),
    }
    write(tmp_path / "f", tensors, {"format": "pt"})
    found = safetensors.torch.load_file(tmp_path / "f")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)


def test_numpy_alone_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": example("float32", 4, 3)})
    found = safetensors.numpy.load_file(tmp_path / "f")
    assert found["w"].tolist() == example("float32", 4, 3).tolist()


def test_the_metadata_is_where_others_look_for_it(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": example("int8", 1)}, {"format": "pt"})
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with TensorFile(str(tmp_path / "f")) as ours:
        assert ours.metadata == {"format": "pt"}


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"t{i}": example(dtype, 3, i) for i, dtype in enumerate(sorted(set(ITEMSIZE) - {"complex128"}))}
    safetensors.torch.save_file(tensors, tmp_path / "f", {"format": "pt"})
    with TensorFile(str(tmp_path / "f")) as file:
        assert set(file) == set(tensors)
        assert len(file) == len(tensors)
        for name, value in tensors.items():
            head = file.heads[name]
            assert (head.name, head.dtype, head.shape) == (name, str(value.dtype)[6:], tuple(value.shape))
            assert bytes(file[name]) == raw(value)


def test_data_may_be_cut_anywhere_and_is_aligned(tmp_path: Path) -> None:
    value = example("float64", 4)
    data = raw(value)
    head = TensorHead("a name of odd length", "float64", (4,))
    write_tensors(str(tmp_path / "f"), [head], [data[:3], b"", memoryview(data)[3:20], bytearray(data[20:])])
    written = (tmp_path / "f").read_bytes()
    assert int.from_bytes(written[:8], "little") % 8 == 0
    assert safetensors.torch.load_file(tmp_path / "f")["a name of odd length"].tolist() == value.tolist()


def test_a_mapped_file_may_be_written_to_without_changing_it(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": example("float32", 4)})
    before = (tmp_path / "f").read_bytes()
    with TensorFile(str(tmp_path / "f")) as file:
        torch.frombuffer(file["w"], dtype=torch.float32).zero_()
    assert (tmp_path / "f").read_bytes() == before


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": example("float32", 4)})
    with TensorFile(str(tmp_path / "f")) as file:
        kept = np.frombuffer(file["w"], dtype=np.float32)
    os.unlink(tmp_path / "f")
    assert kept.tolist() == example("float32", 4).tolist()


# ---------------------------------------------------------------- damage


def _file(header: Any, data: bytes = b"\x00" * 16) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def _row(**fields: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}}


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "shorter than a length": b"\x08\x00\x00",
    "only a length": (8).to_bytes(8, "little"),
    "length past the end": (1 << 40).to_bytes(8, "little") + b"{}",
    "length of nothing": (0).to_bytes(8, "little") + b"{}",
    "not json": _file(b"{garbage"),
    "not utf-8": _file(b'{"\xff\xfe": 1}'),
    "a list": _file([]),
    "a number": _file(12),
    "a string": _file("ab"),
    "null": _file(b"null"),
    "nested without end": _file(b'{"a":' * 50_000),
    "row a list": _file({"w": []}),
    "row a string": _file({"w": "F32"}),
    "row empty": _file({"w": {}}),
    "dtype unknown": _file(_row(dtype="F7")),
    "dtype a list": _file(_row(dtype=["F32"])),
    "shape negative": _file(_row(shape=[-4])),
    "shape twice negative": _file(_row(shape=[-2, -2])),
    "shape of strings": _file(_row(shape=["4"])),
    "shape fractional": _file(_row(shape=[4.5])),
    "shape another size": _file(_row(shape=[5])),
    "shape not a list": _file(_row(shape=4)),
    "offsets backwards": _file(_row(data_offsets=[16, 0])),
    "offsets negative": _file(_row(data_offsets=[-8, 8])),
    "offsets past the end": _file(_row(data_offsets=[8, 24])),
    "offsets infinite": _file(b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, Infinity]}}'),
    "offsets one": _file(_row(data_offsets=[0])),
    "offsets three": _file(_row(data_offsets=[0, 16, 16])),
    "data cut short": _file(_row(), b"\x00" * 15),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_a_checkpoint_error_that_names_the_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(CheckpointError) as caught:
        TensorFile(str(path))
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)


def test_the_file_that_the_damaged_ones_are_made_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(_file(_row()))
    with TensorFile(str(tmp_path / "f")) as file:
        assert bytes(file["w"]) == b"\x00" * 16


def test_a_file_that_is_not_there_and_a_folder_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            TensorFile(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), at=st.integers(0, 200), byte=st.integers(0, 255))
def test_truncated_and_garbled_files_raise_nothing_but_checkpoint_errors(
    tmp_path: Path, cut: int, at: int, byte: int
) -> None:
    path = tmp_path / "f"
    rows = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "v": _row(data_offsets=[0, 16])["w"]}
    whole = bytearray(_file({"__metadata__": {"format": "pt"}, **rows}))
    whole[at % len(whole)] = byte
    path.write_bytes(whole[: len(whole) - cut % len(whole)])
    try:
        with TensorFile(str(path)) as file:
            sound = all(len(file[name]) == file.heads[name].nbytes for name in file)
    except CheckpointError:
        return
    assert sound


# ---------------------------------------------------------------- failed writes


def _left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_that_is_not_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write(tmp_path / "missing" / "f", {"w": example("float32", 1)})
    assert caught.value.path == str(tmp_path / "missing" / "f")


def _full_disk() -> Iterator[bytes]:
    yield b"\x00" * 8
    raise OSError(errno.ENOSPC, "No space left on device")


def _unreadable() -> Iterator[bytes]:
    yield b"\x00" * 8
    raise CheckpointError("elsewhere", "is damaged")


@pytest.mark.parametrize("before", [None, b"the old file"])
@pytest.mark.parametrize("data", [_full_disk, _unreadable, lambda: [b"\x00" * 8], lambda: [b"\x00" * 24]])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, data: Any, before: bytes | None) -> None:
    path = tmp_path / "f"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises((CheckpointError, ValueError)):
        write_tensors(str(path), [TensorHead("w", "float32", (4,))], data())
    assert _left(tmp_path) == ([] if before is None else ["f"])
    assert before is None or path.read_bytes() == before


def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_tensors(str(tmp_path / "f"), [TensorHead("w", "float32", (4,))], _full_disk())


def test_a_write_is_seen_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def look(file: Any) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(str(path), look)
    assert path.read_bytes() == b"new"
    assert _left(tmp_path) == ["f"]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).partition(".tmp")[0])
        fsync(descriptor)

    def noted_rename(source: str, target: str) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    write_atomically(str(tmp_path / "f"), lambda file: file.write(b"data"))
    assert calls == ["fsync f", "rename", f"fsync {tmp_path.name}"]
