"""The command line of ``downpour checkpoint``. Parses first; heavy imports come after."""

from __future__ import annotations

from typing import Annotated

import typer

from downpour_common import exitcodes
from downpour_deploy.jobs.options import TIMEOUT_S, AnswerTimeout, AsJson, Join, Keys, Security
from downpour_deploy.jobs.report import keep_what_is_there, print_json, reported, say

checkpoint_app = typer.Typer(
    help="Checkpoints: make one now, list, verify and export them.", no_args_is_help=True, rich_markup_mode=None
)

Where = Annotated[
    str, typer.Argument(metavar="RUN", help="Run directory, checkpoint's folder, URL, or job of a cluster.")
]
Number = Annotated[int | None, typer.Option("--number", metavar="N", min=0, help="Only this checkpoint.")]
ANSWER_S = TIMEOUT_S


@checkpoint_app.callback()
def _root() -> None:
    """Checkpoints: make one now, list, verify and export them."""


@checkpoint_app.command("ls")
def ls(
    run: Where,
    check: Annotated[bool, typer.Option("--check", help="Read all files and say whether they are sound.")] = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """List the checkpoints of RUN: number, clock, size, age, mode.

    Exit code: 0, 2 no such thing, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour_coordinator.sources import examine
        from downpour_deploy.checkpoint.show import document, table
        from downpour_deploy.checkpoint.target import opened

        with opened(run, join, keys, security, answer_timeout) as source:
            found = [examine(source, number, files=check) for number in source.numbers()]
            if json_:
                print_json({"place": source.place, "checkpoints": [document(each) for each in found]})
            elif found:
                typer.echo("\n".join(table(found)))
            else:
                say(f"{source.place} holds no checkpoints")


@checkpoint_app.command("verify")
def verify(
    run: Where,
    number: Number = None,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """Read every file of RUN's checkpoints, and name what is damaged or does not belong there.

    Exit code: 0 all are sound, 1 one is not (or there is none), 2 no such thing, 69 no coordinator, 77 key refused.
    """
    with reported():
        from downpour_coordinator.sources import examine
        from downpour_deploy.checkpoint.show import document, verdict
        from downpour_deploy.checkpoint.target import chosen, opened

        with opened(run, join, keys, security, answer_timeout) as source:
            found = []
            for each in chosen(source, number):
                found.append(examine(source, each))
                if not json_:
                    typer.echo("\n".join(verdict(found[-1])))
            sound = bool(found) and not any(each.problems for each in found)
            if json_:
                named = [document(each) for each in found]
                print_json({"place": source.place, "sound": sound, "checkpoints": named})
            if not found:
                say(f"{source.place} holds no checkpoints")
        code = exitcodes.OK if sound else exitcodes.FAILED
    raise typer.Exit(code)


@checkpoint_app.command("export")
def export(
    run: Where,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="Where to.")] = "model.safetensors",
    number: Number = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """Write the model of RUN's newest sound checkpoint as safetensors, under the names of its state dict.

    Exit code: 0, 1 no sound checkpoint or it cannot be written, 2 no such thing, 69 no coordinator, 74 the file
    is there already, 77 key refused.
    """
    with reported():
        import os

        from downpour_coordinator.export import export_model
        from downpour_deploy.checkpoint.target import opened, sound_one

        keep_what_is_there(out, force)
        with (
            opened(run, join, keys, security, answer_timeout) as source,
            sound_one(source, number, os.path.dirname(os.path.abspath(out)), say) as (found, checkpoint),
        ):
            export_model(checkpoint, out)
        size = os.path.getsize(out)
        clock = checkpoint.manifest["clock"]
        if json_:
            print_json({"file": out, "bytes": size, "number": found, "clock": clock})
        else:
            from downpour_common.sizes import format_bytes

            typer.echo(f"{out}: {format_bytes(size)}, checkpoint {found}, clock {clock}")


@checkpoint_app.command("now")
def now(
    run: Annotated[str, typer.Argument(metavar="JOB", help="Run directory of `downpour run`, or job of a cluster.")],
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", min=0, help="Seconds to wait for it.")] = 60.0,
    json_: AsJson = False,
    join: Join = None,
    keys: Keys = None,
    security: Security = None,
    answer_timeout: AnswerTimeout = ANSWER_S,
) -> None:
    """Have JOB make a checkpoint now, and wait until it is committed. Training goes on meanwhile.

    Exit code: 0 committed, 1 the job ended before, 2 no such job or it does not train, 69 no coordinator, 77 key
    refused, 101 not committed in time (it may be later).
    """
    with reported():
        from downpour_deploy.checkpoint.now import await_commit, exit_code
        from downpour_deploy.checkpoint.target import asked

        with asked(run, join, keys, security, answer_timeout) as (client, job):
            found = await_commit(client, job, timeout)
        code = exit_code(found)
        if json_:
            print_json(found)
        elif code == exitcodes.OK:
            typer.echo(f"job {found['job']}: checkpoint {found['number']} is committed")
        else:
            detail = f": {found['error']}" if found["error"] else ""
            ended = "it ended before a checkpoint was committed"
            late = f"no checkpoint was committed within {timeout:g} s; it may be later"
            say(f"job {found['job']}: {ended if code == exitcodes.FAILED else late}{detail}")
    raise typer.Exit(code)
