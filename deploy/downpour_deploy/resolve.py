"""From what the user typed to a :class:`JobSpec` with nothing left open. All problems are reported together."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass

from downpour_common.config import JobSpec, job_spec, parse_settings
from downpour_common.errors import CheckpointError, ConfigError
from downpour_common.optimizers import missing_rule
from downpour_common.replicas import multiple_of_ranks, ranks_given
from downpour_coordinator import checkpoints
from downpour_coordinator.checkpoints import Checkpoint
from downpour_coordinator.urls import check_url, fetch_newest, is_url
from downpour_deploy.agent.resources import gpus
from downpour_deploy.chaos import Plan, parse
from downpour_deploy.threads import Threads, on_one_host


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line's values as they were given."""

    script: str
    args: tuple[str, ...]
    workers: str
    shards: int
    mode: str
    device: str
    threads: str
    seed: int | None
    out: str | None
    resume: str | None
    settings: tuple[str, ...]
    name: str | None
    restarts: int = 0
    on_nan: str | None = None
    replication: int = 1
    chaos: str = ""
    tensor: str | None = None
    pipeline: int | None = None
    schedule: str | None = None
    microbatches: int | None = None
    interleave: int | None = None
    trace: bool = False
    rule: str | None = None
    compress: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedJob:
    """A job that can start. ``threads`` are those in force; ``notes`` are for the user to read."""

    spec: JobSpec
    checkpoint: Checkpoint | None
    cores: int
    threads: Threads
    notes: tuple[str, ...]
    chaos: Plan | None = None


def resolve(wishes: Wishes) -> ResolvedJob:
    """Fill in defaults and check. Raises :class:`ConfigError`, :class:`CheckpointError`."""
    problems: list[str] = []
    notes: list[str] = []
    cores = len(os.sched_getaffinity(0))
    if not os.path.isfile(wishes.script):
        problems.append(f"{wishes.script}: no such file; give the path of the training script")
    else:
        problems += missing_rule(wishes.rule or "", wishes.script)
    ranks = ranks_given(wishes.tensor, wishes.pipeline)
    workers = _count("--workers", wishes.workers, multiple_of_ranks(cores, ranks), problems)
    preset = os.environ.get("OMP_NUM_THREADS", "")
    threads = _count("--threads", wishes.threads, int(preset) if preset.isdecimal() else 0, problems)
    out = _out(wishes, problems)
    made = not os.path.lexists(out)
    checkpoint = _checkpoint(wishes.resume, out, problems, notes)
    seed = wishes.seed
    if seed is None:
        seed = int(checkpoint.manifest["seed"]) if checkpoint else 0
    elif checkpoint and seed != checkpoint.manifest["seed"]:
        notes.append(f"the seed changed from {checkpoint.manifest['seed']} to {seed}: the open epoch starts over")
    fields: dict[str, object] = {
        "name": wishes.name if wishes.name is not None else _name(wishes.script),
        "script": wishes.script,
        "args": wishes.args,
        "workers": workers,
        "shards": wishes.shards,
        "mode": wishes.mode,
        "device": wishes.device,
        "threads": threads,
        "seed": seed,
        "restarts": wishes.restarts,
        "replication": wishes.replication,
        "trace": wishes.trace,
        "out": out,
        "resume": checkpoint.folder if checkpoint else None,
    }
    for name in ("tensor", "pipeline", "schedule", "microbatches", "interleave", "rule", "compress", "target"):
        if getattr(wishes, name) is not None:
            fields[name] = getattr(wishes, name)
    try:
        given = (f"on_nan={wishes.on_nan}",) if wishes.on_nan is not None else ()
        fields["settings"] = parse_settings((*wishes.settings, *given))
    except ConfigError as error:
        problems += error.problems
    chaos = None
    try:
        chaos = parse(wishes.chaos, workers, wishes.shards, wishes.replication) if wishes.chaos else None
    except ConfigError as error:
        problems += error.problems
    spec = None
    try:
        spec = job_spec(**fields)
        if spec.settings.checkpoint_url:
            check_url(spec.settings.checkpoint_url)
    except ConfigError as error:
        problems += error.problems
    if problems or spec is None:
        if made and wishes.resume is not None and is_url(wishes.resume):
            shutil.rmtree(out, ignore_errors=True)  # what was fetched
        raise ConfigError(*problems)
    spec = spec.with_chunks(shares_memory(spec))
    if spec.compress and shares_memory(spec.model_copy(update={"compress": ""})):
        notes.append(
            "compress: gradients and weights are sent, not shared in memory as on one host they else would be: fewer "
            "bytes, and no faster steps here"
        )
    return ResolvedJob(spec, checkpoint, cores, on_one_host(spec, cores), tuple(notes), chaos)


def _checkpoint(resume: str | None, out: str, problems: list[str], notes: list[str]) -> Checkpoint | None:
    """What to go on from: the newest that is sound, brought into ``out`` from where it lies at a URL."""
    if resume is None or (is_url(resume) and problems):
        return None
    try:
        found, skipped = fetch_newest(resume, out) if is_url(resume) else checkpoints.newest(resume)
    except CheckpointError as error:
        problems.append(f"--resume {error}")
        return None
    except ConfigError as error:
        problems += [f"--resume {problem}" for problem in error.problems]
        return None
    notes += [f"skipped a damaged checkpoint: {text}" for text in skipped]
    return found


def shares_memory(spec: JobSpec) -> bool:
    """Whether gradients and weights will lie in shared memory, as far as can be told before the script runs."""
    settings = spec.settings
    wanted = settings.shared_memory and settings.transport == "ipc" and settings.n_push == 1
    wanted = wanted and settings.push_dtype == "same" and not spec.compress
    return wanted and (spec.device == "cpu" or (spec.device == "auto" and not gpus()))


def _count(option: str, text: str, auto: int, problems: list[str]) -> int:
    if text == "auto":
        return auto
    if text.isdecimal() and int(text) > 0:
        return int(text)
    problems.append(f"{option} {text}: expected a positive number, or auto")
    return 1


def _name(script: str) -> str:
    stem = os.path.splitext(os.path.basename(script))[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40] or "job"


def _out(wishes: Wishes, problems: list[str]) -> str:
    """The run directory: as given; the resumed run's own; or a new one under ``runs/``."""
    if wishes.out is None:
        if wishes.resume is not None and os.path.isdir(os.path.join(wishes.resume, "checkpoints")):
            return wishes.resume
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = os.path.join("runs", f"{wishes.name or _name(wishes.script)}-{stamp}")
        out, number = base, 1
        while os.path.exists(out):
            number += 1
            out = f"{base}-{number}"
        return out
    out = wishes.out
    if os.path.exists(out) and not os.path.isdir(out):
        problems.append(f"--out {out}: is a file; give a folder")
    elif os.path.isdir(out) and os.listdir(out) and not _same_folder(out, wishes.resume):
        problems.append(f"--out {out}: is not empty; give another folder, or go on with --resume {out}")
    return out


def _same_folder(out: str, resume: str | None) -> bool:
    return resume is not None and os.path.realpath(out) == os.path.realpath(resume)
