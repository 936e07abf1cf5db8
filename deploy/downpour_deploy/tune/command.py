"""The command line of ``downpour tune``. Parses first; heavy imports come after."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from downpour_common import exitcodes
from downpour_deploy.jobs.options import AsJson
from downpour_deploy.jobs.report import print_json, reported, say

if TYPE_CHECKING:
    from downpour.tuning import Trial
    from downpour_deploy.tune.search import Search

WARMUP = 2


def register(app: typer.Typer) -> None:
    """Add the command to the command line's root."""
    app.command("tune", context_settings={"allow_interspersed_args": False})(tune)


def tune(
    script: Annotated[str, typer.Argument(help="The training script; it calls downpour.prepare.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[
        int, typer.Option("-w", "--workers", min=1, help="Workers of the job to be: each has its share of the machine.")
    ] = 1,
    first: Annotated[int, typer.Option("--from", min=1, metavar="N", help="The first batch size.")] = 8,
    last: Annotated[
        int, typer.Option("--to", min=0, metavar="N", help="The last one. [default: see below]", show_default=False)
    ] = 0,
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="SIZE", help="What a worker may take, such as 2GiB. [default: what is free]"),
    ] = "",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time for each batch size, at least.")] = 5,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="… and at least for so long.")] = 0.5,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, help="Seconds for one batch size, its start included.")
    ] = 300.0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="autocast=KIND or activation_checkpointing=true, as for `downpour run`."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Find a batch size: run SCRIPT for a few steps with one after the other, each twice the one before.

    SCRIPT runs as one worker without servers, and ends by itself after its timed steps (and 2 before them). The batch
    size of the first DataLoader given to downpour.prepare is replaced; times are medians. Memory is the peak of the
    process, or of its GPU, and "of steps" what of it came after downpour.prepare.

    It stops at the first batch size that does not fit or is larger than the data set, or when two doublings in a row
    bring less than 2 %. The knee is the smallest batch size with 90 % of the best throughput.

    Exit code: 0 found, the failed script's own, 1 nothing could be measured, 2 usage, 130 interrupted.
    """
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = exitcodes.OK
    with reported():
        from downpour_deploy.tune.attempt import ScriptError

        search = _search(script, workers, first, last, memory)
        kept = _kept(settings or [])
        try:
            _try_all(search, [script, *(args or [])], workers, (steps, seconds, timeout), kept, json_)
        except ScriptError as error:
            for line in error.output.rstrip().splitlines()[-30:]:
                typer.echo(line, err=True)
            say(str(error))
            code = error.code
        except KeyboardInterrupt:
            search.stop("interrupted")
            code = exitcodes.INTERRUPTED
        _print(search, script, workers, json_)
        if not search.rows and code == exitcodes.OK:
            say(f"batch size {first} cannot be measured: {search.stopped}; begin with a smaller one, --from N")
            code = exitcodes.FAILED
    raise typer.Exit(code)


def _search(script: str, workers: int, first: int, last: int, memory: str) -> Search:
    from downpour_common.errors import ConfigError
    from downpour_common.sizes import parse_bytes
    from downpour_deploy.tune.search import Search

    problems = []
    if not os.path.isfile(script):
        problems.append(f"{script}: no such file; give the path of the training script")
    if last and last < first:
        problems.append(f"--to {last}: less than --from, which is {first}")
    budget = 0
    try:
        budget = parse_bytes(memory) if memory else 0
    except ConfigError as error:
        problems += [f"--memory {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return Search(first, last, budget, workers)


def _kept(assignments: list[str]) -> dict[str, object]:
    """The settings that count here. Raises :class:`ConfigError` for others."""
    from pydantic import ValidationError

    from downpour_common.config import Settings, describe, parse_settings
    from downpour_common.errors import ConfigError

    given = parse_settings(assignments)
    known = ("autocast", "activation_checkpointing")
    others = [key for key in given if key not in known]
    if others:
        raise ConfigError(*(f"--set {key}: changes nothing here; known: {', '.join(known)}" for key in others))
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(*(f"--set {line}" for line in describe(error))) from None
    return {key: getattr(settings, key) for key in known}


def _try_all(
    search: Search,
    script: list[str],
    workers: int,
    limits: tuple[int, float, float],
    kept: dict[str, object],
    quiet: bool,
) -> None:
    """One batch size after the other. Raises :class:`ScriptError`, but for one that is too large."""
    import tempfile

    from downpour.tuning import Trial
    from downpour_deploy.launch import SPIN_COUNT
    from downpour_deploy.tune.attempt import judge, run

    steps, seconds, timeout_s = limits
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*environment}:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT  # as in a job
    environment.pop("DOWNPOUR_WORKER", None)
    with tempfile.TemporaryDirectory(prefix="downpour-tune-") as folder:
        while (size := search.next()) is not None:
            if not quiet and sys.stderr.isatty():
                typer.echo(f"batch size {size} …", err=True)
            trial: Trial = Trial(size, WARMUP, steps, seconds, os.path.join(folder, "report"), **kept)  # type: ignore[arg-type]
            found = judge(run([sys.executable, "-u", *script], environment, trial, timeout_s), script[0], timeout_s)
            if isinstance(found, str):
                search.stop(f"{size}: {found}")
            else:
                search.take(found)


def _print(search: Search, script: str, workers: int, json_: bool) -> None:
    from downpour_deploy.tune.show import conclusion, document, table

    if json_:
        print_json(document(search, script, workers))
    elif search.rows:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = max(console.width, 100)  # a pipe says 80, which cuts columns off
        console.print(table(search))
        typer.echo("\n" + conclusion(search))
