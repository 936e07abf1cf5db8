"""Options of ``run`` and ``submit`` that say how replicas agree, beside ``--mode``."""

from __future__ import annotations

from typing import Annotated

import typer

MODE_HELP = "async | ssp:S | sync[,backup=B] | average:H | easgd:H | diloco:H | lbfgs; see docs/modes.md."

GroupMode = Annotated[
    list[str] | None,
    typer.Option(
        "--group-mode",
        metavar="GROUP=MODE",
        help="Another mode for a parameter group of the optimizer, by its number: 1=async. Repeatable.",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option("--rule", metavar="MODULE:CLASS", help="An optimizer class of the job's folder, run by the shards."),
]
Compress = Annotated[
    str | None,
    typer.Option(
        "--compress", metavar="push=CODEC,pull=CODEC", help="Codecs of what travels: push=topk:0.01,pull=bf16."
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME=VALUE",
        help="Tell when this logged value is reached: loss=0.1 (at most), accuracy=+0.97 (at least).",
    ),
]
