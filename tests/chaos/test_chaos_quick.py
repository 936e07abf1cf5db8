"""Some of the kill loop, quick enough for every change: jobs with faults that are known, and a checkpoint with damage
in every place. The long part is `make chaos`."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import killloop
import oracles
import pytest
import torch
from safetensors.torch import save_file
from schedules import STEPS, Fault, Schedule, draw

from downpour_common.errors import CheckpointError
from downpour_coordinator import checkpoints

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

PLAIN = Schedule(0, "sync", 2, 2, False, 0.3, "ipc", ())


def documents(folder: Path) -> tuple[dict[str, object], str]:
    """What ``--json`` has said, and stderr."""
    return json.loads((folder / "stdout").read_text()), (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults, its checkpoints kept."""
    folder = tmp_path_factory.mktemp("plain")
    command = killloop.command_of(PLAIN, folder)
    at = command.index("--json")
    slowly = [*command[:at], "--set", "keep_checkpoints=9", *command[at:], "--pause-ms", "15"]
    code = killloop.run_command(slowly, folder)
    assert code == 0, (folder / "stderr").read_text()
    return folder / "out"


def test_sync_with_kills_and_a_full_disk_ends_bit_for_bit_like_the_run_without(plain: Path, tmp_path: Path) -> None:
    schedule = replace(PLAIN, faults=(Fault(0.4, "kill", "worker", 1),))
    points = "file.write.after[server/0#0]=error:ENOSPC@2; shard.apply.after[server/1#0]=kill@130; seed=3"
    code = killloop.run_command(killloop.command_of(schedule, tmp_path), tmp_path, points)
    document, said = documents(tmp_path)
    assert code == 0, said
    assert re.search(r"chaos: killed worker/1 \(pid \d+\) \d+\.\d s into the training, step \d+", said)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["chaos"] for row in rows if "chaos" in row] == ["killed worker/1"]
    assert "server/1 killed by signal 9" in " ".join(document["warnings"])
    assert oracles.digest_of(tmp_path / "out") == oracles.digest_of(plain)


def test_async_applies_no_push_twice_and_reports_the_ones_that_are_lost(tmp_path: Path) -> None:
    faults = (Fault(0.3, "stop", "worker", 0, 0.3), Fault(0.7, "kill", "server", 1))
    schedule = Schedule(0, "async-shards", 2, 2, False, 0.3, "ipc", faults)
    code = killloop.run_command(killloop.command_of(schedule, tmp_path), tmp_path)
    document, said = documents(tmp_path)
    assert code == 0, said
    killloop.judge(schedule, tmp_path / "out", tmp_path, document, killloop.References(tmp_path))
    ledger = oracles.ledger_of(tmp_path / "out", tmp_path / "notes", 2, STEPS)
    assert len(ledger.answered) == 2 * STEPS


# ---------------------------------------------------------------- damage


