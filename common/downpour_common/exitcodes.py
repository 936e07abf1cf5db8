"""Exit codes of the ``downpour`` command. ``downpour run`` passes a failed script's own code through unchanged."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 69
"""No coordinator answers (EX_UNAVAILABLE)."""
IO_ERROR = 74
"""The run ended well but its results could not be written (EX_IOERR)."""
REFUSED = 77
"""The coordinator does not accept the key, or it does not allow what was asked (EX_NOPERM)."""
BAD_JOB_FILE = 78
"""A job file, or the job made from it, cannot be used (EX_CONFIG)."""
JOB_FAILED = 100
"""The job that was waited for has failed. Codes from 100 tell the job's end, those below the command's."""
NOT_FINISHED = 101
"""The job goes on: the time to wait for it was over, or its user has stopped looking."""
JOB_CANCELLED = 103
INTERRUPTED = 130


def of_process(returncode: int) -> int:
    """The shell's exit code for a process that ended with ``returncode`` (negative: killed by that signal)."""
    return 128 - returncode if returncode < 0 else returncode
