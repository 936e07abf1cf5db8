"""Options of ``downpour run`` and ``downpour submit`` for replicas of the model that are groups of workers."""

from __future__ import annotations

from typing import Annotated

import typer

Tensor = Annotated[
    str | None,
    typer.Option(
        "--tensor", metavar="N[,N…]", help="Workers that share each layer; one number, or one per stage. [default: 1]"
    ),
]
Pipeline = Annotated[
    int | None,
    typer.Option("--pipeline", metavar="N", help="Stages that each replica's layers are cut into. [default: 1]"),
]
ScheduleOption = Annotated[
    str | None, typer.Option("--schedule", help="Of a pipeline: gpipe | 1f1b | interleaved. [default: 1f1b]")
]
Microbatches = Annotated[
    int | None,
    typer.Option("--microbatches", metavar="N", help="Parts of a batch. [default: 2 per stage, 1 without a pipeline]"),
]
Interleave = Annotated[
    int | None,
    typer.Option("--interleave", metavar="N", help="Schedule interleaved: stages of each worker. [default: 2]"),
]
