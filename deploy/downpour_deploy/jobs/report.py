"""From errors to exit codes and what is said about them; where JSON leaves."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from downpour_common import exitcodes

SIGPIPE_CODE = 128 + 13


@contextmanager
def reported() -> Iterator[None]:
    """Run a command: errors become a message on stderr and an exit code."""
    from downpour_common.errors import ConfigError, DownpourError

    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            say(problem)
        code = exit_code(error)
    except DownpourError as error:
        for line in str(error).splitlines() or [type(error).__name__]:
            say(line)
        code = exit_code(error)
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = SIGPIPE_CODE
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        code = exitcodes.IO_ERROR
    except KeyboardInterrupt:
        say("interrupted")
        code = exitcodes.INTERRUPTED
    else:
        return
    raise typer.Exit(code)


def exit_code(error: Exception) -> int:
    """The exit code that belongs to ``error``."""
    from downpour.jobs.errors import (
        BadJobFile,
        ClusterError,
        CoordinatorUnreachable,
        Forbidden,
        JobCancelled,
        NotFinished,
        ResultsDiffer,
    )
    from downpour_common.errors import BundleError, ConfigError, JobFailed

    match error:
        case BadJobFile():
            return exitcodes.BAD_JOB_FILE
        case CoordinatorUnreachable():
            return exitcodes.UNREACHABLE
        case Forbidden():
            return exitcodes.REFUSED
        case NotFinished():
            return exitcodes.NOT_FINISHED
        case ResultsDiffer():
            return exitcodes.IO_ERROR
        case JobFailed():
            return exitcodes.JOB_FAILED
        case JobCancelled():
            return exitcodes.JOB_CANCELLED
        case ConfigError() | ClusterError() | BundleError():
            return exitcodes.USAGE
        case _:
            return exitcodes.FAILED


def say(text: str) -> None:
    """To the user, not to what reads stdout; without control characters, as it may come from elsewhere."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", "    "))
    typer.echo(f"downpour: {shown}", err=True)


def keep_what_is_there(path: str, force: bool) -> None:
    """End the command rather than write over a file, unless ``force`` says so."""
    if os.path.lexists(path) and not force:
        say(f"{path}: is there already; give another name with -o, or --force")
        raise typer.Exit(exitcodes.IO_ERROR)


def print_json(document: Any) -> None:
    """One document on stdout. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2 if sys.stdout.isatty() else None, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
