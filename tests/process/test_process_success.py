"""Jobs that end well: what they leave behind, and that the data and the weights are what they should be."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box, Ended

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

KEYS = {
    "job": str,
    "state": str,
    "exit_code": int,
    "steps": int,
    "samples": int,
    "samples_per_s": float,
    "wall_s": float,
    "train_s": float,
    "start_s": float,
    "pushes": int,
    "pulls": int,
    "bytes": int,
    "wait_share": float,
    "staleness": dict,
    "throughput": float,
    "batch": float,
    "batch_total": float,
    "noise_scale": (float, type(None)),
    "unmeasured": str,
    "efficiency": (float, type(None)),
    "goodput": (float, type(None)),
    "by_worker": dict,
    "by_server": dict,
    "target": dict,
    "late": dict,
    "uncompensated": int,
    "clock_gap_max": int,
    "replicas": int,
    "ranks": int,
    "metrics": dict,
    "out": str,
    "model": str,
    "warnings": list,
    "restarts": int,
    "lost_pushes": int,
    "lost": dict,
    "non_finite": dict,
    "failure": type(None),
}
EPOCHS, SAMPLES = 3, 160
FINAL_LINE = r"^final loss \d+\.\d{4} from the user's own worker\.py$"
NOTE = 'naïve 😀 "quoted" \\ \x7f'


@pytest.fixture(scope="module")
def ended(make_box: Callable[[], Box]) -> Iterator[Ended]:
    """For :class:`TestAsync`."""
    box = make_box()
    options = ("-w", "2", "-s", "2", "--json", "--seed", "5", "--target", "loss=2")
    yield box.run(*options, "own_modules/train.py", str(EPOCHS), NOTE)
    box.close()


class TestAsync:
    """Two workers, two shards, asynchronous; the script's folder holds the user's own common.py and worker.py."""

    def test_stdout_is_one_json_object_with_the_documented_keys(self, ended: Ended) -> None:
        assert ended.code == 0, ended.text
        assert ended.stdout.count("\n") == 1
        document = ended.document
        wrong = {k: document.get(k) for k, kind in KEYS.items() if not isinstance(document.get(k), kind)}
        assert set(document) == set(KEYS)
        assert not wrong
        assert (document["job"], document["state"], document["exit_code"]) == ("train", "SUCCEEDED", 0)
        assert document["samples"] == EPOCHS * SAMPLES
        assert document["pushes"] >= document["samples"] / 16
        assert set(document["staleness"]) == {"mean", "p50", "p99", "max"}
        assert set(document["by_worker"]) == {"worker/0", "worker/1"}
        assert all(0 <= server["busy"] < 2 for server in document["by_server"].values())
        assert document["throughput"] == document["samples_per_s"]
        assert document["noise_scale"] is not None or document["unmeasured"]
        assert document["target"]["reached"]["clock"] >= 0
        assert json.loads((ended.out / "summary.json").read_text()) == document
        assert set(document["metrics"]) == {"loss"}
        assert (document["out"], document["warnings"]) == ("out", [])
        assert 0 < document["start_s"] < document["wall_s"]

    def test_the_scripts_output_is_prefixed_in_the_stream_and_plain_in_the_log(self, ended: Ended) -> None:
        lines = ended.stderr.splitlines()
        for rank in (0, 1):
            assert lines.count(f"worker/{rank} epoch over in rank {rank} of 2") == EPOCHS
            log = (ended.out / "logs" / f"worker-{rank}.log").read_text()
            assert log.splitlines().count(f"epoch over in rank {rank} of 2") == EPOCHS
        assert "worker/0 " not in (ended.out / "logs" / "worker-0.log").read_text()
        assert {f.name for f in (ended.out / "logs").iterdir()} == {
            "worker-0.log",
            "worker-1.log",
            "server-0.log",
            "server-1.log",
        }
        [final] = [line for line in lines if "final loss" in line]
        assert re.search(FINAL_LINE, final.removeprefix("worker/0 ")), final

    def test_the_weights_load_strictly_into_the_plain_model(self, ended: Ended) -> None:
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        tensors = ended.tensors()
        model.load_state_dict(tensors, strict=True)
        assert all(torch.isfinite(t).all() for t in tensors.values())
        assert Path(ended.document["model"]).name == "model.safetensors"
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(SAMPLES, 6, generator=generator)
        model.eval()
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(dim=1)).item()
        printed = re.search(r"final loss (\S+)", ended.stderr)
        assert printed is not None
        assert loss < 1.0
        assert abs(loss - float(printed[1])) < 0.3  # the script looked a little before the end

    def test_the_run_directory_holds_a_committed_checkpoint(self, ended: Ended) -> None:
        manifests = ended.manifests()
        assert manifests
        assert re.fullmatch(r"\d{6}", manifests[-1].parent.name)
        manifest = json.loads(manifests[-1].read_text())
        assert manifest["shards"] == 2
        assert manifest["clock"] == ended.document["steps"]
        for entry in manifest["files"]:
            assert (manifests[-1].parent / entry["file"]).stat().st_size == entry["bytes"]
        leftovers = [p.name for p in ended.out.rglob("*") if ".tmp" in p.name]
        assert not leftovers

    def test_metrics_have_one_row_per_call_of_log(self, ended: Ended) -> None:
        rows = [json.loads(line) for line in (ended.out / "metrics.jsonl").read_text().splitlines()]
        logged = [row for row in rows if "worker" in row]
        assert Counter(row["worker"] for row in logged) == {0: EPOCHS, 1: EPOCHS}
        assert all(isinstance(row["loss"], float) and row["clock"] >= 0 for row in logged)
        assert ended.document["metrics"]["loss"] == logged[-1]["loss"]
        measured = [row["measures"] for row in rows if "measures" in row]
        assert measured[-1]["throughput"] > 0
        assert sum("reached" in row for row in rows) == 1

    def test_job_toml_says_what_was_run(self, ended: Ended) -> None:
        job = ended.job
        assert (job["workers"], job["shards"], job["mode"], job["seed"]) == (2, 2, "async", 5)
        assert job["args"] == [str(EPOCHS), NOTE]
        assert job["script"] == str(ended.out.parent / "own_modules/train.py")  # as one could submit it again
        assert job["settings"]["transport"] == "ipc"
        assert job["settings"]["chunk_bytes"] > 0

    def test_without_a_launcher_the_script_ends_with_the_same_line(self, box: Box, ended: Ended) -> None:
        plain = box.command([sys.executable, "own_modules/train.py", str(EPOCHS)], box.folder).end()
        assert plain.code == 0, plain.text
        lines = plain.stdout.splitlines()
        assert lines[:-1] == ["epoch over in rank 0 of 1"] * EPOCHS
        assert re.search(FINAL_LINE, lines[-1]), lines[-1]
        assert plain.stderr == ""
        assert not (box.folder / "out").exists()


CENSUS = {"uneven": 97, "few": 2, "stream": 11}
CENSUS_EPOCHS = 2


def taken(folder: Path) -> list[tuple[str, int, int]]:
    """Every sample that any rank was given, as (loader, epoch, id)."""
    rows = [line.split() for file in folder.glob("ids-*.txt") for line in file.read_text().splitlines()]
    return [(name, int(epoch), int(number)) for name, epoch, number in rows]


def expect_each_sample_once(folder: Path, ranks: int) -> None:
    assert len(list(folder.glob("ids-*.txt"))) == ranks
    found = Counter(taken(folder))
    expected = {(n, e, i) for n, total in CENSUS.items() for e in range(CENSUS_EPOCHS) for i in range(total)}
    assert {key: n for key, n in found.items() if n > 1} == {}, "given twice"
    assert expected - set(found) == set(), "never given"
    assert set(found) == expected


@pytest.fixture(scope="module")
def twins(make_box: Callable[[], Box]) -> Iterator[tuple[Box, Ended, Ended]]:
    """For :class:`TestSync`."""
    box = make_box()
    long = box.tmpdir / ("long" * 30)
    long.mkdir()
    options = ("-w", "3", "-s", "1", "--mode", "sync", "census.py")
    first = box.run(*options, "ids-a", out="a", TMPDIR=str(long))
    second = box.run(*options, "ids-b", out="b")
    yield box, first, second
    box.close()


class TestSync:
    """Three workers, one shard, synchronous, run twice; the first with a long TMPDIR, where ipc needs another."""

    def test_both_runs_give_the_same_bytes(self, twins: tuple[Box, Ended, Ended]) -> None:
        _, *runs = twins
        for run in runs:
            assert run.code == 0, run.text
        first, second = ((run.out / "model.safetensors").read_bytes() for run in runs)
        assert len(first) > 500
        assert first == second
        import torch

        tensors = runs[0].tensors()
        assert tensors["0.num_batches_tracked"] > 0
        assert not torch.equal(tensors["0.running_mean"], torch.zeros(2))

    @pytest.mark.parametrize("run", ["a", "b"])
    def test_each_sample_is_used_once_per_pass(self, twins: tuple[Box, Ended, Ended], run: str) -> None:
        box, *_ = twins
        expect_each_sample_once(box.folder / f"ids-{run}", ranks=3)

    def test_both_runs_share_the_samples_out_alike(self, twins: tuple[Box, Ended, Ended]) -> None:
        box, *_ = twins
        for rank in range(3):
            first, second = ((box.folder / f"ids-{run}" / f"ids-{rank}.txt").read_text() for run in "ab")
            assert first == second
            order = [int(line.split()[2]) for line in first.splitlines() if line.startswith("uneven 0")]
            assert order != sorted(order)

    def test_sockets_live_in_a_short_path_that_is_removed(self, twins: tuple[Box, Ended, Ended]) -> None:
        _, first, _ = twins
        address = re.search(r"address ipc://(\S+)", first.text)
        assert address is not None, first.text
        assert not address[1].startswith(first.out.parent.as_posix())
        assert not Path(address[1]).parent.exists()

    def test_the_closing_table_gives_the_paths_whole(self, twins: tuple[Box, Ended, Ended]) -> None:
        _, first, _ = twins
        table = first.stdout[first.stdout.rindex("SUCCEEDED") :]
        assert re.search(r"^weights +a/model\.safetensors *$", table, re.MULTILINE)
        assert first.stderr == ""
        assert all(f"worker/{rank} census taken, 2 epochs\n" in first.stdout for rank in range(3))


def test_async_over_tcp_gives_each_sample_once(box: Box) -> None:
    ended = box.run("-w", "2", "-s", "1", "--set", "transport=tcp", "--json", "census.py", "ids")
    assert ended.code == 0, ended.text
    assert re.search(r"worker/0 address tcp://127\.0\.0\.1:\d+$", ended.stderr, re.MULTILINE)
    expect_each_sample_once(box.folder / "ids", ranks=2)
    assert ended.document["samples"] == CENSUS_EPOCHS * sum(CENSUS.values())
    assert ended.job["settings"]["transport"] == "tcp"
