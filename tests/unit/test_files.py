"""The coordinator's files: nothing outside of its folder, and each byte once, whatever is repeated."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common.errors import ConfigError
from downpour_common.messages import Refusal
from downpour_coordinator.files import PART_BYTES, Files

CODE = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CODE).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(str(tmp_path / "data"))


def put(files: Files, offset: int, payload: bytes, digest: str = DIGEST, total: int = len(CODE)) -> m.Message:
    return files.put_bundle(m.PutBundle(7, digest, total, offset, payload))


def log(files: Files, offset: int, payload: bytes, **fields: Any) -> m.Message:
    found = {"node": "w1", "instance": "i", "job": "job-1", "role": "worker", "index": 0, "epoch": 0, **fields}
    return files.put_log(m.LogData(7, **found, offset=offset, payload=payload))


def refused(message: m.Message) -> str:
    assert isinstance(message, m.Refused), message
    assert message.request == 7
    return message.code


def get(files: Files, path: str, offset: int = 0, length: int = 100, bundle: str = "b" * 64) -> m.Message:
    return files.read(m.GetFile(7, "job-1", path, offset, length), bundle)


def make(files: Files, path: str, data: bytes = b"data") -> None:
    where = Path(files.job("job-1")) / path
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_bytes(data)


def everything(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def test_the_folder_is_for_its_owner_only(files: Files) -> None:
    assert os.stat(files.data_dir).st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        Files(str(tmp_path / "file" / "data"))


# ---------------------------------------------------------------- bundles


def test_a_bundle_comes_in_parts(files: Files) -> None:
    assert put(files, 0, b"") == m.Ack(7, 0)
    for at in range(0, len(CODE), 1000):
        assert not files.has_bundle(DIGEST)
        assert put(files, at, CODE[at : at + 1000]) == m.Ack(7, min(at + 1000, len(CODE)))
    assert files.has_bundle(DIGEST)
    assert put(files, 0, b"") == m.Ack(7, len(CODE)), "it need not be sent again"
    assert get(files, "bundle", 0, 100, DIGEST) == m.FileData(7, len(CODE), 0, CODE[:100])


def test_gaps_repeats_and_overlaps_heal(files: Files) -> None:
    put(files, 0, CODE[:1000])
    for offset, payload in [(0, CODE[:1000]), (500, CODE[500:1500]), (2000, CODE[2000:3000])]:
        assert put(files, offset, payload) == m.Ack(7, 1000)
    assert put(files, 1000, CODE[1000:]) == m.Ack(7, len(CODE))
    assert files.has_bundle(DIGEST)


def test_a_bundle_that_is_not_what_it_says_is_dropped(files: Files) -> None:
    assert refused(put(files, 0, CODE[:-1] + b"?")) == Refusal.MALFORMED
    assert not files.has_bundle(DIGEST)
    assert put(files, 0, b"") == m.Ack(7, 0), "from the beginning"
    put(files, 0, CODE)
    assert files.has_bundle(DIGEST)


def test_more_than_was_announced_is_not_taken(files: Files) -> None:
    assert put(files, 0, CODE, total=100) == m.Ack(7, 0)
    assert put(files, 0, CODE[:90], total=100) == m.Ack(7, 90)
    assert put(files, 90, CODE[90:110], total=100) == m.Ack(7, 90)


def test_two_who_send_the_same_bundle_help_each_other(files: Files) -> None:
    put(files, 0, CODE[:4000])
    assert put(files, 0, CODE[:4000]) == m.Ack(7, 4000)
    put(files, 4000, CODE[4000:])
    assert files.has_bundle(DIGEST)


@pytest.mark.parametrize("digest", ["", "../" * 10 + "etc", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_a_digest_is_a_digest(files: Files, digest: str, tmp_path: Path) -> None:
    assert refused(put(files, 0, CODE, digest)) == Refusal.MALFORMED
    assert not files.has_bundle(digest)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize(("offset", "total"), [(-1, 5), (0, 0), (0, -1)])
def test_sizes_make_sense(files: Files, offset: int, total: int) -> None:
    assert refused(put(files, offset, b"", total=total)) == Refusal.MALFORMED


def test_a_bundle_that_is_too_large_is_refused_at_once(files: Files, tmp_path: Path) -> None:
    message = put(files, 0, b"", total=1 << 50)
    assert refused(message) == Refusal.TOO_LARGE
    assert everything(tmp_path) == {}


@given(st.lists(st.tuples(st.integers(0, len(CODE)), st.integers(0, 5000)), max_size=20))
def test_whatever_comes_in_whatever_order_the_bundle_is_whole(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    files = Files(str(tmp_path_factory.mktemp("data")))
    for offset, size in parts:
        answer = put(files, offset, CODE[offset : offset + size])
        assert isinstance(answer, m.Ack)
    held = put(files, 0, b"")
    assert isinstance(held, m.Ack)
    put(files, held.version, CODE[held.version :])
    assert Path(files.bundles, DIGEST).read_bytes() == CODE


# ---------------------------------------------------------------- logs


def test_output_is_kept_by_process_and_epoch(files: Files) -> None:
    log(files, 0, b"one")
    log(files, 0, b"two", epoch=1)
    log(files, 0, b"three", role="server", index=3)
    names = {str(path): size for path, size in files.list("job-1")}
    assert names == {"logs/worker-0.log": 3, "logs/worker-0.1.log": 3, "logs/server-3.log": 5}


def test_output_is_appended_once(files: Files) -> None:
    assert log(files, 0, b"0123") == m.Ack(7, 4)
    assert log(files, 0, b"0123") == m.Ack(7, 4)
    assert log(files, 2, b"2345") == m.Ack(7, 6)
    assert log(files, 8, b"89") == m.Ack(7, 6), "a gap: it goes on from what is held"
    assert log(files, 6, b"") == m.Ack(7, 6)
    assert get(files, "logs/worker-0.log") == m.FileData(7, 6, 0, b"012345")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=30))
def test_whatever_is_repeated_output_is_what_was_put_out(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    files = Files(str(tmp_path_factory.mktemp("data")))
    text, held = bytes(range(100)), 0
    for offset, size in parts:
        answer = log(files, offset, text[offset : offset + size])
        assert isinstance(answer, m.Ack)
        assert answer.version == (max(held, offset + size) if offset <= held else held)
        held = answer.version
    assert not parts or Path(files.job("job-1"), "logs/worker-0.log").read_bytes() == text[:held]


@pytest.mark.parametrize(
    "fields",
    [{"role": "../../x"}, {"role": "user"}, {"index": -1}, {"epoch": -1}, {"offset": -1}],
    ids=repr,
)
def test_a_log_is_one_of_a_process(files: Files, fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"offset": 0, **fields}
    assert refused(log(files, fields.pop("offset"), b"text", **fields)) == Refusal.MALFORMED
    assert everything(tmp_path) == {}


def test_output_that_cannot_be_written_is_sent_again(files: Files) -> None:
    Path(files.job("job-1")).write_text("in the way")
    assert refused(log(files, 0, b"text")) == Refusal.NOT_READY


# ---------------------------------------------------------------- reading


def test_files_are_read_in_pieces(files: Files) -> None:
    make(files, "metrics.jsonl", b"0123456789")
    assert get(files, "metrics.jsonl", 0, 4) == m.FileData(7, 10, 0, b"0123")
    assert get(files, "metrics.jsonl", 8, 4) == m.FileData(7, 10, 8, b"89")
    for offset in (10, 500, (1 << 62)):
        assert get(files, "metrics.jsonl", offset, 4) == m.FileData(7, 10, offset, b"")


def test_a_piece_has_a_limit(files: Files) -> None:
    make(files, "model.safetensors", bytes(PART_BYTES + 5))
    data = get(files, "model.safetensors", 0, 1 << 60)
    assert isinstance(data, m.FileData)
    assert memoryview(data.payload).nbytes == PART_BYTES


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../job-2/secret",
        "logs/../../job-2/secret",
        "/etc/passwd",
        "logs//x",
        "logs/",
        "./metrics.jsonl",
        ".hidden",
        "logs/.hidden",
        "a\0b",
        "a\nb",
        "a\\b",
        "metrics.jsonl\n",
        "~",
        "x" * 500,
    ],
)
def test_nothing_else_can_be_read(files: Files, path: str) -> None:
    make(files, "metrics.jsonl")
    make(files, ".hidden")
    make(files, "../job-2/secret")
    assert refused(get(files, path)) == Refusal.MALFORMED


@pytest.mark.parametrize("path", ["nothing", "logs", "logs/nothing", "bundle"])
def test_what_is_not_there_is_unknown(files: Files, path: str) -> None:
    make(files, "logs/worker-0.log")
    assert refused(get(files, path)) == Refusal.UNKNOWN


def test_links_are_not_followed(files: Files, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    make(files, "metrics.jsonl")
    os.symlink(tmp_path / "secret", os.path.join(files.job("job-1"), "link"))
    assert refused(get(files, "link")) == Refusal.UNKNOWN


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -1)])
def test_pieces_make_sense(files: Files, offset: int, length: int) -> None:
    make(files, "metrics.jsonl")
    assert refused(get(files, "metrics.jsonl", offset, length)) == Refusal.MALFORMED


def test_what_is_listed_can_be_read(files: Files) -> None:
    for path in ("job.toml", "checkpoints/000001/manifest.json", "logs/worker-0.1.log", ".secret", "logs/.x"):
        make(files, path)
    assert files.list("job-1") == [["checkpoints/000001/manifest.json", 4], ["job.toml", 4], ["logs/worker-0.1.log", 4]]
    for path, _ in files.list("job-1"):
        assert isinstance(get(files, str(path)), m.FileData)
    assert files.list("job-2") == []


# ---------------------------------------------------------------- checkpoints of others


def test_a_checkpoint_can_be_another_jobs_too(files: Files) -> None:
    make(files, "checkpoints/000003/manifest.json", b"{}")
    make(files, "checkpoints/000003/shard-0.safetensors", b"weights")
    files.adopt_checkpoint("job-1", 3, "job-2")
    assert files.list("job-2") == [
        ["checkpoints/000003/manifest.json", 2],
        ["checkpoints/000003/shard-0.safetensors", 7],
    ]
    with pytest.raises(OSError, match="000009"):
        files.adopt_checkpoint("job-1", 9, "job-2")
