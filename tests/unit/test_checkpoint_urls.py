"""Copies of checkpoints at a URL: whole or not at all, pruned, tried again, and gone on from."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_checkpoints import SPEC, save, train
from unit_kit import JOB

from downpour_common.errors import CheckpointError, ConfigError
from downpour_coordinator import checkpoints, copies, urls
from downpour_coordinator.copies import Copies
from downpour_coordinator.manifest import decode, encode
from downpour_coordinator.sources import FolderSource
from downpour_coordinator.urls import UrlStore, fetch_newest
from downpour_deploy.resolve import Wishes, resolve

LONG_S = 20.0


class Failing(MemoryFileSystem):  # type: ignore[misc]
    """Memory that can be full, or gone, or lose the end of what is written."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    trouble = ""
    """in which files' names writing fails"""
    cut = ""
    """which files are written without their last byte"""
    written: list[str] = []  # noqa: RUF012
    block: threading.Event | None = None
    """writing waits for it"""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":
            self.written.append(path)
            if Failing.block is not None:
                Failing.block.wait(LONG_S)
            if Failing.trouble and Failing.trouble in path:
                raise RuntimeError("the bucket is away")
        return super()._open(path, mode, **options)


@pytest.fixture
def failing() -> Iterator[type[Failing]]:
    """Registered with fsspec as failing://, empty and in good order."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.store.clear()
    Failing.pseudo_dirs[:] = [""]
    Failing.trouble, Failing.block = "", None
    Failing.written.clear()
    yield Failing
    if Failing.block is not None:
        Failing.block.set()
    Failing.store.clear()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints; not to be changed."""
    run = tmp_path_factory.mktemp("run")
    drivers = train(SPEC, 2, 100)
    for number in (1, 2, 3):
        save(run, drivers, number)
        of_job(run, number, JOB)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def of_job(run: Path, number: int, job: str) -> None:
    """Have the checkpoint say which job it is of."""
    path = Path(checkpoints.folder_of(str(run), number), "manifest.json")
    path.write_bytes(encode({**decode(path.read_bytes(), "").fields, "job": job}))


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for another thread."""
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.002)


def copied(run: Path, url: str, *numbers: int, keep: int = 2, job: str = JOB) -> Copies:
    """Offer checkpoints one after the other and wait for the last."""
    made = Copies(str(run), url, keep, job, first_retry_s=0.001)
    for number in numbers:
        made.offer(number)
        until(lambda n=number: made.state.number == n or made.state.problem, "the copy")
    made.end()
    made.join()
    return made


def test_what_is_committed_is_copied_and_older_copies_are_deleted(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    made = copied(run, url, 1, 2, 3)
    assert (made.state.number, made.state.problem) == (3, "")
    store = UrlStore(url)
    assert (store.numbers(), store.all_numbers()) == ([2, 3], [2, 3])
    for number in (2, 3):
        assert checkpoints.load(str(tmp_path / f"there/checkpoints/{number:06d}")).manifest["clock"] == 3
    assert not list((tmp_path / "there").rglob("*.tmp*"))


def test_the_manifest_comes_last(run: Path, failing: type[Failing]) -> None:
    copied(run, "failing://bucket/x", 1)
    assert [path.rpartition("/")[2] for path in failing.written] == [
        "shard-0.safetensors", "shard-1.safetensors", "manifest.json",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["shard-0", "shard-1", "manifest"])
def test_a_copy_that_fails_does_not_count_and_is_tried_again(run: Path, failing: type[Failing], where: str) -> None:
    failing.trouble = where
    made = Copies(str(run), "failing://bucket/x", 2, JOB, first_retry_s=0.001)
    made.offer(1)
    until(lambda: len(failing.written) > 6, "several attempts")
    assert made.state.number == 0
    assert made.state.problem.startswith("checkpoint 1 is not at failing://bucket/x: ")
    assert "the bucket is away" in made.state.problem
    assert UrlStore("failing://bucket/x").numbers() == []
    failing.trouble = ""
    until(lambda: made.state.number == 1, "the copy")
    assert made.state.problem == ""
    made.end()
    assert made.join() == ""


def test_at_the_end_a_store_that_is_away_is_given_up_and_named(run: Path, failing: type[Failing]) -> None:
    failing.trouble = "shard"
    made = Copies(str(run), "failing://bucket/x", 2, JOB, first_retry_s=0.001)
    made.offer(3)
    made.end()
    assert "the bucket is away" in made.join()


def test_a_store_that_hangs_holds_nobody_up(run: Path, failing: type[Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.block = threading.Event()
    made = Copies(str(run), "failing://bucket/x", 2, JOB, first_retry_s=0.001)
    made.offer(3)
    made.end()
    assert "did not take a byte for 0.1 s" in made.join(quiet_s=0.1)
    made.abandon()
    assert "was not waited for" in made.join()
    failing.block.set()


def test_while_a_copy_takes_long_only_the_newest_is_next(run: Path, failing: type[Failing]) -> None:
    failing.block = threading.Event()
    made = Copies(str(run), "failing://bucket/x", 2, JOB)
    made.offer(1)
    until(lambda: failing.written, "the first copy")
    made.offer(2)
    made.offer(3)
    failing.block.set()
    until(lambda: made.state.number == 3, "the copy")
    assert UrlStore("failing://bucket/x").numbers() == [1, 3]
    made.end()
    made.join()


def test_one_that_was_pruned_here_meanwhile_is_left_out(run: Path, tmp_path: Path) -> None:
    checkpoints.remove(str(run), 1)
    made = Copies(str(run), f"file://{tmp_path}/there", 2, JOB)
    made.offer(1)
    made.offer(3)
    made.end()
    assert made.join() == ""
    assert made.state.number == 3


def test_one_that_is_damaged_here_is_not_copied(run: Path, tmp_path: Path) -> None:
    path = Path(checkpoints.folder_of(str(run), 3), "shard-1.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    made = copied(run, f"file://{tmp_path}/there", 3)
    assert "digest" in made.state.problem
    assert UrlStore(f"file://{tmp_path}/there").numbers() == []


def test_the_checkpoints_of_another_job_are_neither_replaced_nor_deleted(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for number in (1, 2, 3):
        of_job(other, number, "other")
    copied(other, url, 2)
    made = copied(run, url, 2, job=JOB)
    assert "is of job other; give each job a URL of its own" in made.state.problem
    assert copied(run, url, 3, keep=1).state.problem == ""
    assert UrlStore(url).numbers() == [2, 3], "2 is not this job's to delete"


def test_a_job_that_goes_on_from_another_takes_its_copies_over(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    copied(run, url, 1, 2)
    of_job(run, 3, "next")
    assert copied(run, url, 3, job="next").state.problem == ""
    assert UrlStore(url).numbers() == [2, 3]


def test_what_is_there_already_is_not_written_again(run: Path, failing: type[Failing]) -> None:
    copied(run, "failing://bucket/x", 3)
    failing.written.clear()
    assert copied(run, "failing://bucket/x", 3).state.number == 3
    assert failing.written == []


def test_a_torn_copy_is_made_anew(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    copied(run, url, 3)
    manifest = tmp_path / "there/checkpoints/000003/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert copied(run, url, 3).state.problem == ""
    assert checkpoints.load(str(manifest.parent)).manifest["clock"] == 3


def test_copies_do_not_go_into_a_checkpoint(run: Path) -> None:
    made = copied(run, f"file://{checkpoints.folder_of(str(run), 1)}", 3)
    assert "is a checkpoint itself" in made.state.problem


# ---------------------------------------------------------------- reading


def test_the_newest_sound_one_is_fetched_verified(run: Path, tmp_path: Path) -> None:
    path = Path(checkpoints.folder_of(str(run), 3), "shard-1.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    here = tmp_path / "here"
    found, skipped = fetch_newest(f"file://{run}", str(here))
    assert found.folder == checkpoints.folder_of(str(here), 2)
    assert len(skipped) == 1
    assert "shard-1.safetensors does not match" in skipped[0].replace(":", "")
    assert os.listdir(here / "checkpoints") == ["000002"]
    again, _ = fetch_newest(f"file://{run}", str(here))
    assert again.folder == found.folder, "it is there already"


def test_the_url_of_one_checkpoint_will_do(run: Path, tmp_path: Path) -> None:
    found, _ = fetch_newest(f"file://{checkpoints.folder_of(str(run), 1)}", str(tmp_path / "here"))
    assert found.folder == checkpoints.folder_of(str(tmp_path / "here"), 1)


def test_another_checkpoint_of_that_number_here_is_left_alone(run: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    save(here, train(SPEC, 1, 100), 3)
    _, skipped = fetch_newest(f"file://{run}", str(here))
    assert "is another checkpoint 3" in skipped[0]
    assert checkpoints.load(checkpoints.folder_of(str(here), 3)).manifest["shards"] == 1


@pytest.mark.parametrize("url", ["file:///nowhere/at/all", "memory://nothing-there"])
def test_nothing_at_a_url_is_an_error_that_names_it(url: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=url):
        fetch_newest(url, str(tmp_path))


def test_a_scheme_that_nobody_knows_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody://x"):
        fetch_newest("nobody://x", str(tmp_path))


def test_an_error_of_the_file_system_names_the_file(
    run: Path, failing: type[Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(run, "failing://bucket/x", 3)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("connection reset")

    store = UrlStore("failing://bucket/x")
    monkeypatch.setattr(failing, "_open", broken)
    with pytest.raises(CheckpointError, match=r"000003/manifest\.json: RuntimeError: connection reset"):
        list(store.read(3, "manifest.json"))


# ---------------------------------------------------------------- downpour run


def wishes(script: Path, **fields: Any) -> Wishes:
    """What the user typed."""
    given = {"workers": "1", "shards": 1, "mode": "async", "device": "cpu", "threads": "1", "seed": None, "out": None}
    given |= {"resume": None, "settings": (), "name": None, **fields}
    return Wishes(script=str(script), args=(), **given)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("")
    return path


def test_resume_from_a_url_goes_on_in_a_new_run_directory(run: Path, script: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    job = resolve(wishes(script, resume=f"file://{run}", out=out))
    assert job.spec.resume == checkpoints.folder_of(out, 3)
    assert job.checkpoint is not None
    assert job.checkpoint.manifest["clock"] == 3


def test_what_was_fetched_for_a_job_that_cannot_run_is_deleted(run: Path, script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="grace_s"):
        resolve(wishes(script, resume=f"file://{run}", out=str(out), settings=("grace_s=-1",)))
    assert not out.exists()


@pytest.mark.parametrize("settings", [("checkpoint_url=nobody://x",), ("checkpoint_url=/tmp/x",)])
def test_a_url_that_cannot_be_used_is_told_before_anything_starts(script: Path, settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        resolve(wishes(script, settings=settings))


def test_the_modules_are_cheap_to_import() -> None:
    """fsspec comes with the first URL, not with the command line."""
    for module in (copies, urls):
        assert "fsspec" not in vars(module)
    assert FolderSource("nowhere").numbers() == []