def damages(size: int) -> dict[str, tuple[int, int]]:
    """Name → (length to truncate to, byte whose lowest bit is flipped, -1: none)."""
    flips = {f"bit of byte {at}": (size, at) for at in sorted({0, 7, size // 3, size // 2, size - 2, size - 1})}
    return {**{f"cut to {n}": (n, -1) for n in (0, 1, size // 2, size - 1)}, **flips}


def damage(path: Path, length: int, at: int) -> None:
    """Change the file as :func:`damages` says."""
    data = bytearray(path.read_bytes()[:length])
    if at >= 0:
        data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_whatever_is_damaged_in_a_checkpoint_is_named_and_the_one_before_is_taken(plain: Path, tmp_path: Path) -> None:
    numbers = checkpoints.committed(str(plain))
    assert len(numbers) > 1
    newest = Path(checkpoints.folder_of(str(plain), numbers[-1]))
    for file in sorted(newest.iterdir()):
        for name, (length, at) in damages(file.stat().st_size).items():
            run = tmp_path / f"{file.name} {name}"
            shutil.copytree(plain / "checkpoints", run / "checkpoints")
            damaged = Path(checkpoints.folder_of(str(run), numbers[-1])) / file.name
            damage(damaged, length, at)
            found, skipped = checkpoints.newest(str(run))
            assert Path(found.folder).name == f"{numbers[-2]:06d}", run.name
            assert len(skipped) == 1, run.name
            assert str(damaged) in skipped[0], run.name
            with pytest.raises(CheckpointError):
                checkpoints.load(str(damaged.parent))
            shutil.rmtree(run)
    for file in newest.iterdir():
        run = tmp_path / f"no {file.name}"
        shutil.copytree(plain / "checkpoints", run / "checkpoints")
        (Path(checkpoints.folder_of(str(run), numbers[-1])) / file.name).unlink()
        found, _ = checkpoints.newest(str(run))
        assert Path(found.folder).name == f"{numbers[-2]:06d}", run.name


def test_resuming_past_a_damaged_checkpoint_ends_bit_for_bit_like_the_run_without_faults(
    plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "out")
    numbers = checkpoints.committed(str(tmp_path / "out"))
    whole = oracles.digest_of(plain)
    damaged = Path(checkpoints.folder_of(str(tmp_path / "out"), numbers[-1])) / "shard-1.safetensors"
    damage(damaged, damaged.stat().st_size, damaged.stat().st_size - 1)
    command = killloop.command_of(PLAIN, tmp_path)
    at = command.index("--json")
    code = killloop.run_command([*command[:at], "--resume", str(tmp_path / "out"), *command[at:]], tmp_path)
    _, said = documents(tmp_path)
    assert code == 0, said
    assert re.search(rf"skipped a damaged checkpoint: .*{numbers[-1]:06d}/shard-1\.safetensors.*damaged", said)
    assert oracles.digest_of(tmp_path / "out") == whole


# ---------------------------------------------------------------- the loop itself


def test_a_schedule_follows_from_its_seed_and_every_kind_has_faults() -> None:
    for kind in killloop.KINDS:
        drawn = [draw(seed, kind) for seed in range(60)]
        assert drawn == [draw(seed, kind) for seed in range(60)]
        assert len(set(drawn)) > 50
        assert all(schedule.faults or schedule.failpoints for schedule in drawn)
        struck = {role for schedule in drawn for role in schedule.kills}
        assert set(killloop.KINDS[kind].victims) <= struck | ({"server"} if struck & {"leader", "backup"} else set())


def test_the_ledger_sees_what_it_is_for() -> None:
    ledger = oracles.Ledger({(0, 0), (0, 1)}, {(0, 0), (0, 1)}, [killloop_row([1, 0, 0]), killloop_row([2, 0, 1])])
    assert ledger.lost() == [{(0, 1)}, {(0, 1)}]
    assert [text.split(" by ")[0] for text in ledger.wrong()] == [
        "push 0 of worker/0 was applied 2 times",
        "push 2 of worker/0 was applied",
    ]


def census(folder: Path, weights: list[float], synchronous: bool = True, begun_again: bool = False) -> int:
    """How many problems there are in one pass of as many samples as weights, with the notes of ``folder``."""
    save_file({"0": torch.tensor(weights), "1": torch.tensor(weights)}, folder / "model.safetensors")
    return len(oracles.census_problems(folder, folder, 1, len(weights), synchronous, begun_again))


def test_the_census_counts_what_the_weights_hold_whatever_a_worker_lived_to_note(tmp_path: Path) -> None:
    notes, half = tmp_path / "census-0.txt", [0.5, 0.5, 0.5, 0.5]
    twice = "begun 0 0 0 1\ndone 0 0 0 1\n" + 2 * "begun 0 1 2 3\ndone 0 1 2 3\n"
    notes.write_text(twice)
    assert census(tmp_path, half) == 0
    assert census(tmp_path, [*half, 0.0]) == 1  # not trained
    assert census(tmp_path, half, synchronous=False) == 1
    assert census(tmp_path, half, synchronous=False, begun_again=True) == 0
    # Killed between the update and the note of it, and taken over behind that step.
    notes.write_text("begun 0 0 0 1\nbegun 0 1 2 3\ndone 0 1 2 3\n")
    assert census(tmp_path, half) == 0
    assert census(tmp_path, half, synchronous=False) == 1
    assert census(tmp_path, [0.0, 0.0, 0.5, 0.5]) == 2  # it was not applied; once for each shard
    assert census(tmp_path, [1.0, 1.0, 0.5, 0.5]) == 2
    notes.write_text("begun 0 0 0 1\nbegun 0 0 1 2\nbegun 0 1 2 3\n")
    assert census(tmp_path, half) == 1  # again with other samples
    # Two workers meet in a round: one mean of all its samples.
    notes.write_text("begun 0 0 0 1\n")
    (tmp_path / "census-1.txt").write_text("begun 0 0 2 3\n")
    assert census(tmp_path, [0.25] * 4) == 0
    assert census(tmp_path, half) == 2


def killloop_row(counts: list[int]) -> torch.Tensor:
    """One shard's counts for one worker."""
    return torch.tensor([counts], dtype=torch.float32)
