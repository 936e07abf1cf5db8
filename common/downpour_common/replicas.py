"""Replicas of the model that are groups of workers: counts and names.

A replica has ``ranks`` workers, in slots that follow each other: worker ``slot`` is rank ``slot % ranks`` of replica
``slot // ranks``. Rank 0 is its *lead*, which takes the samples for all of them.
"""

from __future__ import annotations

from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved"]
"""In which order a pipeline's stages compute the parts of a batch."""


def chosen_microbatches(microbatches: int, pipeline: int) -> int:
    """Parts that a batch is computed in: as given, else two for each stage of the pipeline."""
    return microbatches or (2 * pipeline if pipeline > 1 else 1)


def multiple_of_ranks(workers: int, ranks: int) -> int:
    """The most workers in whole replicas, but one replica at least."""
    return max(1, workers // ranks) * ranks


def ranks_given(tensor: object, pipeline: object) -> int:
    """Workers of a replica as far as values that nobody has checked yet tell; 1 where they make no sense."""
    given = tensor if isinstance(tensor, list | tuple) else str(tensor if tensor else 1).split(",")
    try:
        stages, widths = int(str(pipeline or 1)), [int(str(width)) for width in given]
    except ValueError:
        return 1
    return max(1, widths[0] * stages if len(widths) == 1 else sum(widths))


def is_lead(slot: int, ranks: int) -> bool:
    """Whether this worker takes samples: in a replica of one worker, always."""
    return slot % ranks == 0


def titled(role: str, index: int, ranks: int, name: str = "") -> str:
    """What a process is called where its replica matters: ``worker/3 (replica 1, rank 1)``. ``name``: if it is not
    called by role and index."""
    name = name or f"{role}/{index}"
    if role != "worker" or ranks == 1 or index < 0:
        return name
    return f"{name} (replica {index // ranks}, rank {index % ranks})"


def counted(workers: int, ranks: int) -> str:
    """``4 workers``, and in how many replicas of how many."""
    text = f"{workers} worker{'' if workers == 1 else 's'}"
    replicas = workers // ranks
    return text if ranks == 1 else f"{text} in {replicas} replica{'' if replicas == 1 else 's'} of {ranks}"
