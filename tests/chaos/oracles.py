"""What a finished job must look like, told from its files alone: see workloads/ for what the scripts note."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from downpour_common.layout import ModelSpec, plan


def last_checkpoint(out: Path) -> Path:
    """The newest committed checkpoint of a run directory."""
    return sorted((out / "checkpoints").glob("[0-9]*/manifest.json"))[-1].parent


def digest_of(out: Path, buffers: bool = True) -> str:
    """SHA-256 of the final weights, optimizer state and versions, as the last checkpoint has them.

    ``buffers``: and of BatchNorm's statistics, of which a process that takes over knows those of the last pass only.
    """
    folder = last_checkpoint(out)
    manifest = json.loads((folder / "manifest.json").read_text())
    layout = plan(ModelSpec.from_wire(manifest["model"]), manifest["shards"], manifest["chunk_bytes"])
    counted = {str(chunk.index) for chunk in layout.chunks if buffers or chunk.kind != "buffer"}
    digest = hashlib.sha256()
    for entry in sorted(manifest["files"], key=lambda e: e["file"]):
        for index, row in sorted(entry["chunks"].items()):
            if index in counted:
                digest.update(json.dumps([index, row["version"], row["scalars"]]).encode())
        for name, tensor in sorted(load_file(folder / entry["file"]).items()):
            if name.partition(".")[0] not in counted:
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(str(manifest["clock"]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- the ledger


@dataclass(slots=True)
class Ledger:
    """What became of the pushes of ``workloads/ledger.py``; a push is (slot, number)."""

    begun: set[tuple[int, int]] = field(default_factory=set)
    answered: set[tuple[int, int]] = field(default_factory=set)
    rows: list[torch.Tensor] = field(default_factory=list)
    """by shard: how often each was applied, [slots, steps]"""

    def wrong(self) -> list[str]:
        """What must never be: applied more than once, or by halves, or without having been begun."""
        found = []
        for shard, row in enumerate(self.rows):
            for slot, number in (row != row.round()).nonzero().tolist() + (row > 1).nonzero().tolist():
                found.append(
                    f"push {number} of worker/{slot} was applied {row[slot, number]:g} times by server/{shard}"
                )
            strangers = [tuple(p) for p in (row > 0).nonzero().tolist() if tuple(p) not in self.begun]
            found += [f"push {n} of worker/{s} was applied by server/{shard}, and never begun" for s, n in strangers]
        return found

    def lost(self) -> list[set[tuple[int, int]]]:
        """By shard: the pushes that were answered and are not in the weights."""
        return [{p for p in self.answered if not row[p]} for row in self.rows]


def ledger_of(out: Path, books: Path, slots: int, steps: int) -> Ledger:
    """Read the books and the final weights of a ledger's run."""
    ledger = Ledger()
    for slot in range(slots):
        path = books / f"book-{slot}.bin"
        entries = path.read_bytes() if path.exists() else b""
        for at in range(0, len(entries) - 4, 5):
            push = (slot, int.from_bytes(entries[at + 1 : at + 5], "little"))
            (ledger.begun if entries[at] == ord("b") else ledger.answered).add(push)
    weights = load_file(out / "model.safetensors")
    last_first = sorted(weights, key=int, reverse=True)  # as tensors are laid out over the shards
    ledger.rows = [weights[name].reshape(slots, steps) for name in last_first]
    return ledger


# ---------------------------------------------------------------- the census


@dataclass(frozen=True, slots=True)
class Step:
    """A step of one worker, as noted; ``done``: it is known to be completed."""

    done: bool
    number: int
    """of its pass"""
    clock: int
    samples: tuple[int, ...]


def census_problems(
    out: Path, notes: Path, passes: int, samples: int, synchronous: bool, begun_again: bool
) -> list[str]:
    """What contradicts "each sample once in each pass" in what ``workloads/census.py`` has noted and trained.

    ``synchronous``: a step that was computed again must have had the same samples, and counts once, and the weights
    must be those of the steps that are noted, each applied once by each shard. So it does not matter whether a worker
    lived to note that a step was done. In the other modes a job that has ``begun_again`` as a whole may have trained
    samples twice: then none may be missing, and that is all.
    """
    problems: list[str] = []
    trained: dict[int, Counter[int]] = {n: Counter() for n in range(passes)}
    rounds: dict[int, list[Step]] = {}
    for path in sorted(notes.glob("census-*.txt")):
        seen: dict[int, Step] = {}
        for step in _steps_of(path):
            known = seen.setdefault(step.clock, step)
            if synchronous and (known.number, known.samples) != (step.number, step.samples):
                problems.append(f"{path.name}: step {step.clock} was computed again with other samples")
            if known is step if synchronous else step.done:
                trained[step.number].update(step.samples)
                rounds.setdefault(step.clock, []).append(step)
    for number, counts in trained.items():
        missing = sorted(set(range(samples)) - set(counts))
        twice = sorted(i for i, n in counts.items() if n > 1)
        if missing:
            problems.append(f"pass {number}: {len(missing)} samples were not trained: {missing[:8]}")
        if twice and (synchronous or not begun_again):
            problems.append(f"pass {number}: {len(twice)} samples were trained more than once: {twice[:8]}")
    if synchronous:
        problems += _weights_problems(out, rounds, passes, samples)
    return problems


def _steps_of(path: Path) -> list[Step]:
    steps = []
    for line in path.read_text().splitlines():
        word, *numbers = line.split()
        number, clock, *samples = map(int, numbers)
        steps.append(Step(word == "done", number, clock, tuple(samples)))
    return steps


def _weights_problems(out: Path, rounds: dict[int, list[Step]], passes: int, samples: int) -> list[str]:
    """Where the final weights are others than those of these rounds, each applied once."""
    expected = torch.zeros(passes, samples)
    for steps in rounds.values():
        size = sum(len(step.samples) for step in steps)
        for step in steps:
            expected[step.number, list(step.samples)] += 1 / size
    problems = []
    for name, weights in sorted(load_file(out / "model.safetensors").items()):
        wrong = (weights.reshape(passes, samples) - expected).abs() > 1e-5
        for number in range(passes):
            if ids := wrong[number].nonzero().flatten().tolist():
                of = f"of {len(ids)} samples: {ids[:8]}"
                problems.append(f"pass {number}: parameter {name} is not that of the steps noted, in the entries {of}")
    return problems
