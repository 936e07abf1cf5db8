"""How many threads each process of a job computes with, where the user leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.config import JobSpec


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads of each worker, and of each shard."""

    workers: int
    shards: int


def on_one_host(spec: JobSpec, cores: int) -> Threads:
    """For a job whose processes share ``cores`` cores.

    The workers have the cores to themselves while they compute. Where they all wait while the shards work (there is
    only one, or all meet in rounds), the shards then have them all; otherwise others compute in the meantime, and a
    shard takes from them what it uses.
    """
    if spec.threads:
        return Threads(spec.threads, spec.threads)
    mode = spec.parsed_mode
    in_turns = spec.workers == 1 or (mode.in_rounds and not mode.backup and not mode.groups)
    return Threads(max(1, cores // spec.workers), max(1, cores // spec.shards) if in_turns else 1)
